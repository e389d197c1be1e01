"""Continuous batching: which tokens of which requests run in the next step.

The idea of scheduling per step is Orca's (Yu et al., 2022); splitting long prompts and running the
pieces beside decodes is Sarathi-Serve's chunked prefill (Agrawal et al., 2024).
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from operator import attrgetter

from mini_sglang.backend.step import Backend
from mini_sglang.config import Settings
from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.order import Line, order_of
from mini_sglang.engine.request import Phase, Request

# Waiting one step for another request's prefill is worth it from this many shared tokens on.
_WORTH_WAITING_TOKENS = 32

_order_of = attrgetter("order")


class _NoRoomError(Exception):
    """A running request would have to be retracted, and may not be now."""


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """``chunk_tokens`` None computes prompts whole; ``max_prefill_tokens`` then bounds several together.

    ``aging_seconds`` of waiting are worth a step of priority (``order.order_of``).
    """

    max_batch_size: int
    max_prefill_tokens: int
    chunk_tokens: int | None
    aging_seconds: float = 0.0

    @classmethod
    def of(cls, settings: Settings, backend: Backend) -> SchedulerLimits:
        """What the settings say, for this backend."""
        chunks = settings.chunked_prefill and backend.chunks_prompts
        return cls(
            max_batch_size=settings.max_batch_size,
            max_prefill_tokens=settings.max_prefill_tokens,
            chunk_tokens=settings.prefill_chunk_size if chunks else None,
            aging_seconds=settings.priority_aging_seconds,
        )


@dataclass(slots=True)
class Scheduled:
    """A request and how many of its remaining tokens run in this step."""

    request: Request
    num_tokens: int
    drafts: Drafts | None = None  # with one token, its last: what is guessed to follow it

    @property
    def samples(self) -> bool:
        """Whether the step reaches the request's last token, so that the next one is chosen."""
        return self.num_tokens == self.request.num_remaining and not self.request.prefill_only


