"""The scheduler modes, and what cache-aware routing is worth, counted on real radix trees."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.radix import RadixCache
from mini_sglang.engine.routing import (
    CacheAware,
    Candidate,
    LowestLoad,
    Random,
    RoundRobin,
    Router,
    make_router,
)

from .fake_handles import INFO, Bench, work

PAGE = INFO.page_size


def candidates(*loads: int | None) -> list[Candidate]:
    """One for each load; None is an engine without room."""
    return [Candidate(index, load) for index, load in enumerate(loads) if load is not None]


def cache_aware(margin: int = 4, engines: int = 2, **options: int) -> CacheAware:
    limits = {"max_prompt_tokens": 4096, "token_budget": 65536, **options}
    router = CacheAware(margin, **limits)
    for index in range(engines):
        router.opened(index, INFO)
    return router


def prompt(seed: int, tokens: int) -> list[int]:
    return random.Random(seed).choices(range(2, 40), k=tokens)


def test_round_robin_takes_turns_and_passes_over_the_full() -> None:
    router = RoundRobin()
    assert [router.choose(work("r"), candidates(5, 0, 0)) for _ in range(4)] == [0, 1, 2, 0]
    assert [router.choose(work("r"), candidates(0, None, 0)) for _ in range(3)] == [2, 0, 2]


def test_the_lowest_load_wins_and_equal_loads_take_turns() -> None:
    router = LowestLoad()
    assert router.choose(work("r"), candidates(3, 1, 2)) == 1
    assert [router.choose(work("r"), candidates(1, 1, 1)) for _ in range(4)] == [2, 0, 1, 2]


def test_random_uses_every_engine_alike() -> None:
    router = Random(seed=1)
    counts = Counter(router.choose(work("r"), candidates(9, 0, 0)) for _ in range(3000))
    assert set(counts) == {0, 1, 2} and min(counts.values()) > 800


@pytest.mark.parametrize(
    "mode, kind",
    [("rr", RoundRobin), ("fsfs", LowestLoad), ("random", Random), ("cache_aware", CacheAware)],
)
def test_the_setting_names_the_router(mode: str, kind: type) -> None:
    assert type(make_router(Settings.resolve({"scheduler_mode": mode}, {}))) is kind


def test_without_a_prefix_cache_only_the_load_counts() -> None:
    settings = Settings.resolve({"scheduler_mode": "cache_aware", "prefix_cache": False}, {})
    assert type(make_router(settings)) is LowestLoad


def test_the_engine_with_the_longest_prefix_wins() -> None:
    router = cache_aware()
    long = prompt(1, 20 * PAGE)
    router.sent(0, work("a", long[: 5 * PAGE]))
    router.sent(1, work("b", long[: 15 * PAGE]))
    assert router.cached(0, work("r", long)) == 5 * PAGE and router.cached(1, work("r", long)) == 15 * PAGE
    assert router.choose(work("r", long), candidates(0, 3)) == 1
    assert router.choose(work("r", prompt(2, 20 * PAGE)), candidates(0, 3)) == 0
    assert router.choose(work("r", long), candidates(0, None)) == 0


def test_near_ties_go_to_the_lower_load() -> None:
    router = cache_aware()
    long = prompt(1, 100 * PAGE)
    router.sent(0, work("a", long[: 90 * PAGE]))
    router.sent(1, work("b", long[: 93 * PAGE]))
    assert router.choose(work("r", long), candidates(0, 1)) == 0
    router.sent(1, work("c", long[: 99 * PAGE]))
    assert router.choose(work("r", long), candidates(0, 1)) == 1


def test_an_engine_that_is_much_busier_gets_no_more_for_its_cache() -> None:
    router = cache_aware(margin=4)
    long = prompt(1, 20 * PAGE)
    router.sent(0, work("a", long))
    assert router.choose(work("r", long), candidates(3, 0)) == 0
    assert router.choose(work("r", long), candidates(4, 0)) == 1


def test_what_was_generated_counts_too() -> None:
    """The next turn of a conversation holds the answer before it."""
    router = cache_aware()
    first, answer = prompt(1, 4 * PAGE), prompt(2, 4 * PAGE + 1)
    router.sent(0, work("a", first))
    router.ended(0, work("a", first), answer)
    assert router.cached(0, work("r", [*first, *answer, 3])) == 8 * PAGE


def test_tenants_do_not_share() -> None:
    router = cache_aware()
    router.sent(0, work("a", prompt(1, 64), "one"))
    assert router.cached(0, work("r", prompt(1, 64), "two")) == 0
    assert router.cached(0, work("r", prompt(1, 64), "one")) == 48


def test_a_restart_forgets_that_engine_alone() -> None:
    router = cache_aware()
    for index in range(2):
        router.sent(index, work("a", prompt(1, 64)))
    router.opened(0, INFO)
    assert [router.cached(index, work("r", prompt(1, 65))) for index in range(2)] == [0, 64]


def test_the_pool_tells_the_router_of_a_restart() -> None:
    bench = Bench(scheduler_mode="cache_aware").open()
    long = prompt(1, 20 * PAGE)
    bench.submit("a", long)
    first = bench.where("a")
    assert first is not None
    bench[first].end("a")
    assert bench.submit("b", long) and bench.where("b") == first
    bench[first].die()
    bench.pool.tick()
    bench.after(0.5)
    bench.open()
    router = bench.pool._router
    assert isinstance(router, CacheAware) and router.cached(first, work("r", long)) == 0


def test_the_trees_are_bounded_by_what_an_engine_holds() -> None:
    budgets = [(65536, 0, INFO.kv_tokens), (1024, 0, 1024), (65536, 3, 3 * 20 * PAGE)]
    for token_budget, max_prefixes, bound in budgets:
        router = cache_aware(token_budget=token_budget, max_prefixes=max_prefixes)
        for seed in range(100):
            router.sent(0, work("a", prompt(seed, 20 * PAGE)))
            assert router.num_tokens(0) <= bound
        assert router.num_tokens(0) > bound // 2
        assert router.cached(0, work("r", prompt(99, 20 * PAGE))) > 0  # the latest
        assert router.cached(0, work("r", prompt(0, 20 * PAGE))) == 0  # the oldest
    router = cache_aware(max_prompt_tokens=100)
    router.sent(0, work("a", prompt(1, 101)))
    assert router.num_tokens(0) == 0


class CountingEngine:
    """The prefix cache of one engine, as large as its KV pool, and what it saves."""

    def __init__(self, kv_tokens: int) -> None:
        self._tree = RadixCache(PAGE)
        self._max_pages = kv_tokens // PAGE
        self.hit_tokens = self.requests = 0

    def serve(self, tokens: Sequence[int]) -> int:
        hit = len(self._tree.match(tokens[:-1]).pages) * PAGE
        self.hit_tokens += hit
        self.requests += 1
        num_pages = len(tokens) // PAGE
        self._tree.insert(tokens[: num_pages * PAGE], list(range(num_pages)))
        self._tree.evict(self._tree.num_pages - self._max_pages)
        return hit


def serve(mode: str, prompts: list[list[int]], running: int) -> tuple[list[CountingEngine], int]:
    """Send the prompts through a pool of two, ``running`` at a time; also how far off its guesses were."""
    kv_tokens = 4096
    bench = Bench(scheduler_mode=mode, info=replace(INFO, kv_tokens=kv_tokens), max_batch_size=64).open()
    engines = [CountingEngine(kv_tokens) for _ in range(2)]
    names: list[str] = []
    error = 0
    for number, tokens in enumerate(prompts):
        router: Router = bench.pool._router
        guesses = [
            router.cached(i, work("r", tokens)) if isinstance(router, CacheAware) else 0 for i in range(2)
        ]
        bench.submit(f"r{number}", tokens)
        index = bench.where(f"r{number}")
        assert index is not None
        error += abs(engines[index].serve(tokens) - guesses[index])
        names.append(f"r{number}")
        if len(names) > running:
            done = names.pop(0)
            place = bench.where(done)
            assert place is not None
            bench[place].end(done)
    return engines, error


def shared_prefixes(groups: int, requests: int) -> list[list[int]]:
    """Requests with one of ``groups`` system prompts of 512 tokens and a question of their own."""
    chance = random.Random(3)
    systems = [prompt(100 + group, 512) for group in range(groups)]
    return [[*chance.choice(systems), *prompt(1000 + number, 48)] for number in range(requests)]


@pytest.mark.parametrize("running", [1, 12])
def test_cache_aware_routing_hits_more_than_taking_turns(running: int) -> None:
    """Ten prefixes do not fit into one engine's cache, five do."""
    prompts = shared_prefixes(10, 400)
    hits = {}
    for mode in ("rr", "cache_aware"):
        engines, error = serve(mode, prompts, running)
        hits[mode] = sum(engine.hit_tokens for engine in engines)
        assert sum(engine.requests for engine in engines) == 400
        assert min(engine.requests for engine in engines) > 100, "an engine starves"
    assert hits["cache_aware"] > 1.2 * hits["rr"]
    # The pool's trees follow the engines' closely, without asking them.
    assert error < 0.02 * hits["cache_aware"]


def test_one_hot_prefix_uses_every_engine() -> None:
    engines, _ = serve("cache_aware", shared_prefixes(1, 200), 40)
    assert min(engine.requests for engine in engines) > 60
    assert sum(engine.hit_tokens for engine in engines) >= 198 * 512
