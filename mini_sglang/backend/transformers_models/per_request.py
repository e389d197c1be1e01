"""The backend of models that our pages cannot hold: one cache per request, decodes together if they can."""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mini_sglang.backend.memory import give_back, says_out_of_memory
from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.backend.transformers_models.caches import Past, stack, take
from mini_sglang.backend.transformers_models.decoder import TransformersConfig
from mini_sglang.backend.transformers_models.runner import Abilities, Runner
from mini_sglang.backend.transformers_models.steps import OwnCacheBackend, check_steps
from mini_sglang.types import TokenLogprob

# Rows of prompt logprobs at a time, as in ``ModelBackend``.
_LOGPROB_ROWS = 128
# Shorter sequences than this are padded to one length without a thought.
_SHORT = 256


@dataclass(slots=True, eq=False)
class _Live:
    """A sequence. ``pages`` are those that stand for it; the first names it."""

    pages: array[int]
    length: int
    batch: _Together


@dataclass(slots=True, eq=False)
class _Together:
    """Sequences whose caches are one object, in the order of its rows."""

    members: list[_Live | None]
    past: Past


class RequestBackend(OwnCacheBackend):
    """Implements ``Backend`` without a pool: a page stands for memory that a sequence's cache takes.

    A sequence that starts at position 0 gets a fresh cache, and one whose page another one comes to hold has
    lost its own. Nothing is shared between sequences.

    Not thread-safe: one thread calls ``run``.

    Args:
        runner: of the model.
        abilities: of its caches.
        num_pages, page_size: how many tokens the sequences may have together, in what portions.
        about: what ``describe`` adds.
    """

    def __init__(
        self,
        runner: Runner,
        abilities: Abilities,
        config: TransformersConfig,
        num_pages: int,
        page_size: int,
        about: Mapping[str, str | int],
    ) -> None:
        self._runner = runner
        self._abilities = abilities
        super().__init__(config, num_pages, page_size, about)
        self._owners: dict[int, _Live] = {}

    @property
    def chunks_prompts(self) -> bool:
        """Whether a prompt can be run in several steps."""
        return not self._abilities.no_chunks

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
        return {
            **super().describe(),
            "kv_bytes_per_token": self._abilities.token_bytes,
            "state_bytes": self._abilities.fixed_bytes,
            "prefix_reuse": "off: one cache per request",
            "chunked_prefill": _yes_or("off", self._abilities.no_chunks),
            "batched_decode": _yes_or("one by one", self._abilities.no_stacks),
        }

    @says_out_of_memory(past_lost=True)
    @torch.inference_mode()
    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        """See ``Backend.run``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``; nothing has run.
        """
        check_steps(steps, self, self._reached)
        lives = [self._claim(step) for step in steps]
        try:
            return self._run(steps, lives)
        except BaseException:
            # What the caches hold of these steps' tokens is not known.
            for live in lives:
                self._drop(live)
            raise

    def free_memory(self) -> None:
        """See ``Backend``."""
        give_back(self._runner.model.device)

    def _run(self, steps: Sequence[SequenceStep], lives: list[_Live]) -> list[SequenceResult]:
        results = [SequenceResult() for _ in steps]
        last: dict[int, Tensor] = {}
        batches: dict[int, list[int]] = {}
        for place, (step, live) in enumerate(zip(steps, lives, strict=True)):
            if live.length and len(step.token_ids) == 1 and not self._abilities.no_stacks:
                batches.setdefault(self._size_class(live.length), []).append(place)
                continue
            self._bring_together([live])
            logits = self._forward_alone(step, live)
            last[place] = logits[-1]
            results[place].prompt_logprobs = self._prompt_logprobs(logits, step)
        for places in batches.values():
            members = [lives[place] for place in places]
            batch = self._bring_together(members)
            starts = [live.length for live in members]
            ids = [steps[place].token_ids for place in places]
            rows, batch.past = self._runner.forward(ids, starts, batch.past)
            for place, live, row in zip(places, members, rows, strict=True):
                live.length += 1
                last[place] = row[-1]
                results[place].prompt_logprobs = self._prompt_logprobs(row, steps[place])
        self._sample(steps, last, results)
        return results

    def _forward_alone(self, step: SequenceStep, live: _Live) -> Tensor:
        """Run a chunk, or a decode by itself: logits ``[T or 1, vocab_size]``."""
        every_row = bool(step.prompt_targets)
        ids = [[token] for token in step.token_ids]
        if not live.length or not self._abilities.no_chunks:
            ids = [list(step.token_ids)]
        rows: list[Tensor] = []
        for part in ids:
            logits, live.batch.past = self._runner.forward([part], [live.length], live.batch.past, every_row)
            live.length += len(part)
            rows.append(logits[0])
        return torch.cat(rows)

    def _sample(
        self, steps: Sequence[SequenceStep], last: Mapping[int, Tensor], results: list[SequenceResult]
    ) -> None:
        places = [place for place, step in enumerate(steps) if step.sample is not None]
        if not places:
            return
        specs = [sample for place in places if (sample := steps[place].sample) is not None]
        chosen = self._sampler.sample(torch.stack([last[place] for place in places]), specs)
        for place, result in zip(places, chosen, strict=True):
            result.prompt_logprobs = results[place].prompt_logprobs
            results[place] = result

    def _prompt_logprobs(self, logits: Tensor, step: SequenceStep) -> list[TokenLogprob]:
        logprobs: list[TokenLogprob] = []
        targets = step.prompt_targets
        for first in range(0, len(targets), _LOGPROB_ROWS):
            rows = slice(first, min(first + _LOGPROB_ROWS, len(targets)))
            logprobs += self._sampler.prompt_logprobs(logits[rows], targets[rows], step.prompt_top)
        return logprobs

    def _size_class(self, length: int) -> int:
        """Sequences of one class are at most twice as long as each other, so that padding is bounded."""
        return max(length, _SHORT).bit_length() if self._abilities.token_bytes else 0

    # Whose cache is where

    def _reached(self, step: SequenceStep) -> int | None:
        """Positions that the cache of ``step``'s sequence holds; ``None`` where it has none."""
        live = self._owners.get(step.pages[0])
        return None if live is None or live.pages[0] != step.pages[0] else live.length

    def _claim(self, step: SequenceStep) -> _Live:
        """The sequence of a step, holding the step's pages."""
        pages = step.pages[: -(-(step.start + len(step.token_ids)) // self._page_size)]
        live = self._owners.get(pages[0])
        if live is None or not step.start:
            live = _Live(pages, 0, _Together([None], self._runner.kind.fresh()))
            live.batch.members[0] = live
        for page in pages:
            owner = self._owners.get(page)
            if owner is not None and owner is not live:
                self._drop(owner)
            self._owners[page] = live
        live.pages = pages
        return live

    def _drop(self, live: _Live) -> None:
        for page in live.pages:
            if self._owners.get(page) is live:
                del self._owners[page]
        batch = live.batch
        batch.members = [None if member is live else member for member in batch.members]

    def _bring_together(self, members: list[_Live]) -> _Together:
        """One batch of exactly these sequences, in this order; others that were with them get their own."""
        before = members[0].batch
        if before.members == members:
            return before
        left = {id(live.batch): live.batch for live in members}
        pasts = [self._alone(live) for live in members]
        others = [(live, self._alone(live)) for batch in left.values() for live in _rest(batch, members)]
        together = _Together([*members], stack(pasts, [live.length for live in members]))
        for live in members:
            live.batch = together
        for live, past in others:
            live.batch = _Together([live], past)
        return together

    @staticmethod
    def _alone(live: _Live) -> Past:
        batch = live.batch
        if len(batch.members) == 1:
            return batch.past
        past: Past = take(batch.past, batch.members.index(live), live.length)
        return past


def _rest(batch: _Together, members: list[_Live]) -> list[_Live]:
    return [live for live in batch.members if live is not None and live not in members]


def _yes_or(otherwise: str, reason: str) -> str:
    return f"{otherwise}: {reason}" if reason else "on"
