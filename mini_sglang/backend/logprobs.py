"""Natural-log probabilities of chosen tokens and of the most probable ones at their places."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.distribution import (
    at_least,
    chunk_rows,
    largest,
    usable,
    weight_unit,
    weights_of,
)
from mini_sglang.types import TokenLogprob

_Tops = list[tuple[tuple[int, float], ...]]


@torch.inference_mode()
def prompt_logprobs(logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
    """Logprobs of the tokens that followed each position of a prompt.

    Args:
        logits: ``[T, V]`` with ``T >= len(targets)``, float32; ``V`` is the vocabulary, without the
            padding of the head. Not changed.
        targets: for each of the first rows, the token that followed, below ``V``.
        top: how many most probable tokens to report beside it.

    Returns:
        One entry per target. A row that is not finite has a NaN logprob and no alternatives.
    """
    if not targets:
        return []
    return token_logprobs(usable(logits[: len(targets)]), targets, [top] * len(targets))


def token_logprobs(x: Tensor, ids: Sequence[int], tops: Sequence[int]) -> list[TokenLogprob]:
    """Logprobs of one token per row.

    Alternatives are by descending logprob, then ascending id; tokens of probability 0 are not among them.

    Args:
        x: ``[R, V]`` float32.
        ids: the token of each row.
        tops: how many alternatives each row wants.
    """
    entries: list[TokenLogprob] = []
    unit = weight_unit(x.shape[1])
    step = chunk_rows(x)
    for start in range(0, len(ids), step):
        part = x[start : start + step]
        wanted = list(tops[start : start + step])
        chosen = torch.tensor(ids[start : start + step], device=x.device).unsqueeze(1)
        peak = part.amax(-1, keepdim=True).double()
        total = weights_of(part, peak, 1.0, unit).sum(-1, keepdim=True)
        log_total = (total / unit).log_()
        # Subtracted in this order a logit's digits are not lost against a large peak.
        own = (part.gather(1, chosen).double() - peak) - log_total
        best = _top_tokens(part, peak, log_total, wanted)
        entries += [
            TokenLogprob(*entry)
            for entry in zip(ids[start : start + step], own[:, 0].tolist(), best, strict=True)
        ]
    return entries


def _top_tokens(x: Tensor, peak: Tensor, log_total: Tensor, wanted: Sequence[int]) -> _Tops:
    """The ``wanted`` most probable tokens of each row of ``x`` as pairs of id and logprob."""
    most = min(max(wanted), x.shape[1])
    if most == 0:
        return [()] * len(wanted)
    # Every tie of the last value is taken and the order made here: topk's ids among equals are undefined.
    rows, ids = at_least(x, largest(x, most)[:, -1:])
    logprobs = (x[rows, ids].double() - peak[rows, 0]) - log_total[rows, 0]
    row_of, id_of, logprob_of = rows.cpu().numpy(), ids.cpu().numpy(), logprobs.cpu().numpy()
    order = np.lexsort((id_of, -logprob_of, row_of))
    order = order[np.isfinite(logprob_of[order])]
    starts = np.searchsorted(row_of[order], np.arange(len(wanted) + 1)).tolist()
    result: _Tops = []
    for row, count in enumerate(wanted):
        picked = order[starts[row] : min(starts[row] + count, starts[row + 1])]
        result.append(tuple(zip(id_of[picked].tolist(), logprob_of[picked].tolist(), strict=True)))
    return result
