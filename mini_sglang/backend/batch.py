"""The explicit context of one step: what runs where, as flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mini_sglang.backend.step import SampleSpec, SequenceStep
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
        samples: (place in the caller's list, output row) of each token to choose; ``specs`` say how.
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
    specs: list[SampleSpec]
    prompts: list[tuple[int, int, int]]

    @classmethod
    def build(cls, steps: Sequence[SequenceStep], limits: Limits, device: torch.device) -> Batch:
        """Flatten ``steps``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``. Nothing has run then.
        """
        # Plain lists where there is one number for each sequence: between two steps, when the weights have
        # driven its code out of the caches, an operator of numpy or torch costs as much as 50 items.
        size = limits.page_size
        counts = [len(step.token_ids) for step in steps]
        if not counts or min(counts) < 1:
            raise InvalidValueError("token_ids", counts, "at least one token for each of at least one step")
        order = [place for place, count in enumerate(counts) if count == 1]
        num_decodes = len(order)
        if num_decodes < len(counts):
            order += [place for place, count in enumerate(counts) if count > 1]
        ordered = [steps[place] for place in order]
        lengths = [counts[place] for place in order]
        starts = [step.start for step in ordered]
        ends = [start + length for start, length in zip(starts, lengths, strict=True)]
        if min(starts) < 0 or max(ends) > limits.context_length:
            allowed = f"from 0 to {limits.context_length}"
            raise InvalidValueError("positions", (min(starts), max(ends)), allowed)
        query_starts = [0, *accumulate(lengths)]
        table = _page_table(ordered, ends, limits)
        rows = _rows(ordered, query_starts, num_decodes, table, limits)
        opened = [
            step.pages[end // size]
            for step, start, end in zip(ordered, starts, ends, strict=True)
            if end % size and start <= end - end % size
        ]
        output_rows, samples, prompts = _outputs(ordered, order, query_starts)
        # One transfer for the three arrays of the step.
        token_ids, positions, slot_mapping = torch.from_numpy(rows).to(device).unbind()
        return cls(
            page_size=size,
            order=order,
            num_decodes=num_decodes,
            token_ids=token_ids,
            positions=positions,
            slot_mapping=slot_mapping,
            query_starts=query_starts,
            seq_lens=ends,
            page_table=table,
            opened_pages=_indices(opened, device) if opened else None,
            output_rows=None if len(output_rows) == query_starts[-1] else _indices(output_rows, device),
            samples=samples,
            specs=[step.sample for step in ordered if step.sample is not None],
            prompts=prompts,
        )


def _page_table(steps: Sequence[SequenceStep], ends: Sequence[int], limits: Limits) -> IntArray:
    needed = [-(-end // limits.page_size) for end in ends]
    width = max(needed)
    rows: list[bytes] = []
    for step, count in zip(steps, needed, strict=True):
        pages = step.pages
        if len(pages) < count:
            raise InvalidValueError("pages", f"{len(pages)} pages", f"at least {count} pages here")
        # Copies: a view of the engine's array would forbid it to append while the view lives.
        rows.append(pages[:count].tobytes())
        if count < width:
            rows.append(pages[:1].tobytes() * (width - count))
    table = np.frombuffer(b"".join(rows), dtype=np.int32)
    _check_below("page", table.view(np.uint32), limits.num_pages)
    return table.astype(np.int64).reshape(len(steps), width)


def _rows(
    steps: Sequence[SequenceStep],
    query_starts: Sequence[int],
    num_decodes: int,
    table: IntArray,
    limits: Limits,
) -> IntArray:
    """Token ids, positions and slots, ``[3, T]``."""
    size = limits.page_size
    rows = np.empty((3, query_starts[-1]), dtype=np.int64)
    decodes = steps[:num_decodes]
    rows[:, :num_decodes] = (
        [step.token_ids[0] for step in decodes],
        [step.start for step in decodes],
        [step.pages[step.start // size] * size + step.start % size for step in decodes],
    )
    for index in range(num_decodes, len(steps)):
        step = steps[index]
        token_ids, positions, slots = rows[:, query_starts[index] : query_starts[index + 1]]
        token_ids[:] = step.token_ids
        positions[:] = np.arange(step.start, step.start + len(positions))
        slots[:] = table[index, positions // size] * size + positions % size
    _check_below("token id", rows[0].view(np.uint64), limits.vocab_size)
    if len(set(rows[2].tolist())) < rows.shape[1]:
        raise InvalidValueError("pages", "shared by two writers", "written by one sequence at a time")
    return rows


def _check_below(name: str, values: npt.NDArray[np.unsignedinteger], limit: int) -> None:
    """``values`` are signed numbers seen as unsigned ones, so that negative ones are above all others."""
    highest = int(values.max())
    if highest >= limit:
        bits = 8 * values.itemsize
        bad = highest - (1 << bits) if highest >> (bits - 1) else highest
        raise InvalidValueError(name, bad, f"from 0 to {limit - 1}")


def _indices(values: list[int], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int64).to(device)


def _outputs(
    steps: Sequence[SequenceStep], order: Sequence[int], query_starts: Sequence[int]
) -> tuple[list[int], list[tuple[int, int]], list[tuple[int, int, int]]]:
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
    return rows, samples, prompts
