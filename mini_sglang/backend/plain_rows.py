"""What to choose a token by, of rows that are greedy or drawn under temperature and min_p alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from mini_sglang.backend.distribution import weight_unit
from mini_sglang.backend.sampling import uniform
from mini_sglang.backend.step import SampleSpec
from mini_sglang.types import SamplingParams

Table = npt.NDArray[np.float64]

_MASK64 = (1 << 64) - 1
# From so many rows on numpy's operators cost less than Python's.
_MANY = 24
# Of requests' parameters, which are kept with what they come to.
_KNOWN = 4096


class PlainRows:
    """Makes the table that ``TritonChooser`` reads.

    What a request's parameters come to is found out once: they are the same object in each of its steps.
    """

    def __init__(self, vocab_size: int) -> None:
        self._vocab_size = vocab_size
        self._unit = weight_unit(vocab_size)
        # The parameters are held, so that no others get their number.
        self._known: dict[int, tuple[SamplingParams, float | None, float]] = {}

    def table(self, specs: Sequence[SampleSpec]) -> Table | None:
        """For each row 1 over the temperature, or 0 for greedy; the random number; min_p's floor; and a 0.

        Returns:
            ``[4, R]``; None where a row needs more than this, or there is none.
        """
        known = self._known
        scales: list[float] = []
        floors: list[float] = []
        for spec in specs:
            entry = known.get(id(spec.params)) or self._learn(spec.params)
            scale = entry[1]
            if scale is None or spec.banned_ids or spec.grammar is not None:
                return None
            scales.append(scale)
            floors.append(entry[2])
        count = len(scales)
        if not count:
            return None
        if count < _MANY:
            # Greedy rows need none, and most steps of one sequence come here.
            draws = [
                uniform(spec.seed, spec.index) if scale else 0.0
                for spec, scale in zip(specs, scales, strict=True)
            ]
            return np.array((scales, draws, floors, [0.0] * count))
        table = np.zeros((4, count))
        table[0] = scales
        if any(scales):
            table[1] = uniforms([spec.seed for spec in specs], [spec.index for spec in specs])
            table[2] = floors
        return table

    def _learn(self, params: SamplingParams) -> tuple[SamplingParams, float | None, float]:
        if len(self._known) >= _KNOWN:
            self._known.clear()
        scale: float | None = None
        limited = 0 < params.top_k < self._vocab_size or params.top_p < 1.0
        if params.logprobs or params.penalised or params.logit_bias:
            pass
        elif params.greedy:
            scale = 0.0
        elif not limited:
            # See ``Sampler._columns``.
            scale = min(1.0 / params.temperature, 1e300)
        entry = (params, scale, params.min_p * self._unit)
        self._known[id(params)] = entry
        return entry


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> Table:
    """``uniform`` of each."""
    first = np.array([seed & _MASK64 for seed in seeds], dtype=np.uint64)
    mixed = _splitmix64(first, np.zeros(1, dtype=np.uint64))
    numbers = _splitmix64(mixed, np.array(indices, dtype=np.uint64)) >> np.uint64(11)
    return numbers.astype(np.float64) * 2.0**-53


def _splitmix64(seed: npt.NDArray[np.uint64], index: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = seed + (index + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: npt.NDArray[np.uint64] = z ^ (z >> np.uint64(31))
    return mixed
