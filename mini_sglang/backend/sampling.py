"""From logits to token ids, for the whole batch at once: the one place where tokens are chosen.

A row's result depends on its own logits and its own ``SampleSpec`` and on nothing else, bit for bit, so
that a request gives the same tokens alone and in any batch: the random number of a draw is a pure
function of the seed and the token's index, and probabilities are added exactly (see ``distribution``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from mini_sglang.backend.device import to_device
from mini_sglang.backend.distribution import (
    argmax,
    argmax_items,
    chunk_rows,
    draw_target,
    largest,
    nth_equal,
    take,
    usable,
    weight_unit,
    weights_of,
)
from mini_sglang.backend.logprobs import prompt_logprobs, token_logprobs
from mini_sglang.backend.penalties import adjust_logits, adjusts
from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.types import SamplingParams, TokenLogprob

__all__ = ["Sampler", "prompt_logprobs", "uniform"]

_MASK64 = (1 << 64) - 1
_BLOCK = 256
_NARROW, WIDE = 64, 1024


def uniform(seed: int, index: int) -> float:
    """The random number in ``[0, 1)`` for token number ``index`` of a request: 53 bits.

    Output ``index`` of the SplitMix64 generator (Steele, Lea and Flood, "Fast splittable pseudorandom
    number generators", 2014), whose state after n outputs is known without making them. The seed is
    mixed first, so that the streams of neighbouring seeds have nothing in common.
    """
    return (_splitmix64(_splitmix64(seed, 0), index) >> 11) * 2.0**-53


def _splitmix64(seed: int, index: int) -> int:
    """Output ``index``, from 0, of SplitMix64 seeded with ``seed``."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & _MASK64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK64
    return z ^ (z >> 31)


class Sampler:
    """Chooses one token per row.

    Order: repetition penalty, presence and frequency penalties, logit_bias, banned ids, the grammar's
    mask; then greedy, or temperature, top_k, top_p, min_p and a draw. Ties of greedy go to the lowest id.
    The filters keep the sets that transformers' warpers keep: top_k every tie of the k-th token, top_p the
    token that crosses, by the distribution that top_k left, min_p what is not below its share of the most
    probable token. Where top_p cuts through equal tokens the lower ids stay.

    The draw is by inverse cumulative distribution: in ascending order of ids where neither top_k nor
    top_p is on, else by descending logit, then ascending id. A token less probable than the most
    probable one by a factor above 2**38 (49,152 tokens; 2**36 for 200,000) counts as impossible.

    Args:
        vocab_size: number of ids that can be chosen; logits from there on are padding of the head.
    """

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < 1:
            raise ValueError(f"vocab_size is {vocab_size}; it must be at least 1.")
        self._vocab_size = vocab_size
        self._unit = weight_unit(vocab_size)

    def sample(self, logits: Tensor, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        """Choose the next token of every row, with its logprob where asked for.

        Args:
            logits: ``[R, V]`` with ``V >= vocab_size``, float32; overwritten in rows that have
                penalties, bias or bans.
            specs: one per row.

        Returns:
            One result per row. A row from which no token can be chosen has ``error`` set to a sentence,
            and the others are as if it were not there.

        Raises:
            ValueError: the shape of ``logits`` does not fit ``specs`` or the vocabulary.
        """
        self._check(logits, specs)
        if not specs:
            return []
        if logits.shape[1] > self._vocab_size:
            logits = logits[:, : self._vocab_size]
        if all(map(_takes_argmax, specs)):
            return _argmax_results(logits)
        return self._sample(usable(logits), specs)

    def _check(self, logits: Tensor, specs: Sequence[SampleSpec]) -> None:
        shape = logits.shape
        if len(shape) != 2 or shape[0] != len(specs) or shape[1] < self._vocab_size:
            wanted = f"[{len(specs)}, at least {self._vocab_size}]"
            raise ValueError(f"logits have shape {list(shape)}; it must be {wanted}.")

    def prompt_logprobs(self, logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
        """``prompt_logprobs`` within the vocabulary, for ``logits`` that may have the head's padding."""
        return prompt_logprobs(logits[:, : self._vocab_size], targets, top)

    @torch.inference_mode()
    def _sample(self, x: Tensor, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        top, peak = argmax(x)
        errors = [None if math.isfinite(value) else bad_logits(value) for value in peak[:, 0].tolist()]
        reported = [row for row, spec in enumerate(specs) if spec.params.logprobs and not errors[row]]
        raw = take(x, reported) if reported else None
        if any(map(adjusts, specs)):
            raw = None if raw is None else raw.clone()
            for row, sentence in adjust_logits(x, specs).items():
                errors[row] = errors[row] or sentence
            top, peak = argmax(x)
            for row, value in enumerate(peak[:, 0].tolist()):
                if not math.isfinite(value):
                    errors[row] = errors[row] or bad_adjustment(value, specs[row])

        ids: list[int] = top.tolist()
        drawn = [row for row, spec in enumerate(specs) if not (spec.params.greedy or errors[row])]
        for row, token_id in self._draw(x, peak, specs, drawn):
            ids[row] = token_id
        results = [
            SequenceResult(error=error) if error else SequenceResult(token_id=token_id)
            for token_id, error in zip(ids, errors, strict=True)
        ]
        if raw is not None:
            tops = [specs[row].params.top_logprobs for row in reported]
            logprobs = token_logprobs(raw, [ids[row] for row in reported], tops)
            for row, logprob in zip(reported, logprobs, strict=True):
                if not errors[row]:
                    results[row].logprob = logprob
        return results

    def _draw(
        self, x: Tensor, peak: Tensor, specs: Sequence[SampleSpec], drawn: Sequence[int]
    ) -> list[tuple[int, int]]:
        """Draw for the rows ``drawn``; pairs of row and token id."""
        groups: dict[tuple[bool, int], list[int]] = {}
        for row in drawn:
            groups.setdefault(self._group(specs[row].params), []).append(row)
        done: list[int] = []
        tokens: list[Tensor] = []
        step = chunk_rows(x)
        for (limited, width), rows in groups.items():
            for start in range(0, len(rows), step):
                chunk = rows[start : start + step]
                part = take(x, chunk)
                columns = self._columns(take(peak, chunk), [specs[row] for row in chunk])
                if width:
                    total = None if limited else self._weights(part, columns).sum(-1, keepdim=True)
                    tokens.append(self._draw_ranked(part, replace(columns, total=total), width))
                else:
                    tokens.append(self._draw_any(part, columns))
                done += chunk
        return list(zip(done, torch.cat(tokens).tolist(), strict=True)) if tokens else []

    def _group(self, params: SamplingParams) -> tuple[bool, int]:
        """Whether top_k limits the row, and how many of its largest logits to look at first (0: no order
        is needed)."""
        if 0 < params.top_k < self._vocab_size:
            # More than k: only a smaller value shows that all ties of the k-th are there.
            widths = (width for width in (_NARROW, WIDE) if params.top_k < width < self._vocab_size)
            return True, next(widths, self._vocab_size)
        return False, min(_NARROW, self._vocab_size) if params.top_p < 1.0 else 0

    def _columns(self, peak: Tensor, specs: Sequence[SampleSpec]) -> Columns:
        # A scale above 1e300 would change nothing but 0 times infinity: no two float32 are that close.
        table = [
            [min(1.0 / spec.params.temperature, 1e300) for spec in specs],
            [uniform(spec.seed, spec.index) for spec in specs],
            [float(spec.params.top_k) for spec in specs],
            [spec.params.top_p for spec in specs],
            [spec.params.min_p * self._unit for spec in specs],
        ]
        columns = to_device(torch.tensor(table, dtype=torch.float64), peak.device).unsqueeze(-1)
        scale, uniforms, top_k, top_p, floor = columns
        filtered = any(spec.params.min_p for spec in specs)
        return Columns(peak.double(), scale, uniforms, top_k.long(), top_p, floor if filtered else None)

    def _weights(self, values: Tensor, columns: Columns) -> Tensor:
        return weights_of(values, columns.peak, columns.scale, self._unit)

    def _draw_any(self, x: Tensor, columns: Columns) -> Tensor:
        """Draw under temperature and min_p alone. Returns ids ``[R]``."""
        weights = self._weights(x, columns)
        if columns.floor is not None:
            weights.masked_fill_(weights < columns.floor, 0.0)
        # Two cumulative sums, over blocks and in one block, cost less than one over the vocabulary.
        if weights.shape[1] % _BLOCK:
            weights = pad(weights, (0, -weights.shape[1] % _BLOCK))
        blocks = weights.view(len(weights), -1, _BLOCK)
        sums = blocks.sum(-1)
        up_to = sums.cumsum(-1)
        target = draw_target(columns.uniform, up_to[:, -1:])
        # A row that is not finite, which a device learns with its id, would point past the end.
        block = torch.searchsorted(up_to, target, right=True).clamp_(max=sums.shape[1] - 1)
        inside = target - (up_to.gather(1, block) - sums.gather(1, block))
        rows = torch.arange(len(blocks), device=x.device)
        place = torch.searchsorted(blocks[rows, block[:, 0]].cumsum(-1), inside, right=True)
        return (block * _BLOCK + place)[:, 0]

    def _keep(self, values: Tensor, columns: Columns) -> tuple[Tensor, Tensor]:
        """Weights of the largest logits ``[R, width]``, 0 where a filter drops them, and whether they are
        enough.

        What lies beyond the width does not matter where its weights are 0 or a filter ends before it.
        """
        weights = self._weights(values, columns)
        last = slice(values.shape[1] - 1, values.shape[1])
        kept = weights.clone()
        enough = weights[:, last] == 0.0
        if columns.total is None:
            kth = values.gather(1, columns.top_k - 1)
            kept.masked_fill_(values < kth, 0.0)
            enough |= values[:, last] < kth
        up_to = kept.cumsum(-1)
        total = up_to[:, -1:] if columns.total is None else columns.total
        kept.masked_fill_(up_to - kept >= columns.top_p * total, 0.0)
        if columns.floor is not None:
            kept.masked_fill_(weights < columns.floor, 0.0)
        if columns.total is not None:
            enough |= kept[:, last] == 0.0
        return kept, enough

    def _draw_ranked(self, x: Tensor, columns: Columns, width: int) -> Tensor:
        """Draw under top_k or top_p from the ``width`` largest logits; rows for which these are not
        enough are drawn again from more. Returns ids ``[R]``.

        It ranks values and finds the id last, since the ids that a device's topk gives for equal values
        are not defined.
        """
        values = largest(x, width)
        kept, enough = self._keep(values, columns)
        up_to = kept.cumsum(-1)
        place = torch.searchsorted(up_to, draw_target(columns.uniform, up_to[:, -1:]), right=True)
        value = values.gather(1, place)
        ids = nth_equal(x, value, place[:, 0] - (values > value).sum(-1))
        if width == self._vocab_size:
            return ids
        short = (~enough[:, 0]).nonzero()[:, 0]
        if len(short):
            wider = min(WIDE, self._vocab_size) if width < WIDE else self._vocab_size
            ids[short] = self._draw_ranked(x[short], columns.of(short), wider)
        return ids


@dataclass(frozen=True, slots=True)
class Columns:
    """What a draw needs of some rows, each ``[R, 1]`` and float64 (``top_k`` int64).

    ``scale`` is one over the temperature, ``floor`` the weight below which min_p drops a token,
    None without min_p; ``total`` the weight of the whole vocabulary, None where top_k limits the rows.
    """

    peak: Tensor
    scale: Tensor
    uniform: Tensor
    top_k: Tensor
    top_p: Tensor
    floor: Tensor | None = None
    total: Tensor | None = None

    def of(self, rows: Tensor) -> Columns:
        return Columns(
            self.peak[rows],
            self.scale[rows],
            self.uniform[rows],
            self.top_k[rows],
            self.top_p[rows],
            None if self.floor is None else self.floor[rows],
            None if self.total is None else self.total[rows],
        )


def _takes_argmax(spec: SampleSpec) -> bool:
    """Whether the largest of the model's own logits is all that the row needs."""
    return spec.params.greedy and not spec.params.logprobs and not adjusts(spec)


def _argmax_results(logits: Tensor) -> list[SequenceResult]:
    return [
        SequenceResult(token_id) if math.isfinite(peak) else SequenceResult(error=bad_logits(peak))
        for token_id, peak in argmax_items(logits)
    ]


def bad_logits(value: float) -> str:
    return (
        f"The model's logits are not finite (the largest is {value}): no token can be chosen. "
        "Its weights are damaged, or overflow in this type (MODEL_DTYPE)."
    )


def bad_adjustment(value: float, spec: SampleSpec) -> str:
    if value == -math.inf and spec.grammar is not None:
        return "Every token that the grammar allows here is banned: no token can be chosen."
    if value == -math.inf:
        return "Every token is banned for this sequence: no token can be chosen."
    return "The penalties of this request make its logits overflow: no token can be chosen."
