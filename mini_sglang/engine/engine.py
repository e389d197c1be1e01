"""The engine: requests in, token events out, one step at a time. It knows ids, never text."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path

from mini_sglang.backend.step import (
    Backend,
    GrammarFactory,
    SequenceStep,
    page_store,
    release,
    submitter_of,
)
from mini_sglang.config import Settings
from mini_sglang.engine.adapters import LoadedAdapters
from mini_sglang.engine.cache_limits import CacheLimits, check_limits
from mini_sglang.engine.counters import EngineCounters
from mini_sglang.engine.draft_model import DraftModel
from mini_sglang.engine.grammars import GrammarRoom
from mini_sglang.engine.handle import EngineInfo, Work
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.limits import BY_CONTEXT, BY_LOAD, make_prefix_work, make_work
from mini_sglang.engine.overlap import Overlap, Steps
from mini_sglang.engine.recovery import Recovery
from mini_sglang.engine.request import Phase, Request
from mini_sglang.engine.results import Postprocessor
from mini_sglang.engine.scheduler import Scheduled, Scheduler, SchedulerLimits
from mini_sglang.engine.speculation import Speculator
from mini_sglang.engine.warming import WarmQueue
from mini_sglang.errors import BackendLostError, InvalidValueError, MiniSglangError, OutOfMemoryError, shorten
from mini_sglang.types import Adapter, FinishReason, SamplingParams, TokenEvent

logger = logging.getLogger(__name__)

# Seconds a step with nothing to run waits for a grammar; commands wait as long.
_COMPILE_WAIT = 0.002


class EngineCore:
    """Add requests, call ``step`` until ``has_work`` is false, abort at any moment in between.

    Not thread-safe: one thread drives it (``worker.EngineThread`` does). ``info``, ``make_request``,
    ``request_of`` and ``stats`` any thread may call: they read what never changes and numbers, and note the
    latest arrival of each priority, where two at one moment may come in either order.

    A request with a grammar waits beside the queue while that is compiled in another thread; one from
    ``make_request`` has it compiled already, in the thread that called.

    Args:
        eos_ids: ids that end an answer.
        description: goes into ``info``.
        grammars: makes the grammars of requests; None refuses requests that have one.
        draft_backend: a small model of the same vocabulary that guesses tokens ahead.

    Attributes:
        saved_cache: where ``close`` saves the prefix cache; None to let it go.
        on_start: called before the first step of requests, with their ids. It says what must be known
            even if that step ends the process.
    """

    def __init__(
        self,
        backend: Backend,
        settings: Settings,
        eos_ids: frozenset[int],
        description: Mapping[str, str | int] | None = None,
        grammars: GrammarFactory | None = None,
        draft_backend: Backend | None = None,
    ) -> None:
        self._backend = backend
        self._check_backend: Callable[[], None] | None = getattr(backend, "check", None)
        self._settings = settings
        self._eos_ids = eos_ids
        self._grammars = GrammarRoom(grammars)
        self.saved_cache: Path | None = None
        self.adapters = LoadedAdapters(getattr(backend, "adapters", None), self._quiet)
        self.on_start: Callable[[list[str]], None] | None = None
        self.info = EngineInfo(
            description=dict(description or {}),
            eos_ids=tuple(sorted(eos_ids)),
            vocab_size=backend.vocab_size,
            context_length=backend.context_length,
            max_sequence_tokens=min(backend.context_length, backend.num_pages * backend.page_size),
            page_size=backend.page_size,
            kv_tokens=backend.num_pages * backend.page_size,
            shares_prefixes=backend.shares_prefixes,
        )
        limits = CacheLimits.of(settings, backend)
        check_limits(limits, backend)
        self.cache = KVCacheManager(backend.num_pages, backend.page_size, limits, page_store(backend))
        self.scheduler = Scheduler(self.cache, SchedulerLimits.of(settings, backend))
        draft_model = None
        if draft_backend is not None:
            draft_model = DraftModel(draft_backend, backend.vocab_size, settings.max_prefill_tokens)
        # What was guessed wrong must be forgotten: only pages can.
        paged = backend.shares_prefixes
        self.speculator = Speculator(settings, self.cache, draft_model, allowed=paged)
        self.counters = EngineCounters()
        self._postprocessor = Postprocessor(self.cache, self.speculator, self.counters, self)
        self.recovery = Recovery(backend, self.scheduler, self.cache, self.counters)
        self._requests: dict[str, Request] = {}
        self._arrivals: dict[int, float] = {}
        self._warm: Request | None = None  # the one of the queue's that runs
        chunk = min(settings.prefill_chunk_size, settings.max_prefill_tokens)
        self.warming = WarmQueue(chunk, self.make_prefix_request)
        self._overlap: Overlap | None = None
        self._next = self._step
        submitter = submitter_of(backend)
        if submitter is not None:
            steps = Steps(
                admit=self._admit_compiled,
                tell_started=self._tell_started,
                build=self._sequence_step,
                fits=self.recovery.fits,
                run=self._run,
                take=self._postprocessor.take,
                fail=self._fail_all,
                set_back=self.recovery.set_back,
            )
            self._overlap = Overlap(
                submitter, self.scheduler, self.cache, self.counters, steps, rewinds=paged
            )
            self._next = self._overlap.step

    @property
    def has_work(self) -> bool:
        under_way = self._overlap is not None and self._overlap.busy
        return bool(self._requests) or len(self.warming) > 0 or under_way

    @property
    def needs_looks(self) -> bool:
        """Whether to call ``step`` now and then without work too: the backend may be lost meanwhile."""
        return self._check_backend is not None

    @property
    def max_sequence_tokens(self) -> int:
        """Longest prompt and answer together: the context window, or the pool where that is smaller."""
        return self.info.max_sequence_tokens

    def make_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        params: SamplingParams,
        *,
        prefill_only: bool = False,
        namespace: str = "",
        adapter: Adapter | None = None,
        inflight: int = 0,
    ) -> Request:
        """Check a prompt against this model, compile its grammar, and wrap it up for ``add``.

        Args:
            inflight: requests there are with this one (``limits.make_work``).

        Takes as long as the compile does. Raises as ``limits.make_work``, and for a grammar:

        Raises:
            InvalidValueError: it cannot be used.
            OverloadedError: too many wait to be compiled.
        """
        work = make_work(
            self.info,
            self._settings,
            request_id,
            prompt_ids,
            params,
            prefill_only=prefill_only,
            namespace=namespace,
            adapter=adapter,
            inflight=inflight,
        )
        request = self.request_of(work)
        request.grammar = self._grammars.make(params)
        return request

    def make_prefix_request(
        self,
        request_id: str,
        prompt_ids: Sequence[int],
        namespace: str = "",
        adapter: Adapter | None = None,
    ) -> Request:
        """A request that only puts its prompt in the cache. Raises as ``limits.make_prefix_work``."""
        work = make_prefix_work(self.info, self._settings, request_id, prompt_ids, namespace, adapter)
        return self.request_of(work)

    def request_of(self, work: Work) -> Request:
        """Wrap up checked work for ``add``; it counts as having arrived ``work.waited`` seconds ago."""
        # Those of one priority stay in the order they come in, whatever the way here took each.
        priority = work.params.priority
        arrival = max(time.monotonic() - work.waited, self._arrivals.get(priority, 0.0))
        self._arrivals[priority] = arrival
        request = Request(
            request_id=work.request_id,
            tokens=list(work.prompt_ids),
            num_prompt=len(work.prompt_ids),
            params=work.params,
            max_new_tokens=work.max_new_tokens,
            seed=work.seed,
            eos_ids=self._eos_ids,
            prefill_only=work.prefill_only,
            namespace=work.namespace,
            lora=work.lora,
            arrival=arrival,
            capped_by=work.capped_by,
        )
        request.speculation = self.speculator.begin(request)
        return request

    def insert_prefix(self, prompt_ids: Sequence[int]) -> int:
        """Have a prefix put in the cache by steps that no request needs; returns its tokens.

        Raises as ``limits.make_prefix_work``.
        """
        self.make_prefix_request("", prompt_ids)
        self.warming.add(prompt_ids)
        return len(prompt_ids)

    def add(self, request: Request) -> None:
        """Queue a request made by ``make_request``.

        Raises:
            InvalidValueError: one of its id runs, or its adapter is not loaded (``NoAdapterError``).
        """
        if request.request_id in self._requests:
            raise InvalidValueError("request_id", request.request_id, "unique among running requests")
        request.adapter = self.adapters.enter(request.lora)
        self._requests[request.request_id] = request
        if request.params.grammar is not None and request.grammar is None:
            self._grammars.add(request)
        else:
            self.scheduler.add(request)
        self.counters.requests += 1
        self.counters.lora_requests += request.adapter > 0
        self.counters.capped_by_load += request.capped_by == BY_LOAD
        self.counters.capped_by_context += request.capped_by == BY_CONTEXT

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> TokenEvent | None:
        """End a request now; its computed KV stays cached.

        Returns its terminal event, or None where it has ended already or was never known.
        """
        request = self._requests.get(request_id)
        if request is None:
            return None
        self.counters.aborted += reason is FinishReason.ABORT
        return self.end(request, reason, keep_kv=True)

    def step(self) -> list[TokenEvent]:
        """Run one batch; returns what happened to each request in it.

        Where the backend runs steps while the engine goes on, a batch may be under way afterwards, of which
        the next call returns what happened.

        Raises:
            BackendLostError: the engine cannot go on.
        """
        if self._check_backend is not None:
            self._check_backend()
        if not self._requests:
            self._warm = self.warming.next()
            if self._warm is not None:
                self._warm.internal = True
                self._requests[self._warm.request_id] = self._warm
                self.scheduler.add(self._warm)
        events = self._next()
        if self._warm is not None and self._warm.finish is not None:
            ours = [event for event in events if event.request_id == self._warm.request_id]
            events = [event for event in events if event.request_id != self._warm.request_id]
            cached = self.cache.cached_tokens(self._warm.tokens, self._warm.namespace)
            self.warming.ended(ours[0].error if ours else None, cached, self.info.page_size)
            self._warm = None
        return events

    def _step(self) -> list[TokenEvent]:
        events = self._admit_compiled()
        plan = self.scheduler.schedule()
        return events + self._run(plan) if plan else events

    def _run(self, plan: list[Scheduled], failure: OutOfMemoryError | None = None) -> list[TokenEvent]:
        """Run a plan and take in its results; ``failure`` is that of a try that did not fit the memory."""
        self._tell_started(plan)
        speculating = self.speculator.propose(plan)
        started = time.perf_counter() if speculating else 0.0
        try:
            results = self.recovery.run(plan, [self._sequence_step(item) for item in plan], failure)
        except BackendLostError:
            raise
        except Exception as error:
            return self._fail_all(plan, error)
        if speculating:
            self.speculator.note_step(plan, time.perf_counter() - started)
        return self._postprocessor.take(plan, results)

    def _tell_started(self, plan: Sequence[Scheduled], told: Container[Request] = ()) -> None:
        """Say which requests a plan begins, but for those in ``told``."""
        if self.on_start is None:
            return
        fresh = [
            item.request.request_id
            for item in plan
            if not item.request.started and not item.request.internal and item.request not in told
        ]
        if fresh:
            self.on_start(fresh)

    def _fail_all(self, plan: Sequence[Scheduled], error: Exception) -> list[TokenEvent]:
        """End the requests of a step that raised ``error``."""
        logger.error("a step of %d requests failed", len(plan), exc_info=error)
        message = f"the step failed: {shorten(str(error) or type(error).__name__)}"
        return [self.fail(item.request, message) for item in plan]

    def stats(self) -> dict[str, int]:
        """Counters and gauges; KV figures in tokens."""
        cache, page_size = self.cache, self._backend.page_size
        return {
            **self.counters.figures(),
            "running": len(self.scheduler.running),
            "waiting": len(self.scheduler.waiting) + len(self._grammars),
            "prefix_evicted_tokens": cache.evicted_tokens,
            "prefixes": cache.num_prefixes,
            "prefix_reuse": int(cache.limits.enabled),
            "retractions": self.scheduler.num_retractions,
            "step_tokens_limit": self.recovery.size.limit or 0,
            "loras": len(self.adapters),
            "speculation_switched_off": self.speculator.switched_off,
            "kv_tokens_total": cache.num_pages * page_size,
            "kv_tokens_free": cache.num_free * page_size,
            "kv_tokens_cached": cache.num_cached * page_size,
            "kv_tokens_private": cache.num_private * page_size,
            **cache.stats(),
            "warm_prefixes": self.warming.total,
            "warm_prefixes_done": self.warming.done,
            "warm_prefixes_failed": self.warming.failed,
        }

    def close(self) -> None:
        """Keep what is to outlive the engine and let go of the rest; no step comes after this."""
        self._quiet()
        self._save_cache()
        self.release()

    def release(self) -> None:
        """End what the backend has beyond this process."""
        release(self._backend)

    def _quiet(self) -> None:
        """Wait until no step is under way."""
        if self._overlap is not None:
            self._overlap.quiet()

    def _save_cache(self) -> None:
        if self.saved_cache is None:
            return
        path, self.saved_cache = self.saved_cache, None
        try:
            tokens = self.cache.save(path)
        except MiniSglangError as error:
            logger.error("%s", error)
        else:
            logger.info("saved %d tokens of the prefix cache to %s", tokens, path)

    def check(self) -> None:
        """Verify the page invariant (free + cached + in use == total); raises AssertionError."""
        self.cache.check(self.scheduler.running)
        self.speculator.check()

    def _admit_compiled(self) -> list[TokenEvent]:
        """Queue the requests whose grammars are there by now."""
        if not len(self._grammars):
            return []
        busy = self.scheduler.running or self.scheduler.waiting
        events: list[TokenEvent] = []
        for request, error in self._grammars.compiled(0.0 if busy else _COMPILE_WAIT):
            if error is None:
                self._grammars.remove(request)
                self.scheduler.add(request)
            else:
                events.append(self.fail(request, error))
        return events

    def _sequence_step(self, item: Scheduled) -> SequenceStep:
        request = item.request
        start, end = request.num_computed, request.num_computed + item.num_tokens
        step = SequenceStep(request.tokens[start:end], start, request.pages, adapter=request.adapter)
        if item.samples:
            step.sample = request.sample_spec()
            if request.num_output == 0:
                self.cache.first_token(request, step)
            if item.drafts is not None:
                step.token_ids = [*step.token_ids, *item.drafts.tokens]
                step.draft_samples = item.drafts.samples
        if request.wants_prompt_logprobs:
            step.prompt_targets = request.tokens[start + 1 : min(end + 1, request.num_prompt)]
            step.prompt_top = request.params.top_logprobs
        return step

    def fail(self, request: Request, message: str, kind: str | None = None) -> TokenEvent:
        """See ``results.Requests``."""
        self.counters.failed += 1
        # Nothing is known of the KV this step was writing, so none of this request's is kept.
        return self.end(request, FinishReason.ERROR, keep_kv=False, error=message, kind=kind)

    def end(
        self,
        request: Request,
        reason: FinishReason,
        *,
        keep_kv: bool,
        error: str | None = None,
        kind: str | None = None,
    ) -> TokenEvent:
        """See ``results.Requests``: the one place where a request ends."""
        assert request.phase is not Phase.FINISHED
        if self._grammars.remove(request):
            request.phase = Phase.FINISHED
        else:
            self.scheduler.remove(request, keep_kv=keep_kv)
        del self._requests[request.request_id]
        self.adapters.leave(request.lora)
        self.speculator.forget(request)
        self.counters.finished += not request.internal and reason in (
            FinishReason.STOP,
            FinishReason.LENGTH,
        )
        request.finish = reason
        return TokenEvent(
            request.request_id,
            finish=reason,
            error=error,
            prompt_tokens=request.num_prompt,
            cached_tokens=request.num_cached or 0,
            error_kind=kind,
        )
