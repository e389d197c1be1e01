"""A small model that guesses the tokens of a large one: a second backend with pages of its own."""

from __future__ import annotations

import logging
import time
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from mini_sglang.backend.step import Backend, SequenceStep
from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.request import Phase, Request
from mini_sglang.types import SamplingParams

logger = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class _Held:
    """A request's KV in the draft model: of ``num_computed`` tokens of the request and of ``guessed``
    behind them, of which some may have been right."""

    params: SamplingParams
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_computed: int = 0
    guessed: list[int] = field(default_factory=list)


class DraftModel:
    """Runs some tokens ahead of the engine. It draws as the engine will, so that the same logits would
    give the same tokens.

    Prompts are computed ``chunk_tokens`` at a time, one piece a step, before the first guess. A failure
    ends the guessing, not a request.

    Args:
        backend: its ids mean what the large model's mean.
        vocab_size: the large model's.

    Attributes:
        cost: seconds that a guess takes, of all requests together; None before the first.
    """

    def __init__(self, backend: Backend, vocab_size: int, chunk_tokens: int) -> None:
        self._backend = backend
        self._vocab_size = vocab_size
        self._chunk_tokens = chunk_tokens
        self._allocator = PageAllocator(backend.num_pages)
        self._held: dict[Request, _Held] = {}
        self._failed = False
        self.cost: float | None = None

    def draft(self, wanted: Sequence[Drafts]) -> None:
        """Fill each of ``wanted`` up to its limit, as far as the model can say."""
        if self._failed:
            return
        try:
            self._draft(wanted)
        except Exception:
            logger.exception("the draft model failed; from now on it guesses nothing")
            self._failed = True

    def release(self, request: Request) -> None:
        """Give back the pages of a request that has ended."""
        held = self._held.pop(request, None)
        if held is not None:
            self._allocator.free(held.pages)

    def check(self) -> None:
        """Raises AssertionError where a page is lost or has two owners."""
        pages = [*self._allocator.free_pages(), *(p for held in self._held.values() for p in held.pages)]
        assert len(pages) == len(set(pages)) == self._backend.num_pages, "a page of the draft model is lost"

    def _draft(self, wanted: Sequence[Drafts]) -> None:
        steps: list[SequenceStep] = []
        live: list[tuple[Drafts, _Held]] = []
        for drafts in wanted:
            held = self._take_up(drafts)
            if held is None:
                continue
            tokens = drafts.request.tokens
            due = tokens[held.num_computed : held.num_computed + self._chunk_tokens]
            step = SequenceStep(due, held.num_computed, held.pages)
            held.num_computed += len(due)
            steps.append(step)
            if held.num_computed == len(tokens):
                step.sample = replace(drafts.request.sample_spec(), params=held.params)
            live.append((drafts, held))
        while steps:
            started = time.perf_counter()
            results = self._backend.run(steps)
            if all(len(step.token_ids) == 1 for step in steps):
                seconds = time.perf_counter() - started
                # A stall says nothing of the model.
                self.cost = (
                    seconds if self.cost is None else 0.9 * self.cost + 0.1 * min(seconds, 3 * self.cost)
                )
            following: list[SequenceStep] = []
            going_on: list[tuple[Drafts, _Held]] = []
            for (drafts, held), result in zip(live, results, strict=True):
                token = result.token_id
                if token is None or token >= self._vocab_size or not drafts.add(token):
                    continue
                if len(drafts.tokens) == drafts.limit:
                    continue
                start = held.num_computed + len(held.guessed)
                held.guessed.append(token)
                sample = replace(drafts.samples[-1], params=held.params)
                following.append(SequenceStep([token], start, held.pages, sample))
                going_on.append((drafts, held))
            steps, live = following, going_on

    def _take_up(self, drafts: Drafts) -> _Held | None:
        """The KV of a request up to where it and the guesses agree, with pages for what comes."""
        request = drafts.request
        tokens = request.tokens
        held = self._held.get(request)
        if held is None:
            params = replace(request.params, logprobs=False, top_logprobs=0, prompt_logprobs=False)
            held = self._held[request] = _Held(params)
        for token in held.guessed:
            if held.num_computed >= len(tokens) - 1 or tokens[held.num_computed] != token:
                break
            held.num_computed += 1
        held.guessed.clear()
        due = tokens[held.num_computed :]
        room = self._backend.context_length - len(tokens)
        drafts.limit = min(drafts.limit, room)
        if drafts.limit < 1 or max(due) >= self._backend.vocab_size:
            return None
        size = self._backend.page_size
        missing = -(-(len(tokens) + drafts.limit) // size) - len(held.pages)
        if missing > self._allocator.num_free:
            # Those who wait or were never guessed at again may hold some.
            for other in [other for other in self._held if other.phase is not Phase.RUNNING]:
                self.release(other)
            if missing > self._allocator.num_free:
                return None
        held.pages.extend(self._allocator.allocate(max(0, missing)))
        return held
