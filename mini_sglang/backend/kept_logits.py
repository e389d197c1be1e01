"""Logits kept beyond their step, for prompts that come again whole."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SampleSpec, SequenceResult, SequenceStep


class KeptLogits:
    """One row of logits ``[V]`` float32 per number, as the model gave them, on the model's device."""

    def __init__(self) -> None:
        self._rows: dict[int, Tensor] = {}

    def keep(self, steps: Sequence[SequenceStep], places: Sequence[int], logits: Tensor) -> None:
        """Copy the rows that are wanted later; the sampler changes its own.

        Args:
            places: which of ``steps`` each row of ``logits`` ``[R, V]`` belongs to.
        """
        wanted = [
            (number, row)
            for row, place in enumerate(places)
            if (number := steps[place].keep_logits) is not None
        ]
        if not wanted:
            return
        with torch.inference_mode():
            for number, row in wanted:
                kept = self._rows.get(number)
                if kept is None:
                    self._rows[number] = logits[row].to(torch.float32, copy=True)
                else:
                    kept.copy_(logits[row])

    def run(
        self,
        steps: Sequence[SequenceStep],
        sampler: Sampler,
        run: Callable[[Sequence[SequenceStep]], list[SequenceResult]],
    ) -> list[SequenceResult]:
        """Choose the tokens of the steps that start from kept logits, then ``run`` the others."""
        results: dict[int, SequenceResult] = {}
        stored: list[tuple[int, SampleSpec, Tensor]] = []
        for place, step in enumerate(steps):
            if step.from_logits is not None and step.sample is not None:
                stored.append((place, step.sample, self._rows[step.from_logits]))
        if stored:
            places, specs, rows = zip(*stored, strict=True)
            with torch.inference_mode():
                results = dict(zip(places, sampler.sample(torch.stack(rows), specs), strict=True))
        rest = [place for place, step in enumerate(steps) if step.from_logits is None]
        results.update(zip(rest, run([steps[place] for place in rest]), strict=True))
        return [results[place] for place in range(len(steps))]
