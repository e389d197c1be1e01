"""Steps that do not fit the device's memory: run in parts, and what never fits is set back or ended."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Sequence
from dataclasses import replace

from mini_sglang.backend.step import OUT_OF_MEMORY, Backend, SequenceResult, SequenceStep, free_memory
from mini_sglang.engine.counters import EngineCounters
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Request
from mini_sglang.engine.scheduler import Scheduled, Scheduler
from mini_sglang.engine.step_size import StepSize
from mini_sglang.errors import OutOfMemoryError

logger = logging.getLogger(__name__)

# Times that a request whose single token did not fit is set back before it is given up.
_TRIES = 3
# The same where its next chunks are half as long: down to one from any that a prompt may have.
_SMALLER_TRIES = 21
# Steps after which twice as many requests may run together again.
_PATIENCE = 64


class Recovery:
    """Runs the steps of an engine, whatever memory the device has for them.

    Where a call fails for want of memory, what is free is given back and the step's sequences run in calls of
    half the tokens, down to one; prompts in shorter chunks, drafts dropped. A sequence whose one token does
    not fit goes back to the line while others run, and ends with an error where it is alone or has been back
    often enough. The size that failed is remembered: later steps are cut before they run.

    Attributes:
        size: of the calls.
    """

    def __init__(
        self, backend: Backend, scheduler: Scheduler, cache: KVCacheManager, counters: EngineCounters
    ) -> None:
        self._backend = backend
        self._scheduler = scheduler
        self._cache = cache
        self._counters = counters
        self._most_running = scheduler.max_running
        self._steps = 0
        self.size = StepSize()

    def set_back(self, plan: Sequence[Scheduled]) -> None:
        """Have the requests of a failed step computed from their starts, fewer of them together."""
        self._counters.out_of_memory += 1
        free_memory(self._backend)
        self._scheduler.max_running = max(1, len(plan) // 2)
        self._retract([item.request for item in plan])

    def fits(self, steps: Sequence[SequenceStep]) -> bool:
        """Whether steps may run in one call, as far as memory that ran out before has taught."""
        if self._scheduler.max_running < self._most_running:
            return False
        return self.size.limit is None or sum(map(_tokens, steps)) <= self.size.limit

    def run(
        self, plan: list[Scheduled], steps: list[SequenceStep], failure: OutOfMemoryError | None = None
    ) -> list[SequenceResult]:
        """``Backend.run``, for the steps of ``plan``; gives the results of what is left in ``plan``.

        What did not run is taken out of it, and of what ran in part it says the part.

        Args:
            failure: what the whole of it failed with already.

        Raises: what the backend raises, but ``OutOfMemoryError``; ``plan`` is then whole.
        """
        if failure is None and self.size.limit is None and self._scheduler.max_running == self._most_running:
            try:
                return self._backend.run(steps)
            except OutOfMemoryError as error:
                failure = error
        attempt = _Attempt(plan, steps)
        if failure is not None:
            self._take_in(failure, attempt, attempt.take_all())
        while attempt.queue:
            call = self._next_call(attempt)
            try:
                results = self._backend.run([steps[place] for place in call])
            except OutOfMemoryError as error:
                failure = error
            else:
                self.size.ran(attempt.tokens(call))
                attempt.results.update(zip(call, results, strict=True))
                attempt.freed = False
                continue
            self._take_in(failure, attempt, call)
        self._retract([plan[place].request for place in attempt.dropped])
        plan[:] = [item for place, item in enumerate(plan) if place in attempt.results]
        return [attempt.results[place] for place in sorted(attempt.results)]

    def _next_call(self, attempt: _Attempt) -> list[int]:
        """The next sequences that may run together, the first of them cut where it is too long alone."""
        limit, queue = self.size.limit, attempt.queue
        call: list[int] = []
        total = 0
        while queue:
            count = _tokens(attempt.steps[queue[0]])
            if limit is not None and total + count > limit:
                if call:
                    break
                count = self._cut(attempt, queue[0], limit)
            call.append(queue.popleft())
            total += count
        return call

    def _cut(self, attempt: _Attempt, place: int, limit: int) -> int:
        """Make a step at most ``limit`` tokens long, if it can be; gives its tokens."""
        item, step = attempt.plan[place], attempt.steps[place]
        if item.drafts is not None:
            item.drafts.cut(limit - 1)
            step.token_ids = step.token_ids[:limit]
            step.draft_samples = step.draft_samples[: limit - 1]
            if limit == 1:
                item.drafts = None
                self._cache.give_back(item.request)
        elif self._can_cut(item, step):
            # The rest comes in the next step, as after any chunk.
            item.num_tokens = limit
            self._cache.keep_no_logits(item.request)
            attempt.steps[place] = replace(
                step,
                token_ids=step.token_ids[:limit],
                prompt_targets=step.prompt_targets[:limit],
                sample=None,
                keep_logits=None,
            )
        return _tokens(attempt.steps[place])

    def _can_cut(self, item: Scheduled, step: SequenceStep) -> bool:
        return item.drafts is not None or (len(step.token_ids) > 1 and self._backend.chunks_prompts)

    def _take_in(self, failure: OutOfMemoryError, attempt: _Attempt, call: list[int]) -> None:
        """A call of these sequences failed: they are put back in the queue, or some leave it."""
        why, lost = str(failure), failure.past_lost
        # Its traceback's frames may hold tensors.
        failure.__traceback__ = None
        self._counters.out_of_memory += 1
        freed = attempt.freed
        free_memory(self._backend)
        attempt.freed = True
        first = call[0]
        cuttable = len(call) > 1 or self._can_cut(attempt.plan[first], attempt.steps[first])
        gone = len(call) == 1 and lost and attempt.steps[first].start > 0
        if cuttable:
            self.size.failed(attempt.tokens(call))
        elif freed or gone:
            self.size.refused()
        logger.log(
            logging.DEBUG if freed else logging.WARNING,
            "out of memory in a step of %d tokens of %d requests, which goes on in parts of %s: %s",
            attempt.tokens(call), len(call), self.size.limit or "the same size", why,
        )  # fmt: skip
        if gone or (freed and not cuttable):
            self._refuse(attempt, first, why, cuttable)
        else:
            attempt.queue.extendleft(reversed(self._intact(attempt, call, lost)))

    def _intact(self, attempt: _Attempt, call: list[int], lost: bool) -> list[int]:
        """Those of a failed call that can run again as they are; the others are dropped."""
        steps = attempt.steps
        # The call may have written over logits that others of it were to start from.
        kept = {steps[place].keep_logits for place in call} - {None}
        again: list[int] = []
        for place in call:
            if steps[place].from_logits in kept or (lost and steps[place].start):
                attempt.dropped.append(place)
            else:
                again.append(place)
        if lost and len(again) < len(call):
            # What is lost is memory that caches took, and they will again.
            self._scheduler.max_running = max(1, len(call) // 2)
        return again

    def _refuse(self, attempt: _Attempt, place: int, why: str, smaller: bool) -> None:
        """Set a request back or end it; ``smaller`` says that it comes in shorter chunks next time."""
        request = attempt.plan[place].request
        request.memory_refusals += 1
        if smaller:
            again = request.memory_refusals < _SMALLER_TRIES
        else:
            again = request.memory_refusals < _TRIES and len(self._scheduler.running) > 1
        if again:
            attempt.dropped.append(place)
            return
        logger.error("out of memory for request %s alone: %s", request.request_id, why)
        attempt.results[place] = SequenceResult(
            error="out of memory: the device has no room for a step of this request, which is "
            f"{len(request.tokens)} tokens long; a shorter one may fit, and a smaller KV_TOKEN_BUDGET leaves "
            "more",
            error_kind=OUT_OF_MEMORY,
        )

    def _retract(self, requests: Sequence[Request]) -> None:
        """Set requests back; as many as run without them may run together, and slowly more again."""
        scheduler = self._scheduler
        for request in requests:
            scheduler.retract(request)
        if requests:
            scheduler.max_running = max(1, min(scheduler.max_running, len(scheduler.running)))
            self._steps = 0
        elif scheduler.max_running < self._most_running:
            self._steps += 1
            if self._steps % _PATIENCE == 0:
                scheduler.max_running = min(2 * scheduler.max_running, self._most_running)


class _Attempt:
    """One step of the engine on its way through several calls.

    Attributes:
        queue: places in the plan that are still to be run, those from kept logits first: a call may keep
            others under the same number.
        results: by place.
        dropped: places of those that are to be set back.
        freed: whether memory was given back since the last call that ran.
    """

    def __init__(self, plan: list[Scheduled], steps: list[SequenceStep]) -> None:
        self.plan = plan
        self.steps = steps
        self.queue = deque(sorted(range(len(steps)), key=lambda place: steps[place].from_logits is None))
        self.results: dict[int, SequenceResult] = {}
        self.dropped: list[int] = []
        self.freed = False

    def take_all(self) -> list[int]:
        call = list(self.queue)
        self.queue.clear()
        return call

    def tokens(self, places: Sequence[int]) -> int:
        return sum(_tokens(self.steps[place]) for place in places)


def _tokens(step: SequenceStep) -> int:
    """What a step counts: choosing from kept logits is one token's work."""
    return max(1, len(step.token_ids))
