"""One step ahead: the next step is planned and submitted while the backend is still busy with this one.

The engine's state is always that of the steps which are done. To plan ahead, what the step under way will
add is put on top of it for the while: its tokens count as computed, and a token that it chooses has a place,
though not yet a value (``UNKNOWN``), which the backend fills in. What cannot be known is who ends by that
token. Such a request is in the next step for nothing: what comes of it is dropped, and its pages are kept
back until that step is done (``Limbo``).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from mini_sglang.backend.step import Flight, SampleSpec, SequenceResult, SequenceStep, Submitter
from mini_sglang.engine.counters import EngineCounters
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Phase, Request
from mini_sglang.engine.scheduler import Scheduled, Scheduler
from mini_sglang.errors import BackendLostError, OutOfMemoryError
from mini_sglang.types import TokenEvent

logger = logging.getLogger(__name__)

UNKNOWN = -1
"""Stands in a request's tokens for the one that a step under way chooses."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What the engine does for a step, of which ``Overlap`` decides the moment.

    Attributes:
        admit: queues what became ready to be queued.
        tell_started: says which requests of a plan begin, but for those told already.
        build: makes the step of an item, from its request as it is now.
        fits: whether steps may run together, as far as the device's memory is known.
        run: runs a plan and waits for it; with what it failed with before, for want of memory.
        take: takes in the results of a plan.
        fail: ends the requests of a plan.
        set_back: has the requests of a plan computed from their starts.
    """

    admit: Callable[[], list[TokenEvent]]
    tell_started: Callable[[Sequence[Scheduled], Container[Request]], None]
    build: Callable[[Scheduled], SequenceStep]
    fits: Callable[[Sequence[SequenceStep]], bool]
    run: Callable[[list[Scheduled], OutOfMemoryError | None], list[TokenEvent]]
    take: Callable[[list[Scheduled], list[SequenceResult]], list[TokenEvent]]
    fail: Callable[[list[Scheduled], Exception], list[TokenEvent]]
    set_back: Callable[[list[Scheduled]], None]


@dataclass(slots=True, eq=False)
class UnderWay:
    """A submitted step.

    Attributes:
        samples: of each item, whether a token is chosen.
        waits: whether the step after it can only be planned once it is done.
        void: requests for which it computes what nobody wants, by what an earlier step turned out to be.
    """

    number: int
    plan: list[Scheduled]
    samples: list[bool]
    flight: Flight
    waits: bool
    void: set[Request] = field(default_factory=set)


class Overlap:
    """Runs the steps of an engine so that one is always under way between two calls of ``step``.

    Args:
        rewinds: whether the backend computes positions again that it has computed before.
    """

    def __init__(
        self,
        submitter: Submitter,
        scheduler: Scheduler,
        cache: KVCacheManager,
        counters: EngineCounters,
        steps: Steps,
        *,
        rewinds: bool,
    ) -> None:
        self._submitter = submitter
        self._scheduler = scheduler
        self._cache = cache
        self._counters = counters
        self._steps = steps
        self._rewinds = rewinds
        self._under_way: deque[UnderWay] = deque()  # in the order they were submitted: two at most

    @property
    def busy(self) -> bool:
        """Whether a step is under way."""
        return bool(self._under_way)

    def quiet(self) -> None:
        """Wait until the backend does nothing; results are still to be taken in."""
        for step in self._under_way:
            with suppress(Exception):
                step.flight.wait()

    def step(self) -> list[TokenEvent]:
        """Submit one more step where there is one, and take in the results of the one before it.

        Raises:
            BackendLostError: the engine cannot go on.
        """
        events = self._steps.admit()
        before = self._under_way[-1] if self._under_way else None
        refused: list[Scheduled] = []
        if before is not None:
            if not before.waits:
                refused = self._go_ahead(before)
            events += self._land()
        if refused:
            # Alone, and as its requests have become.
            plan = [item for item in refused if item.request.phase is Phase.RUNNING]
            events += self._steps.run(plan, None) if plan else []
        elif not self._under_way and (plan := self._scheduler.schedule()):
            events += self._go(plan)
        return events

    def _go(self, plan: list[Scheduled]) -> list[TokenEvent]:
        """Begin a step with nothing under way."""
        if any(item.request.speculation is not None for item in plan):
            # Guesses need the newest tokens, and how long a step takes.
            return self._steps.run(plan, None)
        steps = [*map(self._step_of, plan)]
        if not self._steps.fits(steps):
            return self._steps.run(plan, None)
        self._steps.tell_started(plan, ())
        refused = self._submit(plan, [item.samples for item in plan], steps)
        return self._steps.run(plan, None) if refused else []

    def _go_ahead(self, before: UnderWay) -> list[Scheduled]:
        """Begin the step after ``before``, as far as it can be known; gives what was refused."""
        places: dict[Request, int] = {}
        ending: set[Request] = set()
        prompts: list[Request] = []
        for place, (item, samples) in enumerate(zip(before.plan, before.samples, strict=True)):
            request = item.request
            if request.phase is Phase.FINISHED:
                continue
            request.num_computed += item.num_tokens
            if samples:
                request.tokens.append(UNKNOWN)
            places[request] = place
            if item.num_tokens > 1:
                prompts.append(request)
            if not request.num_remaining or (samples and request.num_output >= request.max_new_tokens):
                ending.add(request)
        try:
            plan = self._scheduler.schedule_ahead(ending, prompts)
            samples_of = [item.samples for item in plan]
            steps = [*map(self._step_of, plan)]
        finally:
            for request, place in places.items():
                request.num_computed -= before.plan[place].num_tokens
                if before.samples[place]:
                    request.tokens.pop()
        if not plan or not self._steps.fits(steps):
            return plan
        for item, step in zip(plan, steps, strict=True):
            if step.token_ids and step.token_ids[-1] == UNKNOWN:
                step.token_ids, step.follows = [0], places[item.request]
        self._steps.tell_started(plan, places)
        if self._submit(plan, samples_of, steps):
            return plan
        self._counters.overlapped_steps += 1
        return []

    def _step_of(self, item: Scheduled) -> SequenceStep:
        """The step, holding nothing that changes while it is under way."""
        step = self._steps.build(item)
        step.pages = step.pages[:]
        spec = step.sample
        if spec is not None:
            step.sample = SampleSpec(
                spec.params, spec.seed, spec.index, spec.prompt_ids, spec.output_ids, spec.banned_ids,
                spec.grammar, spec.end_ids,
            )  # fmt: skip
        return step

    def _submit(self, plan: list[Scheduled], samples: list[bool], steps: list[SequenceStep]) -> bool:
        """Submit a plan; True where the backend refused it."""
        try:
            flight = self._submitter.submit(steps)
        except BackendLostError:
            raise
        except Exception:
            logger.warning("a step of %d requests could not be submitted", len(plan), exc_info=True)
            return True
        limbo = self._cache.limbo
        limbo.newest += 1
        for item in plan:
            item.request.flights += 1
        waits = any(_looks_back(item.request) for item in plan)
        self._under_way.append(UnderWay(limbo.newest, plan, samples, flight, waits))
        return False

    def _land(self) -> list[TokenEvent]:
        """Take in the results of the oldest step under way."""
        step = self._under_way[0]
        try:
            results = step.flight.wait()
        except BackendLostError:
            raise
        except Exception as error:
            return self._land_failed(error)
        self._under_way.popleft()
        self._set_free(step)
        plan = step.plan
        dropped = [item.request.phase is Phase.FINISHED or item.request in step.void for item in plan]
        if any(dropped):
            self._counters.overlap_dropped += sum(dropped)
            plan = [item for item, drop in zip(plan, dropped, strict=True) if not drop]
            results = [result for result, drop in zip(results, dropped, strict=True) if not drop]
        for following in self._under_way:
            for item, result in zip(plan, results, strict=True):
                if result.revised:
                    following.void.add(item.request)
                    following.waits = True
        return self._steps.take(plan, results)

    def _land_failed(self, error: Exception) -> list[TokenEvent]:
        """The oldest step has failed: its requests end, but for one that did not fit the memory, and what was
        built on it comes to nothing."""
        step, *others = self._under_way
        for following in others:
            try:
                following.flight.wait()
            except BackendLostError:
                raise
            except Exception as other:
                logger.debug("a step after one that failed: %s", other)
        for landed in self._under_way:
            self._set_free(landed)
        self._under_way.clear()
        live = [item for item in step.plan if item.request.phase is not Phase.FINISHED]
        events: list[TokenEvent] = []
        if isinstance(error, OutOfMemoryError) and error.past_lost:
            self._steps.set_back(live)
        elif isinstance(error, OutOfMemoryError):
            # In parts, from where its requests were.
            events = self._steps.run(live, error) if live else []
        else:
            events = self._steps.fail(live, error)
        if not self._rewinds:
            # Else requests that were only in a later step go on from where they were.
            for item in (item for following in others for item in following.plan):
                if item.request.phase is Phase.RUNNING:
                    self._scheduler.retract(item.request)
        return events

    def _set_free(self, step: UnderWay) -> None:
        for item in step.plan:
            item.request.flights -= 1
        self._cache.landed(step.number)


def _looks_back(request: Request) -> bool:
    """Whether a request's next step depends on more of its newest token than the backend can fill in."""
    return (
        request.grammar is not None
        or request.params.penalised
        or request.speculation is not None
        or request.wants_prompt_logprobs
    )
