"""Which engine serves a request: the four scheduler modes.

Cache-aware routing after the SGLang router (Zheng et al., 2024): the router keeps a tree of its own for each
engine, of what it sent there, and never asks an engine what it has cached.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from mini_sglang.config import Settings
from mini_sglang.engine.handle import EngineInfo, Work
from mini_sglang.engine.radix import RadixCache


@dataclass(frozen=True, slots=True)
class Candidate:
    """An engine that has room: its number and how many requests it has."""

    index: int
    load: int


class Router(Protocol):
    """Chooses engines. Not thread-safe: the pool calls it under its lock."""

    def choose(self, work: Work, candidates: Sequence[Candidate]) -> int:
        """The ``index`` of one of ``candidates``, which are in order of index and at least one."""

    def sent(self, index: int, work: Work) -> None:
        """``work`` goes to the engine."""

    def ended(self, index: int, work: Work, output_ids: Sequence[int]) -> None:
        """It ended there, well or aborted, with these tokens."""

    def opened(self, index: int, info: EngineInfo) -> None:
        """The engine has (re)started, with nothing cached."""


class _Simple:
    """A router that needs to know nothing of what became of a request."""

    def sent(self, index: int, work: Work) -> None:
        pass

    def ended(self, index: int, work: Work, output_ids: Sequence[int]) -> None:
        pass

    def opened(self, index: int, info: EngineInfo) -> None:
        pass


class RoundRobin(_Simple):
    """Each engine in turn; one that has no room is passed over."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, work: Work, candidates: Sequence[Candidate]) -> int:
        self._last = _next_after(self._last, candidates)
        return self._last


class LowestLoad(_Simple):
    """The engine with the fewest requests; equal ones in turn."""

    def __init__(self) -> None:
        self._last = -1

    def choose(self, work: Work, candidates: Sequence[Candidate]) -> int:
        lowest = min(candidate.load for candidate in candidates)
        self._last = _next_after(self._last, [one for one in candidates if one.load == lowest])
        return self._last


class Random(_Simple):
    """Any engine, evenly."""

    def __init__(self, seed: int | None = None) -> None:
        self._random = random.Random(seed)

    def choose(self, work: Work, candidates: Sequence[Candidate]) -> int:
        return self._random.choice(candidates).index


class CacheAware:
    """The engine that likely has most of the prompt cached, unless that is too busy.

    Engines whose hits differ by less than ``_NEAR`` of the prompt, or by less than a page, count as equal,
    and the lower load wins. An engine with ``margin`` requests more than the least loaded gets no more
    for the sake of its cache, so that one hot prefix spreads over as many engines as it keeps busy.

    Args:
        margin: requests.
        max_prompt_tokens: longer prompts are not cached by an engine.
        token_budget: tokens an engine's cache holds, where its KV pool is not smaller.
        max_prefixes: leaves of an engine's tree, 0 for no bound.
        policy: of an engine's tree, "lru" or "lfu".
    """

    _NEAR = 0.05

    def __init__(
        self,
        margin: int,
        max_prompt_tokens: int,
        token_budget: int,
        max_prefixes: int = 0,
        policy: str = "lru",
    ) -> None:
        self._margin = margin
        self._max_prompt_tokens = max_prompt_tokens
        self._token_budget = token_budget
        self._max_prefixes = max_prefixes
        self._policy = policy
        self._trees: dict[int, RadixCache] = {}
        self._max_pages: dict[int, int] = {}
        self._loads = LowestLoad()

    def choose(self, work: Work, candidates: Sequence[Candidate]) -> int:
        lowest = min(candidate.load for candidate in candidates)
        hits = {
            one.index: self.cached(one.index, work) for one in candidates if one.load - lowest < self._margin
        }
        slack = max(
            self._NEAR * len(work.prompt_ids),
            *(self._trees[i].page_size for i in hits if i in self._trees),
            1,
        )
        enough = max(hits.values()) - slack
        return self._loads.choose(work, [one for one in candidates if hits.get(one.index, -1.0) > enough])

    def cached(self, index: int, work: Work) -> int:
        """Tokens of the prompt that the engine likely has; changes nothing."""
        tree = self._trees.get(index)
        # As in an engine, the last token of a prompt is always computed.
        return 0 if tree is None else tree.prefix_length(work.prompt_ids[:-1], work.namespace)

    def num_tokens(self, index: int) -> int:
        """Tokens of the engine's likely cache, for tests of its bound."""
        tree = self._trees.get(index)
        return 0 if tree is None else tree.num_pages * tree.page_size

    def sent(self, index: int, work: Work) -> None:
        self._insert(index, work, work.prompt_ids)

    def ended(self, index: int, work: Work, output_ids: Sequence[int]) -> None:
        # The newest token is sampled but never computed.
        self._insert(index, work, (*work.prompt_ids, *output_ids[:-1]))

    def opened(self, index: int, info: EngineInfo) -> None:
        self._trees[index] = RadixCache(info.page_size, self._policy)
        self._max_pages[index] = min(self._token_budget, info.kv_tokens) // info.page_size

    def _insert(self, index: int, work: Work, tokens: Sequence[int]) -> None:
        tree = self._trees.get(index)
        if tree is None or len(work.prompt_ids) > self._max_prompt_tokens:
            return
        num_pages = min(len(tokens) // tree.page_size, self._max_pages[index])
        if num_pages == 0:
            return
        # Which pages does not matter here, only how many.
        done = tree.insert(tokens[: num_pages * tree.page_size], [0] * num_pages, work.namespace)
        tree.count_hit(done.node)
        tree.evict(tree.num_pages - self._max_pages[index])
        if self._max_prefixes:
            tree.trim_leaves(self._max_prefixes)


def make_router(settings: Settings) -> Router:
    """The router of ``SCHEDULER_MODE``."""
    mode = settings.scheduler_mode
    if mode == "cache_aware" and settings.prefix_cache:
        return CacheAware(
            margin=max(2, settings.max_batch_size // 8),
            max_prompt_tokens=settings.prefix_cache_max_tokens,
            token_budget=settings.prefix_cache_token_budget,
            max_prefixes=settings.prefix_cache_size,
            policy=settings.prefix_cache_policy,
        )
    if mode in ("fsfs", "cache_aware"):  # without a cache, only the load is left to look at
        return LowestLoad()
    return Random() if mode == "random" else RoundRobin()


def _next_after(last: int, candidates: Sequence[Candidate]) -> int:
    """The first candidate past ``last``, else the first of all."""
    return next((one.index for one in candidates if one.index > last), candidates[0].index)
