"""Which rows of a step have which adapter."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from mini_sglang.backend.batch import Batch

Run = tuple[int, int, int]
"""First row, last + 1, slot."""


def runs_of(batch: Batch) -> list[Run]:
    """The runs of rows with an adapter, in order; its id less one is its slot."""
    assert batch.adapters is not None
    runs: list[Run] = []
    for adapter, first, stop in zip(batch.adapters, batch.query_starts, batch.query_starts[1:], strict=False):
        if runs and runs[-1][1] == first and runs[-1][2] == adapter - 1:
            runs[-1] = (runs[-1][0], stop, adapter - 1)
        elif adapter:
            runs.append((first, stop, adapter - 1))
    return runs


def narrowed(runs: Sequence[Run], rows: Tensor | None) -> list[Run]:
    """The runs among the chosen ``rows`` ``[R]``, in rising order, counted anew; None is all of them."""
    if rows is None:
        return list(runs)
    slots: list[int] = []
    at = 0
    for row in rows.tolist():
        while at < len(runs) and runs[at][1] <= row:
            at += 1
        slots.append(runs[at][2] if at < len(runs) and runs[at][0] <= row else -1)
    found: list[Run] = []
    first = 0
    for slot, group in groupby(slots):
        stop = first + len(list(group))
        if slot >= 0:
            found.append((first, stop, slot))
        first = stop
    return found