class Scheduler:
    """Holds the waiting line and the running set, both in one order: priority, aged, then arrival.

    One step mixes a decode of every running request with prefill chunks. Rows, token budget and pages go
    to who comes first in the order. When pages run out, the running request that comes last is retracted:
    it goes back to its place in the line with the tokens it has, its KV left in the prefix cache while
    room allows, and computes on from there later. So a running request is never retracted for one behind
    it; the first of all runs on to its end once it runs, and as ageing leaves only so many that can still
    come before a request, every request ends. One that runs is not set back for one that only waits.
    """

    def __init__(self, cache: KVCacheManager, limits: SchedulerLimits) -> None:
        self._cache = cache
        self._limits = limits
        self._serials = itertools.count()
        self.waiting: Line[Request] = Line()
        self.running: list[Request] = []
        self.num_retractions = 0
        self.max_running = limits.max_batch_size  # lower while the device's memory has room for fewer
        self._retracts = True
        self._under_way: Sequence[Request] = ()  # prompts that a step under way computes

    def add(self, request: Request) -> None:
        priority, aging = request.params.priority, self._limits.aging_seconds
        request.order = order_of(request.arrival, priority, aging, next(self._serials))
        self.waiting.add(request)

    def remove(self, request: Request, *, keep_kv: bool) -> None:
        """Take a request out for good, wherever it is, and give its pages back."""
        if request.phase is Phase.WAITING:
            self.waiting.remove(request)
        elif request.phase is Phase.RUNNING:
            self.running.remove(request)
            self._cache.release(request, keep=keep_kv)
        request.phase = Phase.FINISHED

    def schedule(self) -> list[Scheduled]:
        """Choose the next step and give it its pages. Empty when there is nothing to run."""
        plan: list[Scheduled] = []
        prefills: list[Request] = []
        retractions = self.num_retractions
        for request in list(self.running):
            if request.phase is not Phase.RUNNING:
                continue  # retracted for an earlier one in this very loop
            remaining = request.num_remaining
            if remaining > 1:
                prefills.append(request)
            elif self._make_room(request, request.num_computed + remaining):
                plan.append(Scheduled(request, remaining))
        self._plan_prefills(plan, prefills)
        if self.num_retractions > retractions:  # perhaps of a later request, which was planned already
            plan = [item for item in plan if item.request.phase is Phase.RUNNING]
        return plan

    def schedule_ahead(self, ending: Collection[Request], under_way: Sequence[Request]) -> list[Scheduled]:
        """As ``schedule``, while a step is under way: requests are as it will leave them.

        Nobody is retracted, since that step may write the pages. Where somebody would have to be, the plan is
        empty; what began for it goes on in the next one.

        Args:
            ending: running requests that end with the step under way.
            under_way: requests whose prompts it computes.
        """
        if ending:
            self.running = [request for request in self.running if request not in ending]
        self._retracts, self._under_way = False, under_way
        try:
            return self.schedule()
        except _NoRoomError:
            return []
        finally:
            self._retracts, self._under_way = True, ()
            for request in ending:
                insort(self.running, request, key=_order_of)

    def _plan_prefills(self, plan: list[Scheduled], prefills: list[Request]) -> None:
        """Share out the token budget, in order, to prompts that are half done and to those that wait."""
        budget = self._limits.chunk_tokens or self._limits.max_prefill_tokens
        prefilling: list[Request] = []
        for request in prefills:
            if self.waiting and self.waiting[0].order < request.order:
                budget = self._admit(plan, budget, prefilling, request)
            if budget == 0 or request.phase is not Phase.RUNNING:
                continue
            num_tokens = min(request.num_remaining, budget)
            if self._make_room(request, request.num_computed + num_tokens):
                budget -= num_tokens
                plan.append(Scheduled(request, num_tokens))
                if num_tokens > 1:
                    prefilling.append(request)
        if self.waiting:
            self._admit(plan, budget, prefilling, None)

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Get pages for ``num_tokens``, retracting the last of the order; False if it had to go itself."""
        while not self._cache.extend(request, num_tokens):
            if not self._retracts:
                raise _NoRoomError
            victim = self.running[-1]
            self.retract(victim)
            if victim is request:
                return False
        return True

    def retract(self, request: Request) -> None:
        """Set a running request back to its place in the line; it keeps its tokens."""
        self.running.remove(request)
        self._cache.release(request, keep=True)
        if not request.prompt_logprobs_done:
            request.prompt_logprobs.clear()
        request.phase = Phase.WAITING
        self.waiting.add(request)
        self.num_retractions += 1

    def _admit(
        self, plan: list[Scheduled], budget: int, prefilling: list[Request], before: Request | None
    ) -> int:
        """Start waiting requests, in order, while rows, token budget and pages last.

        Args:
            prefilling: those whose prompts are computed in this step; the new ones are added.
            before: a request that is served before those behind it in the order.

        Returns:
            What is left of the budget.
        """
        at = 0
        chunked = self._limits.chunk_tokens is not None
        while at < len(self.waiting):
            request = self.waiting[at]
            if len(self.running) >= self.max_running or budget <= 0:
                break
            if before is not None and request.order > before.order:
                break
            if self._should_wait_for(request, prefilling):
                at += 1
                continue
            # One more page for each running request that may take one, or the next decodes would retract the
            # newcomer at once.
            headroom = sum(map(self._grows, self.running))
            if self._cache.fetch(request, headroom, busy=bool(self.running)):
                at += 1
                continue
            self._cache.attach(request)
            remaining = request.num_remaining
            missing = self._cache.pages_for(len(request.tokens)) - len(request.pages)
            num_tokens = min(remaining, budget) if chunked else remaining
            too_long = not chunked and remaining > budget and bool(prefilling)
            fits = not too_long and (not self.running or missing + headroom <= self._cache.num_available)
            if not fits or not self._cache.extend(request, request.num_computed + num_tokens):
                self._cache.release(request, keep=False)
                break
            self.waiting.pop(at)
            self._start(request)
            budget = max(0, budget - num_tokens)
            if request.num_remaining > 1:
                prefilling.append(request)
            plan.append(Scheduled(request, num_tokens))
        return budget

    def _start(self, request: Request) -> None:
        request.phase = Phase.RUNNING
        if request.num_cached is None:
            request.num_cached = request.num_computed
            self._cache.count_hit(request)
        insort(self.running, request, key=_order_of)

    def _grows(self, request: Request) -> bool:
        """Whether a running request may come to need more pages than it has."""
        return self._cache.pages_for(request.num_prompt + request.max_new_tokens) > len(request.pages)

    def _should_wait_for(self, request: Request, prefilling: list[Request]) -> bool:
        """Whether a prefill under way will soon leave a much longer prefix than is cached now."""
        limits = self._cache.limits
        if self._under_way:
            prefilling = [*self._under_way, *prefilling]
        if not limits.enabled or request.wants_prompt_logprobs or not prefilling:
            return False
        known = -1
        start = request.tokens[:_WORTH_WAITING_TOKENS]
        for other in prefilling:
            if other.namespace != request.namespace or other.num_prompt > limits.max_prompt_tokens:
                continue
            if other.tokens[:_WORTH_WAITING_TOKENS] != start:
                continue
            shared = _common_prefix(request.tokens, other.tokens)
            if shared < _WORTH_WAITING_TOKENS:
                continue
            if known < 0:
                known = self._cache.cached_prefix(request)
            # What it could attach: whole pages, and not its last token.
            shared = min(shared, len(request.tokens) - 1)
            if shared - shared % self._cache.page_size >= known + _WORTH_WAITING_TOKENS:
                return True
        return False


def _common_prefix(a: list[int], b: list[int]) -> int:
    """Length of the longest common prefix, by halving on whole-slice comparisons."""
    low, high = 0, min(len(a), len(b)) + 1  # a[:low] agrees; high is one past what may agree
    if a[:1] != b[:1]:
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        if a[low:middle] == b[low:middle]:
            low = middle
        else:
            high = middle
    return low
