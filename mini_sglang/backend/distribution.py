"""Probabilities of rows of logits as whole numbers, and order statistics, exact on any device.

A weight is a probability relative to the row's most probable token, times ``weight_unit``, rounded to a
whole number and held in float64. A row's total stays within 2**53, so sums and cumulative sums of weights
are exact: the order in which a device adds them, which changes with the shape of a batch, cannot show.

Rows here are finite at their peak: no NaN, no +inf, not -inf throughout, unless a function says otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.device import to_device

# Logits handled at once: a chunk's float64 temporaries stay in a CPU's cache, and modest on a GPU.
_CHUNK_CPU, _CHUNK_GPU = 1 << 19, 1 << 24


def usable(logits: Tensor) -> Tensor:
    """``logits`` as float32, on a device that has float64 (Apple's GPUs have not)."""
    if logits.device.type not in ("cpu", "cuda"):
        logits = logits.cpu()
    return logits.detach().float()


def chunk_rows(x: Tensor) -> int:
    """How many rows of ``x`` ``[R, V]`` to handle at once."""
    budget = _CHUNK_CPU if x.device.type == "cpu" else _CHUNK_GPU
    return max(1, budget // x.shape[1])


def take(x: Tensor, rows: Sequence[int]) -> Tensor:
    """Rows of ``x`` by ascending index, at least one: a view where they are neighbours, else a copy."""
    if rows[-1] - rows[0] == len(rows) - 1:
        return x[rows[0] : rows[-1] + 1]
    return x[to_device(torch.tensor(rows), x.device)]


def weight_unit(vocab_size: int) -> float:
    """The weight of the most probable token: the largest power of two whose total fits 2**53."""
    return 2.0 ** (53 - (vocab_size - 1).bit_length())


def weights_of(values: Tensor, peak: Tensor, scale: Tensor | float, unit: float) -> Tensor:
    """Weights of logits.

    Args:
        values: ``[R, K]`` float32, some or all of each row's logits.
        peak: ``[R, 1]`` float64, the largest logit of each row.
        scale: ``[R, 1]`` float64, one over the temperature.
        unit: ``weight_unit`` of the whole vocabulary.

    Returns:
        ``[R, K]`` float64, whole numbers from 0 to ``unit``.
    """
    # exp and not exp2: torch computes exp2 of the last few elements of an array by another routine, which
    # differs in the last bit, so that a weight would depend on its place in the batch.
    return values.double().sub_(peak).mul_(scale).exp_().mul_(unit).round_()


def argmax(x: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest index of each row's largest value ``[R]`` int64, and that value ``[R, 1]``; NaN counts as
    largest. Any rows."""
    # numpy's is vectorised on every CPU; torch's takes ten times as long.
    top = torch.from_numpy(x.numpy().argmax(-1)) if x.device.type == "cpu" else x.argmax(-1)
    return top, x.gather(1, top.unsqueeze(1))


def argmax_items(logits: Tensor) -> list[tuple[int, float]]:
    """What ``argmax`` says of each row of ``logits``, of any type: index and value."""
    if not logits.is_cpu or logits.dtype != torch.float32:
        top, peak = argmax(usable(logits))
        # Together, since each copy waits for the device.
        ids, peaks = torch.stack((top.double(), peak[:, 0].double())).tolist()
        return list(zip(map(int, ids), peaks, strict=True))
    # One operator of torch: most steps come here, where each costs as much as dozens of items of a list.
    values = logits.numpy()
    return [(index, values.item(row, index)) for row, index in enumerate(values.argmax(-1).tolist())]


def largest(x: Tensor, count: int) -> Tensor:
    """The ``count`` largest values of each row, descending, ``[R, count]``. Any rows."""
    if x.device.type != "cpu":
        return x.topk(count).values
    values = x.numpy()
    if count < x.shape[1]:
        values = np.partition(values, x.shape[1] - count, axis=-1)[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, ::-1].copy())


def nth_equal(x: Tensor, value: Tensor, nth: Tensor) -> Tensor:
    """Index of the ``nth`` (from 0, ``[R]`` int64) element of each row that equals ``value`` ``[R, 1]``.

    Returns:
        ``[R]`` int64. Each row must have that many such elements.
    """
    if x.device.type == "cpu":
        hits = torch.from_numpy(np.flatnonzero(x.numpy() == value.numpy()))
    else:
        hits = (x == value).flatten().nonzero()[:, 0]
    starts = torch.arange(x.shape[0], device=x.device) * x.shape[1]
    return hits[torch.searchsorted(hits, starts) + nth] - starts


def at_least(x: Tensor, floor: Tensor) -> tuple[Tensor, Tensor]:
    """Rows and columns, row by row in ascending order, of the elements ``>= floor`` ``[R, 1]``. Any rows."""
    if x.device.type == "cpu":
        hits = torch.from_numpy(np.flatnonzero(x.numpy() >= floor.numpy()))
    else:
        hits = (x >= floor).flatten().nonzero()[:, 0]
    return hits // x.shape[1], hits % x.shape[1]


def draw_target(uniform: Tensor, total: Tensor) -> Tensor:
    """The whole number in ``[0, total)`` for ``uniform`` in ``[0, 1)``, all ``[R, 1]`` float64.

    The token is the first whose cumulative weight is above it; one of weight 0 never is.
    """
    # Below the total even after rounding: 1 - 2**-53, the largest uniform, gives the float before it.
    return (uniform * total).floor_()
