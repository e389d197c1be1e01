"""The largest logits of rows in order, and logprobs as numbers that come to the host in one copy."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mini_sglang.backend.distribution import chunk_rows, weight_unit, weights_of
from mini_sglang.types import TokenLogprob

_LOW = 0xFFFFFFFF


def ranked(x: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest of each row of float32 ``[R, V]``, equal ones by ascending id: values and ids.

    Value and id make one whole number, of which no two are equal: what a device does with ties cannot show.
    """
    # Of -0.0 and 0.0, which are equal, the bits differ.
    bits = (x + 0.0).view(torch.int32)
    order = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    columns = torch.arange(x.shape[1], device=x.device)
    largest = (order * (_LOW + 1) + (_LOW - columns)).topk(count).values
    ids = _LOW - (largest & _LOW)
    return x.gather(1, ids), ids


def logprob_numbers(x: Tensor, ids: Tensor, tops: Sequence[int]) -> Tensor:
    """Of each row of float32 ``[R, V]``: the logprob of its id, and ids and logprobs of the most probable
    tokens.

    Returns:
        Float64 ``[R * (1 + 2 * most)]`` for ``logprob_entries``.
    """
    unit, parts = weight_unit(x.shape[1]), []
    most = min(max(tops), x.shape[1])
    for start in range(0, len(tops), chunk_rows(x)):
        rows = slice(start, start + chunk_rows(x))
        part = x[rows]
        peak = part.amax(-1, keepdim=True).double()
        log_total = (weights_of(part, peak, 1.0, unit).sum(-1, keepdim=True) / unit).log_()
        own = (part.gather(1, ids[rows].unsqueeze(1)).double() - peak) - log_total
        if most:
            values, best = ranked(part, most)
            own = torch.cat((own, best.double(), (values.double() - peak) - log_total), 1)
        parts.append(own)
    return torch.cat(parts).flatten()


def logprob_entries(numbers: Sequence[float], ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """What ``token_logprobs`` gives, from the numbers of ``logprob_numbers``."""
    width = len(numbers) // len(ids)
    most = (width - 1) // 2
    entries = []
    for row, (token_id, top) in enumerate(zip(ids, tops, strict=True)):
        own, *rest = numbers[row * width : (row + 1) * width]
        best = [(int(i), lp) for i, lp in zip(rest[:most], rest[most:], strict=True) if math.isfinite(lp)]
        entries.append(TokenLogprob(token_id, own, tuple(best[:top])))
    return entries
