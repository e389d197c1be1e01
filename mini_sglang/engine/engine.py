"""The engine: requests in, token events out, one step at a time. It knows ids, never text."""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from mini_sglang.backend.step import Backend, SampleSpec, SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.engine.kv_cache import CacheLimits, KVCacheManager
from mini_sglang.engine.request import Phase, Request
from mini_sglang.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from mini_sglang.errors import ContextLengthError, InvalidValueError, shorten
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent, TokenLogprob

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start. Tokens are counted where they are computed or saved."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_hit_tokens: int = 0


class EngineCore:
    """Add requests, call ``step`` until ``has_work`` is false, abort at any moment in between.

    Not thread-safe: one thread drives it (``worker.EngineThread`` does). ``make_request`` reads only
    what never changes and may be called from any thread.
    """

    def __init__(self, backend: Backend, settings: Settings, eos_ids: frozenset[int]) -> None:
        self._backend = backend
        self._settings = settings
        self._eos_ids = eos_ids
        limits = CacheLimits(
            enabled=settings.prefix_cache,
            max_leaves=settings.prefix_cache_size,
            max_prompt_tokens=settings.prefix_cache_max_tokens,
            token_budget=settings.prefix_cache_token_budget,
            policy=settings.prefix_cache_policy,
        )
        self.cache = KVCacheManager(backend.num_pages, backend.page_size, limits)
        self.scheduler = Scheduler(
            self.cache,
            SchedulerLimits(
                max_batch_size=settings.max_batch_size,
                max_prefill_tokens=settings.max_prefill_tokens,
                chunk_tokens=settings.prefill_chunk_size if settings.chunked_prefill else None,
            ),
        )
        self.counters = EngineCounters()
        self._requests: dict[str, Request] = {}

    @property
    def has_work(self) -> bool:
        return bool(self._requests)

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and answer together: the context window, or the pool where that is smaller."""
        return min(self._backend.context_length, self._backend.num_pages * self._backend.page_size)

    def make_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        prefill_only: bool = False,
        namespace: str = "",
    ) -> Request:
        """Check a prompt against this model and wrap it up for ``add``.

        Raises:
            InvalidValueError: an empty prompt, or an id outside the vocabulary.
            ContextLengthError: the prompt leaves no room for a token, or for ``prefill_only`` is longer
                than the context.
        """
        tokens = list(prompt_ids)
        self._check_ids("prompt", tokens)
        if not tokens:
            raise InvalidValueError("prompt", tokens, "at least one token long")
        self._check_ids("stop_token_ids", params.stop_token_ids)
        self._check_ids("logit_bias", list(params.logit_bias))
        return Request(
            request_id=request_id,
            tokens=tokens,
            num_prompt=len(tokens),
            params=params,
            max_new_tokens=self._cap_new_tokens(len(tokens), params, prefill_only),
            seed=params.seed if params.seed is not None else secrets.randbits(63),
            eos_ids=self._eos_ids,
            prefill_only=prefill_only,
            namespace=namespace,
            arrival=time.monotonic(),
        )

    def make_prefix_request(self, request_id: str, prompt_ids: Sequence[int], namespace: str = "") -> Request:
        """A request that only puts its prompt in the prefix cache.

        Raises:
            InvalidValueError: as ``make_request``, or the cache is off or does not take this length.
        """
        settings = self._settings
        if not settings.prefix_cache:
            raise InvalidValueError("PREFIX_CACHE", settings.prefix_cache, "on for insert_prefix")
        if len(prompt_ids) > settings.prefix_cache_max_tokens:
            allowed = f"at most {settings.prefix_cache_max_tokens} tokens (PREFIX_CACHE_MAX_TOKENS)"
            raise InvalidValueError("prefix", f"{len(prompt_ids)} tokens", allowed)
        return self.make_request(
            request_id, prompt_ids, SamplingParams(), prefill_only=True, namespace=namespace
        )

    def add(self, request: Request) -> None:
        """Queue a request made by ``make_request``."""
        if request.request_id in self._requests:
            raise InvalidValueError("request_id", request.request_id, "unique among running requests")
        self._requests[request.request_id] = request
        self.scheduler.add(request)
        self.counters.requests += 1

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> TokenEvent | None:
        """End a request now; its computed KV stays cached.

        Returns its terminal event, or None where it has ended already or was never known.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.counters.aborted += reason is FinishReason.ABORT
        return self._end(request, reason, keep_kv=True)

    def step(self) -> list[TokenEvent]:
        """Run one batch; returns what happened to each request in it."""
        plan = self.scheduler.schedule()
        if not plan:
            return []
        try:
            results = self._backend.run([self._sequence_step(item) for item in plan])
        except Exception as error:
            logger.exception("a step of %d requests failed", len(plan))
            return [self._fail(item.request, f"the step failed: {shorten(str(error))}") for item in plan]
        return self._postprocess(plan, results)

    def stats(self) -> dict[str, int]:
        """Counters and gauges; KV figures in tokens."""
        cache, page_size, counters = self.cache, self._backend.page_size, self.counters
        return {
            "requests": counters.requests,
            "finished": counters.finished,
            "aborted": counters.aborted,
            "failed": counters.failed,
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting),
            "steps": counters.steps,
            "prefill_tokens": counters.prefill_tokens,
            "decode_tokens": counters.decode_tokens,
            "prefix_hits": counters.prefix_hits,
            "prefix_misses": counters.prefix_misses,
            "prefix_hit_tokens": counters.prefix_hit_tokens,
            "prefix_evicted_tokens": cache.evicted_tokens,
            "prefixes": cache.num_prefixes,
            "retractions": self.scheduler.num_retractions,
            "kv_tokens_total": cache.num_pages * page_size,
            "kv_tokens_free": cache.num_free * page_size,
            "kv_tokens_cached": cache.num_cached * page_size,
            "kv_tokens_private": cache.num_private * page_size,
        }

    def check(self) -> None:
        """Verify the page invariant (free + cached + in use == total); raises AssertionError."""
        self.cache.check(self.scheduler.running)

    def _sequence_step(self, item: Scheduled) -> SequenceStep:
        request = item.request
        start, end = request.num_computed, request.num_computed + item.num_tokens
        step = SequenceStep(request.tokens[start:end], start, request.pages)
        if item.samples:
            penalised = request.params.penalised
            step.sample = SampleSpec(
                request.params,
                request.seed,
                request.num_output,
                request.tokens[: request.num_prompt] if penalised else (),
                request.tokens[request.num_prompt :] if penalised else (),
                request.banned_ids(),
            )
        if request.wants_prompt_logprobs:
            step.prompt_targets = request.tokens[start + 1 : min(end + 1, request.num_prompt)]
            step.prompt_top = request.params.top_logprobs
        return step

    def _postprocess(self, plan: list[Scheduled], results: list[SequenceResult]) -> list[TokenEvent]:
        self.counters.steps += 1
        events: list[TokenEvent] = []
        for item, result in zip(plan, results, strict=True):
            request = item.request
            if result.error is not None:
                events.append(self._fail(request, result.error))
                continue
            self._count(item)
            request.num_computed += item.num_tokens
            request.prompt_logprobs.extend(result.prompt_logprobs)
            if item.num_tokens > 1 or request.num_output == 0:
                self.cache.publish(request)
            if request.prefill_only and request.num_remaining == 0:
                events.append(self._end(request, FinishReason.STOP, keep_kv=True))
            elif result.token_id is not None:
                events.append(self._accept(request, result))
        return events

    def _accept(self, request: Request, result: SequenceResult) -> TokenEvent:
        assert result.token_id is not None
        first = request.num_output == 0
        request.append(result.token_id)
        logprobs = () if result.logprob is None else (result.logprob,)
        prompt_logprobs: tuple[TokenLogprob, ...] = ()
        if first and request.params.prompt_logprobs:
            prompt_logprobs = tuple(request.prompt_logprobs)
            request.prompt_logprobs_done = True
        if request.finish is not None:
            self._end(request, request.finish, keep_kv=True)
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

    def _count(self, item: Scheduled) -> None:
        request = item.request
        # What a retracted request computes again is prefill, but for its newest token.
        decoded = int(item.samples and request.num_output > 0)
        self.counters.decode_tokens += decoded
        self.counters.prefill_tokens += item.num_tokens - decoded
        if not request.started:
            request.started = True
            hit = bool(request.num_cached)
            self.counters.prefix_hits += hit
            self.counters.prefix_misses += not hit
            self.counters.prefix_hit_tokens += request.num_cached or 0
            logger.info(
                "prefill request=%s prompt=%d cached=%d computing=%d",
                request.request_id, request.num_prompt, request.num_cached or 0, item.num_tokens,
            )  # fmt: skip

    def _fail(self, request: Request, message: str) -> TokenEvent:
        self.counters.failed += 1
        # Nothing is known of the KV this step was writing, so none of this request's is kept.
        return self._end(request, FinishReason.ERROR, keep_kv=False, error=message)

    def _end(
        self, request: Request, reason: FinishReason, *, keep_kv: bool, error: str | None = None
    ) -> TokenEvent:
        """The one place where a request ends."""
        assert request.phase is not Phase.FINISHED
        self.scheduler.remove(request, keep_kv=keep_kv)
        del self._requests[request.request_id]
        self.counters.finished += reason in (FinishReason.STOP, FinishReason.LENGTH)
        request.finish = reason
        return TokenEvent(
            request.request_id,
            finish=reason,
            error=error,
            prompt_tokens=request.num_prompt,
            cached_tokens=request.num_cached or 0,
        )

    def _cap_new_tokens(self, num_prompt: int, params: SamplingParams, prefill_only: bool) -> int:
        limit = self.max_sequence_tokens
        room = limit - num_prompt
        if room < (0 if prefill_only else 1):
            allowed = f"{'at most' if prefill_only else 'shorter than'} the context, {limit} tokens"
            raise ContextLengthError("prompt", f"{num_prompt} tokens", allowed)
        if prefill_only:
            return 0
        if params.max_new_tokens <= room - (
            self._settings.max_context_margin if self._settings.aggressive_max_new_tokens else 0
        ):
            return params.max_new_tokens
        if not self._settings.aggressive_max_new_tokens:
            allowed = f"at most {room}, what a context of {limit} tokens leaves after {num_prompt} of prompt"
            raise ContextLengthError("max_new_tokens", params.max_new_tokens, allowed)
        return max(1, min(params.max_new_tokens, room - self._settings.max_context_margin))

    def _check_ids(self, field: str, ids: Sequence[int]) -> None:
        vocab_size = self._backend.vocab_size
        for token_id in ids:
            if type(token_id) is not int or not 0 <= token_id < vocab_size:
                raise InvalidValueError(field, token_id, f"made of token ids from 0 to {vocab_size - 1}")
