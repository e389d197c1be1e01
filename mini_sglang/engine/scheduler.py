"""Continuous batching: which tokens of which requests run in the next step.

The idea of scheduling per step is Orca's (Yu et al., 2022); splitting long prompts and running the
pieces beside decodes is Sarathi-Serve's chunked prefill (Agrawal et al., 2024).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Phase, Request

# Waiting one step for another request's prefill is worth it from this many shared tokens on.
_WORTH_WAITING_TOKENS = 32


@dataclass(frozen=True, slots=True)
class SchedulerLimits:
    """``chunk_tokens`` None computes prompts whole; ``max_prefill_tokens`` then bounds several together."""

    max_batch_size: int
    max_prefill_tokens: int
    chunk_tokens: int | None


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
    """Holds the waiting queue and the running set, both in order of arrival.

    One step mixes a decode of every running request with prefill chunks. When pages run out, the
    request that arrived last is retracted: it goes back to the head of the queue with the tokens it has,
    its KV left in the prefix cache while room allows, and computes on from there later. The oldest
    request is never retracted for another's sake, so every request ends.
    """

    def __init__(self, cache: KVCacheManager, limits: SchedulerLimits) -> None:
        self._cache = cache
        self._limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.num_retractions = 0

    def add(self, request: Request) -> None:
        self.waiting.append(request)

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
        budget = self._limits.chunk_tokens or self._limits.max_prefill_tokens
        retractions = self.num_retractions
        for request in list(self.running):
            if request.phase is not Phase.RUNNING:
                continue  # retracted for an older one in this very loop
            num_tokens = request.num_remaining
            if num_tokens > 1:
                num_tokens = min(num_tokens, budget)
                budget -= num_tokens
                if num_tokens == 0:
                    continue
            if self._make_room(request, request.num_computed + num_tokens):
                plan.append(Scheduled(request, num_tokens))
        if self.num_retractions > retractions:  # perhaps of a later request, which was planned already
            plan = [item for item in plan if item.request.phase is Phase.RUNNING]
        if self.waiting:
            plan.extend(self._admit(budget, [item.request for item in plan if item.num_tokens > 1]))
        return plan

    def _make_room(self, request: Request, num_tokens: int) -> bool:
        """Get pages for ``num_tokens``, retracting the latest arrivals; False if it had to go itself."""
        while not self._cache.extend(request, num_tokens):
            victim = self.running[-1]
            self._retract(victim)
            if victim is request:
                return False
        return True

    def _retract(self, request: Request) -> None:
        self.running.remove(request)
        self._cache.release(request, keep=True)
        if not request.prompt_logprobs_done:
            request.prompt_logprobs.clear()
        request.phase = Phase.WAITING
        self.waiting.appendleft(request)
        self.num_retractions += 1

    def _admit(self, budget: int, prefilling: list[Request]) -> Iterator[Scheduled]:
        """Start waiting requests, in order, while rows, token budget and pages last."""
        budget_left = budget
        for request in list(self.waiting):
            if len(self.running) >= self._limits.max_batch_size or budget_left <= 0:
                return
            if self._should_wait_for(request, prefilling):
                continue
            # One more page for each running request that may take one, or the next decodes would retract the
            # newcomer at once.
            headroom = sum(map(self._grows, self.running))
            if self._cache.fetch(request, headroom, busy=bool(self.running)):
                continue
            self._cache.attach(request)
            remaining = request.num_remaining
            chunked = self._limits.chunk_tokens is not None
            if not chunked and remaining > budget_left and prefilling:
                self._cache.release(request, keep=False)
                return
            missing = self._cache.pages_for(len(request.tokens)) - len(request.pages)
            num_tokens = min(remaining, budget_left) if chunked else remaining
            fits = not self.running or missing + headroom <= self._cache.num_available
            if not fits or not self._cache.extend(request, request.num_computed + num_tokens):
                self._cache.release(request, keep=False)
                return
            self.waiting.remove(request)
            self._start(request)
            budget_left -= num_tokens
            if request.num_remaining > 1:
                prefilling.append(request)
            yield Scheduled(request, num_tokens)

    def _start(self, request: Request) -> None:
        request.phase = Phase.RUNNING
        if request.num_cached is None:
            request.num_cached = request.num_computed
            self._cache.count_hit(request)
        # Retracted requests come back among younger ones; the running set stays in order of arrival.
        at = len(self.running)
        while at and self.running[at - 1].arrival > request.arrival:
            at -= 1
        self.running.insert(at, request)

    def _grows(self, request: Request) -> bool:
        """Whether a running request may come to need more pages than it has."""
        return self._cache.pages_for(request.num_prompt + request.max_new_tokens) > len(request.pages)

    def _should_wait_for(self, request: Request, prefilling: list[Request]) -> bool:
        """Whether a prefill under way will soon leave a much longer prefix than is cached now."""
        limits = self._cache.limits
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
