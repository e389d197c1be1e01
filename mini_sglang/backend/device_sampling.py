"""The sampler of a device that computes while the host goes on: one copy to the host, at the end of a step.

Everything up to it is put in the device's queue from what the host knows, the requests. Whether a row can be
chosen from at all, and whether the first look at its largest logits was enough, comes back with the ids; for
a row that it was too narrow for there is a wider one, and another copy. It is the same tokens as
``Sampler``'s. Rows that are greedy, or drawn under temperature and min_p alone, are chosen by Triton's
kernels where these may run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mini_sglang.backend.device import to_device
from mini_sglang.backend.device_logprobs import logprob_entries, logprob_numbers, ranked
from mini_sglang.backend.distribution import argmax, chunk_rows, draw_target, take, usable
from mini_sglang.backend.kernels.triton.choosing import COLUMNS, TritonChooser
from mini_sglang.backend.kernels.triton.ranking import TritonRanking
from mini_sglang.backend.penalties import adjust_logits, adjusts
from mini_sglang.backend.plain_rows import PlainRows, Table
from mini_sglang.backend.sampling import (
    WIDE,
    Columns,
    Sampler,
    bad_adjustment,
    bad_logits,
)
from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.types import TokenLogprob


def fetch(numbers: Tensor) -> list[float]:
    """Float64 ``[N]`` on the host: the one place that waits for the device."""
    return numbers.tolist()


def make_sampler(vocab_size: int, device: torch.device, kernels: bool = False) -> Sampler:
    """The sampler for logits on ``device``; ``kernels`` says whether Triton's may run."""
    return DeviceSampler(vocab_size, kernels) if device.type == "cuda" else Sampler(vocab_size)


