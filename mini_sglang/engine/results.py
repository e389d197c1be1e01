"""What a step's results are to its requests: tokens appended, KV published, events for whoever waits."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Protocol

from mini_sglang.backend.step import SequenceResult
from mini_sglang.engine.counters import EngineCounters
from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Request
from mini_sglang.engine.scheduler import Scheduled
from mini_sglang.engine.speculation import Speculator
from mini_sglang.types import FinishReason, TokenEvent, TokenLogprob

logger = logging.getLogger(__name__)


class Requests(Protocol):
    """Those of an engine; it lets go of what ends."""

    def end(self, request: Request, reason: FinishReason, *, keep_kv: bool) -> TokenEvent:
        """End a request; gives its terminal event."""

    def fail(self, request: Request, message: str, kind: str | None = None) -> TokenEvent:
        """End a request with an error."""


class Postprocessor:
    """Takes in the results of steps."""

    def __init__(
        self, cache: KVCacheManager, speculator: Speculator, counters: EngineCounters, requests: Requests
    ) -> None:
        self._cache = cache
        self._speculator = speculator
        self._counters = counters
        self._requests = requests

    def take(self, plan: Sequence[Scheduled], results: Sequence[SequenceResult]) -> list[TokenEvent]:
        """The results of ``plan``, one for each of its items; returns what happened to each request."""
        counters = self._counters
        counters.steps += 1
        events: list[TokenEvent] = []
        for item, result in zip(plan, results, strict=True):
            request, num_tokens = item.request, item.num_tokens
            if result.error is not None:
                events.append(self._requests.fail(request, result.error, result.error_kind))
                continue
            if item.drafts is not None:
                events.extend(self._accept_drafts(request, item.drafts, result))
                continue
            begun = request.num_output > 0
            # What a retracted request computes again is prefill, but for its newest token.
            decoded = int(begun and result.token_id is not None)
            counters.decode_tokens += decoded
            counters.prefill_tokens += num_tokens - decoded
            if not request.started:
                self._note_start(request, num_tokens)
            request.num_computed += num_tokens
            if result.prompt_logprobs:
                request.prompt_logprobs.extend(result.prompt_logprobs)
            if num_tokens > 1 or not begun:
                self._cache.publish(request)
            if not begun:
                self._cache.keep_prompt(request)
            if request.prefill_only and request.num_remaining == 0:
                events.append(self._requests.end(request, FinishReason.STOP, keep_kv=True))
            elif result.token_id is not None:
                events.append(self._accept(request, result))
        return events

    def _accept(self, request: Request, result: SequenceResult) -> TokenEvent:
        assert result.token_id is not None
        first = request.num_output == 0
        error = request.append(result.token_id)
        if error is not None:
            return self._requests.fail(request, error)
        logprobs = () if result.logprob is None else (result.logprob,)
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if first and request.params.prompt_logprobs:
            prompt_logprobs = tuple(request.prompt_logprobs)
            request.prompt_logprobs_done = True
        if request.finish is not None:
            self._requests.end(request, request.finish, keep_kv=True)
        return TokenEvent(
            request.request_id,
            (result.token_id,),
            logprobs,
            request.finish,
            request.matched_token_id,
            prompt_tokens=request.num_prompt,
            cached_tokens=request.num_cached or 0,
            prompt_logprobs=prompt_logprobs,
        )

    def _accept_drafts(self, request: Request, drafts: Drafts, result: SequenceResult) -> list[TokenEvent]:
        taken, right, error = drafts.accept(result)
        counters = self._counters
        counters.draft_steps += 1
        counters.draft_tokens += len(drafts.tokens)
        counters.draft_tokens_accepted += right
        counters.decode_tokens += len(taken)
        self._speculator.learn(request, drafts, right)
        event = TokenEvent(
            request.request_id,
            tuple([one.token_id for one in taken if one.token_id is not None]),
            tuple([one.logprob for one in taken if one.logprob is not None]),
            request.finish,
            request.matched_token_id,
            prompt_tokens=request.num_prompt,
            cached_tokens=request.num_cached or 0,
        )
        if error is not None:
            # What was chosen before it counts, as it would without drafts.
            failed = self._requests.fail(request, error)
            return [event, failed] if taken else [failed]
        if request.finish is not None:
            self._requests.end(request, request.finish, keep_kv=True)
        return [event]

    def _note_start(self, request: Request, num_tokens: int) -> None:
        """Count what the caches gave to a request whose first step has run."""
        request.started = True
        if request.internal:
            return
        cached = request.num_cached or 0
        self._counters.note_start(request.num_prompt, cached)
        logger.info(
            "prefill request=%s prompt=%d cached=%d computing=%d",
            request.request_id, request.num_prompt, cached, num_tokens,
        )  # fmt: skip
