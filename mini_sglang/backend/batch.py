"""The explicit context of one step: what runs where, as flat arrays."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from mini_sglang.backend.device import to_device
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


@dataclass(frozen=True, slots=True)
class Followed:
    """Tokens that an earlier step chose and the host does not know.

    Attributes:
        places: of the sequences of one token that they are the token of, in the caller's list.
        ids: int64 on the device.
        rows: where in ``ids`` each lies; None is one after the other.
    """

    places: list[int]
    ids: Tensor
    rows: list[int] | None = None


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
        samples: (place in the caller's list, output row) of each token to choose; ``specs`` say how. A
            sequence with drafts has several, in order, and ``drafts`` is then true.
        prompts: (place in the caller's list, first output row, last + 1) of each run of prompt logprobs.
        adapters: ``[S]``, the adapter of each sequence, 0 for none; None where no sequence has one. Those of
            one adapter stand together.
        followed: what ``fill`` puts in.
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
    drafts: bool
    adapters: list[int] | None = None
    followed: Followed | None = None

    def fill(self, token_ids: Tensor) -> None:
        """Put the tokens of ``followed`` in their rows of ``token_ids``, ``[T]`` or longer, on the device."""
        if self.followed is None:
            return
        ids, device = self.followed.ids, token_ids.device
        if self.followed.rows is not None:
            ids = ids.index_select(0, to_device(torch.tensor(self.followed.rows), device))
        token_ids.index_copy_(0, to_device(torch.tensor(self.followed_rows()), device), ids)

    def followed_rows(self) -> list[int]:
        """The rows that the tokens of ``followed`` go to."""
        assert self.followed is not None
        row = {place: row for row, place in enumerate(self.order[: self.num_decodes])}
        return [row[place] for place in self.followed.places]

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors, which are on the host, on ``device``, in one transfer."""
        if device.type == "cpu":
            return self
        parts = [self.token_ids, self.positions, self.slot_mapping]
        others = (self.opened_pages, self.output_rows)
        parts += [indices for indices in others if indices is not None]
        sizes = [len(part) for part in parts]
        sent = iter(torch.split_with_sizes(to_device(torch.cat(parts), device), sizes))
        return replace(
            self,
            token_ids=next(sent),
            positions=next(sent),
            slot_mapping=next(sent),
            opened_pages=None if self.opened_pages is None else next(sent),
            output_rows=None if self.output_rows is None else next(sent),
        )

    @classmethod
    def build(cls, steps: Sequence[SequenceStep], limits: Limits, device: torch.device) -> Batch:
        """Flatten ``steps``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``. Nothing has run then.
        """
        # In lists: between two steps, when the weights have driven their code out of the caches, an operator
        # of numpy or torch costs as much as a hundred items of a list.
        size = limits.page_size
        counts = [len(step.token_ids) for step in steps]
        if not counts or min(counts) < 1:
            raise InvalidValueError("token_ids", counts, "at least one token for each of at least one step")
        order = [place for place, count in enumerate(counts) if count == 1]
        num_decodes = len(order)
        if num_decodes < len(counts):
            order += [place for place, count in enumerate(counts) if count > 1]
        adapters = None
        if any(step.adapter for step in steps):
            order.sort(key=lambda place: (counts[place] > 1, steps[place].adapter))
            adapters = [steps[place].adapter for place in order]
        ordered = [steps[place] for place in order]
        starts = [step.start for step in ordered]
        ends = [steps[place].start + counts[place] for place in order]
        if min(starts) < 0 or max(ends) > limits.context_length:
            allowed = f"from 0 to {limits.context_length}"
            raise InvalidValueError("positions", (min(starts), max(ends)), allowed)
        table = _page_table(ordered, ends, limits)

        token_ids = [step.token_ids[0] for step in ordered[:num_decodes]]
        positions = starts[:num_decodes]
        slots = [step.pages[step.start // size] * size + step.start % size for step in ordered[:num_decodes]]
        for step, end in zip(ordered[num_decodes:], ends[num_decodes:], strict=True):
            token_ids += step.token_ids
            positions += range(step.start, end)
            slots += _slots(step.pages, step.start, end, size)
        if min(token_ids) < 0 or max(token_ids) >= limits.vocab_size:
            bad = min(token_ids) if min(token_ids) < 0 else max(token_ids)
            raise InvalidValueError("token id", bad, f"from 0 to {limits.vocab_size - 1}")
        if len(set(slots)) < len(slots):
            raise InvalidValueError("pages", "shared by two writers", "written by one sequence at a time")
        opened = [
            step.pages[end // size]
            for step, start, end in zip(ordered, starts, ends, strict=True)
            if end % size and start <= end - end % size
        ]
        query_starts = [0, *accumulate([counts[place] for place in order])]
        output_rows, samples, prompts = _outputs(ordered, order, query_starts)
        specs = [step.sample for step in ordered if step.sample is not None]
        drafts = len(samples) > len(specs)
        if drafts:
            sampled = [step for step in ordered if step.sample is not None]
            pairs = zip(specs, sampled, strict=True)
            specs = [spec for first, step in pairs for spec in (first, *step.draft_samples)]
        on_device = _tensors(token_ids, positions, slots, device)
        return cls(
            page_size=size,
            order=order,
            num_decodes=num_decodes,
            token_ids=on_device[0],
            positions=on_device[1],
            slot_mapping=on_device[2],
            query_starts=query_starts,
            seq_lens=ends,
            page_table=table,
            opened_pages=_indices(opened, device) if opened else None,
            output_rows=None if len(output_rows) == len(slots) else _indices(output_rows, device),
            samples=samples,
            specs=specs,
            prompts=prompts,
            drafts=drafts,
            adapters=adapters,
        )


def _page_table(steps: Sequence[SequenceStep], ends: Sequence[int], limits: Limits) -> IntArray:
    needed = [-(-end // limits.page_size) for end in ends]
    width = max(needed)
    rows: list[array[int]] = []
    for step, count in zip(steps, needed, strict=True):
        pages = step.pages
        if len(pages) < count:
            raise InvalidValueError("pages", f"{len(pages)} pages", f"at least {count} pages here")
        # A copy: a view of the engine's array would forbid it to append while the view lives.
        rows.append(pages[:count] + pages[:1] * (width - count))
    # As unsigned numbers, of which negative ones are the largest.
    table = array("I", b"".join(rows))
    if max(table) >= limits.num_pages:
        bad = next(page for row in rows for page in row if not 0 <= page < limits.num_pages)
        raise InvalidValueError("page", bad, f"from 0 to {limits.num_pages - 1}")
    return np.frombuffer(table, dtype=np.uint32).astype(np.int64).reshape(len(steps), width)


def _slots(pages: array[int], start: int, end: int, page_size: int) -> Iterator[int]:
    """Where positions ``start`` to ``end`` lie."""
    for page in range(start // page_size, -(-end // page_size)):
        first = page * page_size
        offset = pages[page] * page_size - first
        yield from range(max(start, first) + offset, min(end, first + page_size) + offset)


def _tensors(
    token_ids: list[int], positions: list[int], slots: list[int], device: torch.device
) -> Sequence[Tensor]:
    numbers, length = array("q", token_ids + positions + slots), len(slots)
    if device.type != "cpu":
        # One transfer for the three arrays of the step.
        return to_device(torch.frombuffer(numbers, dtype=torch.int64), device).view(3, length).unbind()
    starts = (0, 8 * length, 16 * length)
    return [torch.frombuffer(numbers, dtype=torch.int64, count=length, offset=start) for start in starts]


def _indices(values: list[int], device: torch.device) -> Tensor:
    return to_device(torch.tensor(values, dtype=torch.int64), device)


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
        if step.draft_samples:
            drafts = len(step.draft_samples)
            if wanted or step.sample is None or drafts >= stop - first:
                allowed = f"fewer than the {stop - first} tokens, with sample, without prompt_targets"
                raise InvalidValueError("draft_samples", f"{drafts} drafts", allowed)
            for row in range(stop - 1 - drafts, stop):
                samples.append((place, len(rows)))
                rows.append(row)
        elif step.sample is not None:
            if wanted < stop - first:
                rows.append(stop - 1)
            samples.append((place, len(rows) - 1))
    return rows, samples, prompts
