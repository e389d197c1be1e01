"""The explicit context of one step: what runs where, as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mini_sglang.backend.step import SequenceStep
from mini_sglang.errors import InvalidValueError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Limits:
    """What a step is checked against."""

    page_size: int
    num_pages: int
    vocab_size: int
    context_length: int


@dataclass(slots=True)
class Batch:
    """S sequences with T tokens in all, flattened: sequences of one token (decodes) first.

    Attributes:
        order: ``order[i]`` is the place of sequence i in the caller's list.
        num_decodes: how many of the sequences have one token.
        token_ids, positions, slot_mapping: ``[T]`` int64 on the device; a slot is
            ``page * page_size + offset``.
        query_starts: ``[S + 1]``, sequence i has rows ``query_starts[i]`` to ``query_starts[i + 1]``.
        seq_lens: ``[S]``, positions of sequence i after this step.
        page_table: ``[S, P]``; places past a sequence's own pages repeat its first page.
        opened_pages: pages whose first slot is written in this step and whose last is not.
        output_rows: ``[R]`` int64, the rows whose hidden state is needed; ``None`` is all of them.
        samples: (place in the caller's list, output row) of each token to choose.
        prompts: (place in the caller's list, first output row, last + 1) of each run of prompt logprobs.
    """

    page_size: int
    order: list[int]
    num_decodes: int
    token_ids: Tensor
    positions: Tensor
    slot_mapping: Tensor
    query_starts: list[int]
    seq_lens: list[int]
    page_table: IntArray
    opened_pages: Tensor | None
    output_rows: Tensor | None
    samples: list[tuple[int, int]]
    prompts: list[tuple[int, int, int]]

    @classmethod
    def build(cls, steps: Sequence[SequenceStep], limits: Limits, device: torch.device) -> Batch:
        """Flatten ``steps``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``. Nothing has run then.
        """
        counts = [len(step.token_ids) for step in steps]
        if not counts or min(counts) < 1:
            raise InvalidValueError("token_ids", counts, "at least one token for each of at least one step")
        order = sorted(range(len(steps)), key=lambda i: counts[i] > 1)
        ordered = [steps[i] for i in order]
        lengths = np.array([counts[i] for i in order], dtype=np.int64)
        starts = np.array([step.start for step in ordered], dtype=np.int64)
        ends = starts + lengths
        if starts.min() < 0 or ends.max() > limits.context_length:
            raise InvalidValueError(
                "positions", (int(starts.min()), int(ends.max())), f"from 0 to {limits.context_length}"
            )
        query_starts = np.concatenate(([0], np.cumsum(lengths)))
        flat = np.empty((3, int(query_starts[-1])), dtype=np.int64)
        token_ids, positions, slots = flat
        token_ids[:] = np.fromiter(
            chain.from_iterable(step.token_ids for step in ordered), dtype=np.int64, count=len(token_ids)
        )
        if token_ids.min() < 0 or token_ids.max() >= limits.vocab_size:
            bad = token_ids.min() if token_ids.min() < 0 else token_ids.max()
            raise InvalidValueError("token id", int(bad), f"from 0 to {limits.vocab_size - 1}")
        sequence = np.repeat(np.arange(len(ordered)), lengths)
        positions[:] = np.arange(len(positions)) - (query_starts[:-1] - starts)[sequence]
        table = _page_table(ordered, ends, limits)
        page_of_row = table[sequence, positions // limits.page_size]
        slots[:] = page_of_row * limits.page_size + positions % limits.page_size
        if (np.diff(np.sort(slots)) == 0).any():
            raise InvalidValueError("pages", "shared by two writers", "written by one sequence at a time")
        opened = _opened_pages(table, starts, ends, limits.page_size)
        output_rows, samples, prompts = _outputs(ordered, order, query_starts.tolist())
        rows = None if len(output_rows) == len(slots) else torch.from_numpy(output_rows).to(device)
        # One transfer for the three arrays of the step.
        on_device = torch.from_numpy(flat).to(device)
        return cls(
            page_size=limits.page_size,
            order=order,
            num_decodes=int((lengths == 1).sum()),
            token_ids=on_device[0],
            positions=on_device[1],
            slot_mapping=on_device[2],
            query_starts=query_starts.tolist(),
            seq_lens=ends.tolist(),
            page_table=table,
            opened_pages=torch.from_numpy(opened).to(device) if len(opened) else None,
            output_rows=rows,
            samples=samples,
            prompts=prompts,
        )


def _page_table(steps: Sequence[SequenceStep], ends: IntArray, limits: Limits) -> IntArray:
    needed = -(-ends // limits.page_size)
    table = np.empty((len(steps), int(needed.max())), dtype=np.int64)
    for row, step, count in zip(table, steps, needed.tolist(), strict=True):
        if len(step.pages) < count:
            raise InvalidValueError("pages", f"{len(step.pages)} pages", f"at least {count} pages here")
        # The slice copies: a view of the engine's array would forbid it to append while the view lives.
        pages = np.frombuffer(step.pages[:count], dtype=np.int32)
        row[:count] = pages
        row[count:] = pages[0]
    if table.min() < 0 or table.max() >= limits.num_pages:
        bad = table.min() if table.min() < 0 else table.max()
        raise InvalidValueError("page", int(bad), f"from 0 to {limits.num_pages - 1}")
    return table


def _opened_pages(table: IntArray, starts: IntArray, ends: IntArray, page_size: int) -> IntArray:
    last = (ends - 1) // page_size
    opened = (starts <= last * page_size) & (ends % page_size != 0)
    rows = np.flatnonzero(opened)
    return table[rows, last[rows]]


def _outputs(
    steps: Sequence[SequenceStep], order: Sequence[int], query_starts: Sequence[int]
) -> tuple[IntArray, list[tuple[int, int]], list[tuple[int, int, int]]]:
    rows: list[int] = []
    samples: list[tuple[int, int]] = []
    prompts: list[tuple[int, int, int]] = []
    for place, step, first, stop in zip(order, steps, query_starts, query_starts[1:], strict=False):
        wanted = len(step.prompt_targets)
        if wanted > stop - first:
            raise InvalidValueError("prompt_targets", wanted, f"at most one per token, {stop - first}")
        if wanted:
            prompts.append((place, len(rows), len(rows) + wanted))
            rows.extend(range(first, first + wanted))
        if step.sample is not None:
            if wanted < stop - first:
                rows.append(stop - 1)
            samples.append((place, len(rows) - 1))
    return np.array(rows, dtype=np.int64), samples, prompts