class DeviceSampler(Sampler):
    """``Sampler`` without a copy to the host but the last.

    Args:
        kernels: whether Triton's may run.
    """

    def __init__(self, vocab_size: int, kernels: bool = False) -> None:
        super().__init__(vocab_size)
        self._chooser = TritonChooser(vocab_size) if kernels else None
        self._ranking = TritonRanking(vocab_size) if kernels else None
        self._rows = PlainRows(vocab_size)

    def plain(self, specs: Sequence[SampleSpec]) -> Table | None:
        """What ``choose`` needs, where it can choose for all rows."""
        return None if self._chooser is None else self._rows.table(specs)

    def sample(self, logits: Tensor, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        table = self.plain(specs)
        if table is None:
            return super().sample(logits, specs)
        self._check(logits, specs)
        return self.choose(logits, table, later=False).results()

    @torch.inference_mode()
    def choose(self, logits: Tensor, table: Table, *, later: bool = True) -> Chosen:
        """Begin to choose for rows of ``logits`` ``[R, V]`` of any floating type, as ``table`` says."""
        assert self._chooser is not None
        device, rows = logits.device, len(logits)
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        numbers = torch.empty((rows, 2), dtype=torch.float64, device=device)
        self._chooser.choose(logits, to_device(torch.from_numpy(table), device), ids, numbers)
        return Chosen(ids, numbers, later=later)

    def _draw_any(self, x: Tensor, columns: Columns) -> Tensor:
        if self._chooser is None:
            return super()._draw_any(x, columns)
        table = x.new_zeros((COLUMNS, len(x)), dtype=torch.float64)
        table[:2] = torch.cat((columns.scale, columns.uniform), 1).t()
        if columns.floor is not None:
            table[2] = columns.floor[:, 0]
        ids = torch.empty(len(x), dtype=torch.int64, device=x.device)
        self._chooser.choose(x, table, ids, x.new_empty((len(x), 2), dtype=torch.float64))
        return ids

    @torch.inference_mode()
    def prompt_logprobs(self, logits: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
        if not targets:
            return []
        x = usable(logits[: len(targets), : self._vocab_size])
        tops = [top] * len(targets)
        return logprob_entries(fetch(logprob_numbers(x, _indices(targets, x), tops)), targets, tops)

    @torch.inference_mode()
    def _sample(self, x: Tensor, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        return Draw(self, x, specs, later=False).results()

    @torch.inference_mode()
    def launch(self, logits: Tensor, specs: Sequence[SampleSpec]) -> Draw:
        """Begin what ``sample`` does; ``Draw.results`` waits for it."""
        return Draw(self, usable(logits[:, : self._vocab_size]), specs, later=True)

    def read(
        self, numbers: Sequence[float], specs: Sequence[SampleSpec], refused: dict[int, str]
    ) -> tuple[list[SequenceResult], list[str | None]]:
        """Results without logprobs, and the error of each row."""
        count = len(specs)
        errors: list[str | None] = []
        for row, spec in enumerate(specs):
            own, adjusted = numbers[2 * count + 2 * row : 2 * count + 2 * row + 2]
            error = None if math.isfinite(own) else bad_logits(own)
            error = error or refused.get(row)
            errors.append(error or (None if math.isfinite(adjusted) else bad_adjustment(adjusted, spec)))
        results = [
            SequenceResult(error=error) if error else SequenceResult(token_id=int(numbers[row]))
            for row, error in enumerate(errors)
        ]
        return results, errors

    def draw_into(
        self,
        ids: Tensor,
        enough: Tensor,
        x: Tensor,
        peak: Tensor,
        specs: Sequence[SampleSpec],
        rows: Sequence[int],
        look: int,
    ) -> None:
        """Draw for ``rows``; put their ids, and whether the look at the largest was wide enough, where they
        go.
        """
        groups: dict[tuple[bool, int], list[int]] = {}
        ranked_rows: list[int] = []
        for row in rows:
            limited, width = self._group(specs[row].params)
            if width and look == 0 and self._ranking is not None:
                ranked_rows.append(row)
                continue
            for _ in range(look):
                width = WIDE if width < WIDE < self._vocab_size else self._vocab_size
            groups.setdefault((limited, width), []).append(row)
        if ranked_rows:
            self._rank_into(ids, enough, x, peak, specs, ranked_rows)
        step = chunk_rows(x)
        for (limited, width), members in groups.items():
            for start in range(0, len(members), step):
                chunk = members[start : start + step]
                part, at = take(x, chunk), _indices(chunk, x)
                columns = self._columns(take(peak, chunk), [specs[row] for row in chunk])
                if not width:
                    # See _draw_of_largest.
                    drawn = self._draw_any(part, columns).clamp_(max=self._vocab_size - 1)
                    ids.index_copy_(0, at, drawn)
                    continue
                total = None if limited else self._weights(part, columns).sum(-1, keepdim=True)
                drawn, wide = self._draw_of_largest(part, replace(columns, total=total), width)
                ids.index_copy_(0, at, drawn)
                enough.index_copy_(0, at, wide.to(enough.dtype))

    def _rank_into(
        self,
        ids: Tensor,
        enough: Tensor,
        x: Tensor,
        peak: Tensor,
        specs: Sequence[SampleSpec],
        rows: Sequence[int],
    ) -> None:
        """What ``draw_into`` does at the first look, for rows under top_k or top_p."""
        assert self._ranking is not None
        columns, at = self._columns(take(peak, rows), [specs[row] for row in rows]), _indices(rows, x)
        floor = torch.zeros_like(columns.peak) if columns.floor is None else columns.floor
        top_k = torch.where(columns.top_k < self._vocab_size, columns.top_k, 0).double()
        table = torch.cat((columns.peak, columns.scale, columns.uniform, top_k, columns.top_p, floor), 1)
        drawn, wide = self._ranking.draw(take(x, rows), table.t().contiguous())
        ids.index_copy_(0, at, drawn)
        enough.index_copy_(0, at, wide.to(enough.dtype))

    def _draw_of_largest(self, x: Tensor, columns: Columns, width: int) -> tuple[Tensor, Tensor]:
        """Draw under top_k or top_p from the ``width`` largest logits: ids ``[R]``, and whether they were
        enough.
        """
        values, ranked_ids = ranked(x, width)
        kept, enough = self._keep(values, columns)
        up_to = kept.cumsum(-1)
        place = torch.searchsorted(up_to, draw_target(columns.uniform, up_to[:, -1:]), right=True)
        # A row that is not finite may point past the end, which a device must not follow.
        ids = ranked_ids.gather(1, place.clamp_(max=width - 1))[:, 0]
        return ids, torch.ones_like(enough[:, 0]) if width == self._vocab_size else enough[:, 0]


class Chosen:
    """Tokens that Triton's kernels are choosing.

    Args:
        ids: ``[R]`` int64 on the device; what follows the step reads them before two more are launched.
        numbers: ``[R, 2]`` float64 on the device, id and largest logit.
        later: whether ``results`` is called when other work was put in the device's queue.
    """

    def __init__(self, ids: Tensor, numbers: Tensor, *, later: bool) -> None:
        self.ids = ids
        self._numbers = numbers.view(-1)
        self._sent = Sent(self._numbers) if later else None

    def results(self) -> list[SequenceResult]:
        """Wait for the device."""
        numbers = fetch(self._numbers) if self._sent is None else self._sent.fetch()
        return [
            SequenceResult(int(token_id)) if math.isfinite(peak) else SequenceResult(error=bad_logits(peak))
            for token_id, peak in zip(numbers[::2], numbers[1::2], strict=True)
        ]


class Draw:
    """Tokens that are being chosen.

    Attributes:
        ids: ``[R]`` int64 on the device, by the first look at the largest logits, which for a row that it was
            too narrow for is not the last.
    """

    def __init__(
        self, sampler: DeviceSampler, x: Tensor, specs: Sequence[SampleSpec], *, later: bool
    ) -> None:
        self._sampler = sampler
        self._specs = specs
        top, peak = argmax(x)
        first_peak = peak
        self._reported = [row for row, spec in enumerate(specs) if spec.params.logprobs]
        self._raw = take(x, self._reported) if self._reported else None
        self._refused: dict[int, str] = {}
        if any(map(adjusts, specs)):
            self._raw = None if self._raw is None else self._raw.clone()
            self._refused = adjust_logits(x, specs)
            top, peak = argmax(x)
        self._x, self._peak = x, peak
        self.ids, self._enough = top.clone(), torch.ones_like(peak[:, 0])
        self._peaks = torch.cat((first_peak, peak), 1).double()
        self._tops = [specs[row].params.top_logprobs for row in self._reported]
        self._left = [row for row, spec in enumerate(specs) if not spec.params.greedy]
        self._first = self._look(0)
        self._sent = Sent(self._first) if later else None

    def _look(self, look: int) -> Tensor:
        """Draw the rows that are left; gives all that the host wants to know."""
        self._sampler.draw_into(self.ids, self._enough, self._x, self._peak, self._specs, self._left, look)
        columns = [self.ids.double(), self._enough.double(), self._peaks.flatten()]
        if self._raw is not None:
            chosen = self.ids[_indices(self._reported, self._x)]
            columns.append(logprob_numbers(self._raw, chosen, self._tops))
        return torch.cat(columns)

    @torch.inference_mode()
    def results(self) -> list[SequenceResult]:
        """Wait for the device, and look again where that is needed. To be called once."""
        specs, left = self._specs, self._left
        numbers = fetch(self._first) if self._sent is None else self._sent.fetch()
        first = numbers
        for look in range(1, 4):
            short = {row for row in left if not numbers[len(specs) + row]}
            found, kept = self._sampler.read(numbers, specs, self._refused)
            left = [row for row in left if row in short and kept[row] is None]
            if not left or look == 3:
                break
            # What a later step took for the tokens stays as it was.
            self.ids, self._left = self.ids.clone(), left
            numbers = fetch(self._look(look))
        if self._reported:
            chosen = [int(numbers[row]) for row in self._reported]
            entries = logprob_entries(numbers[4 * len(specs) :], chosen, self._tops)
            for row, entry in zip(self._reported, entries, strict=True):
                if kept[row] is None:
                    found[row].logprob = entry
        if self._sent is not None and numbers is not first:
            for row, result in enumerate(found):
                result.revised = result.token_id is not None and result.token_id != int(first[row])
        return found


class Sent:
    """Numbers on their way to the host, as they are when the device comes to this."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if numbers.device.type == "cuda":
            self._numbers = torch.empty_like(numbers, device="cpu", pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._event = torch.cuda.current_stream(numbers.device).record_event()
        else:
            self._numbers = numbers.clone()

    def fetch(self) -> list[float]:
        """The numbers, once they are here."""
        if self._event is not None:
            self._event.synchronize()
        return fetch(self._numbers)


def _indices(rows: Sequence[int], like: Tensor) -> Tensor:
    return to_device(torch.tensor(rows), like.device)
