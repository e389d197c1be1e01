"""The host tier: what it keeps, against a twin that stores whole prefixes; and pages that come back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from mini_sglang.engine.cache_limits import CacheLimits
from mini_sglang.engine.host_tier import Digests, HostPage, HostTier
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.radix import RadixNode
from mini_sglang.engine.request import Phase, Request
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

from .fake_backend import EOS_IDS, Driver, FakeBackend, examples, make_core, mix, reference

ONE = SamplingParams(max_new_tokens=1)
PROMPT = [2 + i % 9 for i in range(40)]


def prompt_of(number: int, length: int = 12) -> list[int]:
    return [2 + number] * length


def driver_with(num_pages: int = 8, page_size: int = 4, **settings: object) -> Driver:
    settings.setdefault("prefill_cache_size", 0)
    return Driver(make_core(FakeBackend(num_pages, page_size), **settings))


def backend_of(driver: Driver) -> FakeBackend:
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    return backend


def test_an_evicted_prefix_comes_back() -> None:
    for budget, expected in ((0, 0), (64, 20)):
        driver = driver_with(page_token_budget=budget)
        driver.run(prompt_of(0, 20), ONE)
        driver.run(prompt_of(1, 30), ONE)  # the pool holds 32 tokens
        answer = driver.run([*prompt_of(0, 20), 30], ONE)
        assert answer.token_ids == reference([*prompt_of(0, 20), 30], ONE).token_ids
        assert answer.cached_tokens == expected
        stats = driver.core.stats()
        assert (stats["host_hits"] > 0) == (stats["host_restored_tokens"] > 0) == (budget > 0)
        assert stats["host_tokens_total"] == budget


def test_the_budget_bounds_what_is_kept() -> None:
    driver = driver_with(page_token_budget=10)  # two pages
    driver.run(prompt_of(0, 20), ONE)
    driver.run(prompt_of(1, 30), ONE)
    stats = driver.core.stats()
    assert (stats["host_tokens_used"], stats["host_tokens_total"]) == (8, 8)
    # Of a prefix the first pages are worth most.
    assert driver.run([*prompt_of(0, 20), 30], ONE).cached_tokens == 8


def test_what_the_token_budget_drops_goes_to_the_host_too() -> None:
    driver = driver_with(64, page_token_budget=64, prefix_cache_token_budget=0)
    driver.run(prompt_of(0), ONE)
    assert driver.core.stats()["kv_tokens_cached"] == 0
    assert driver.run([*prompt_of(0), 30], ONE).cached_tokens == 12


@pytest.mark.parametrize(("policy", "kept"), [("lru", 1), ("lfu", 0)])
def test_the_policy_chooses_what_the_host_drops(policy: str, kept: int) -> None:
    driver = driver_with(64, page_token_budget=12, prefix_cache_token_budget=0, prefix_cache_policy=policy)
    for _ in range(3):
        driver.run([*prompt_of(0), 30], ONE)
    driver.run(prompt_of(1), ONE)
    assert driver.run([*prompt_of(kept), 31], ONE).cached_tokens == 12
    assert driver.run([*prompt_of(1 - kept), 31], ONE).cached_tokens == 0


def test_namespaces_do_not_share_the_host() -> None:
    driver = driver_with(64, page_token_budget=64, prefix_cache_token_budget=0)
    driver.run(prompt_of(0), ONE, namespace="a")
    assert driver.run([*prompt_of(0), 30], ONE, namespace="b").cached_tokens == 0
    assert driver.run([*prompt_of(0), 30], ONE, namespace="a").cached_tokens == 12


def test_clear_drops_both_tiers() -> None:
    driver = driver_with(page_token_budget=64)
    driver.run(prompt_of(0, 20), ONE)
    driver.run(prompt_of(1, 30), ONE)
    used = driver.core.stats()["host_tokens_used"]
    assert used > 0
    assert driver.core.cache.clear() == 28 + used
    stats = driver.core.stats()
    assert (stats["host_tokens_used"], stats["kv_tokens_free"]) == (0, 32)
    assert driver.run([*prompt_of(0, 20), 30], ONE).cached_tokens == 0


def test_a_whole_prompt_comes_back_with_its_logits() -> None:
    driver = driver_with(10, page_token_budget=64, prefill_cache_size=4)
    driver.run(prompt_of(0, 18), ONE)
    driver.run(prompt_of(1, 30), ONE)
    answer = driver.run(prompt_of(0, 18), ONE)
    assert answer.token_ids == reference(prompt_of(0, 18), ONE).token_ids
    assert answer.cached_tokens == 18


def test_others_run_while_pages_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_sglang.engine.host_link.INLINE_BYTES", 0)
    driver = driver_with(16, page_token_budget=256, prefix_cache_token_budget=0)
    store = backend_of(driver)._store
    driver.run(prompt_of(0, 16), ONE)
    long = SamplingParams(max_new_tokens=20, ignore_eos=True)
    other = driver.add(prompt_of(1, 4), long)
    driver.step()
    waits = [driver.add([*prompt_of(0, 16), tail], ONE) for tail in (30, 31)]
    driver.step(5)
    assert len(driver.answers[other].token_ids) == 6, "it need not wait"
    assert all(not driver.answers[name].token_ids for name in waits)
    assert len(store.under_way) == 1, "both wait for one copy"
    gone = driver.add([*prompt_of(0, 16), 32], ONE)
    driver.step()
    driver.abort(gone)
    store.finish()
    driver.step()
    for name, tail in zip(waits, (30, 31), strict=True):
        assert driver.answers[name].token_ids == reference([*prompt_of(0, 16), tail], ONE).token_ids
        assert driver.answers[name].cached_tokens == 16
    driver.drain()
    assert driver.answers[other].token_ids == reference(prompt_of(1, 4), long).token_ids


def test_pages_on_their_way_go_to_the_tree_when_nobody_waits_any_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("mini_sglang.engine.host_link.INLINE_BYTES", 0)
    driver = driver_with(16, page_token_budget=256)
    backend = backend_of(driver)
    driver.run(prompt_of(0, 16), ONE)
    driver.run(prompt_of(2, 60), ONE)
    other = driver.add(prompt_of(1, 4), SamplingParams(max_new_tokens=8, ignore_eos=True))
    driver.step()
    name = driver.add([*prompt_of(0, 16), 30], ONE)
    driver.step()
    assert len(backend._store.under_way) == 1
    driver.abort(name)
    backend._store.finish()
    driver.drain()
    assert driver.answers[other].finish is not None
    hits = driver.core.stats()["host_hits"]
    assert driver.run([*prompt_of(0, 16), 31], ONE).cached_tokens == 16
    assert driver.core.stats()["host_hits"] == hits


def test_the_idle_engine_waits_for_the_copy_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_sglang.engine.host_link.INLINE_BYTES", 0)
    driver = driver_with(page_token_budget=64)
    driver.run(prompt_of(0, 20), ONE)
    driver.run(prompt_of(1, 30), ONE)
    name = driver.add([*prompt_of(0, 20), 30], ONE)
    driver.step()
    assert driver.answers[name].cached_tokens == 20


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prefix_cache": False}, "PAGE_TOKEN_BUDGET is 64; it must be 0 where PREFIX_CACHE is off."),
        ({"copies_pages": False}, "it must be 0 for a model whose KV is not in pages"),
        ({"page_token_budget": 3}, "PAGE_TOKEN_BUDGET is 3; it must be at least 4, one page."),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, object], sentence: str) -> None:
    backend = FakeBackend(8, 4, copies_pages=bool(settings.pop("copies_pages", True)))
    with pytest.raises(InvalidValueError) as caught:
        make_core(backend, **{"page_token_budget": 64, **settings})
    assert sentence in str(caught.value)


Prefix = tuple[str, tuple[int, ...]]


@dataclass
class Kept:
    hits: int
    used: int


class HostMachine(RuleBasedStateMachine):
    """The index alone, against a dict of whole prefixes of which the least worth goes first."""

    @initialize(
        slots=st.integers(1, 6), policy=st.sampled_from(["lru", "lfu"]), page_size=st.sampled_from([1, 2])
    )
    def start(self, slots: int, policy: str, page_size: int) -> None:
        self.page_size = page_size
        self.tier = HostTier(slots, page_size, policy)
        self.lfu = policy == "lfu"
        self.twin: dict[Prefix, Kept] = {}
        self.taken: list[list[HostPage]] = []
        self.clock = 0

    def rank(self, prefix: Prefix) -> tuple[int, int, int]:
        kept = self.twin[prefix]
        return (kept.hits if self.lfu else 0, kept.used, -len(prefix[1]))

    def leaf(self, namespace: str, tokens: Sequence[int]) -> RadixNode:
        root = RadixNode((), [], None, namespace)
        return RadixNode(list(tokens), list(range(len(tokens) // self.page_size)), root)

    @rule(
        namespace=st.sampled_from(["", "", "b"]),
        tokens=st.lists(st.integers(1, 2), min_size=2, max_size=8),
        count=st.integers(1, 4),
        hits=st.integers(0, 2),
    )
    def spill(self, namespace: str, tokens: list[int], count: int, hits: int) -> None:
        tokens = tokens[: len(tokens) - len(tokens) % self.page_size]
        leaf = self.leaf(namespace, tokens)
        self.clock += 1
        leaf.last_used, leaf.hits = self.clock, hits
        count = min(count, len(leaf.pages))
        self.tier.note(leaf, count)
        pages, slots = self.tier.leaving()
        assert len(set(slots)) == len(slots)
        room = self.tier.num_slots - sum(map(len, self.taken))
        stored: list[Prefix] = []
        for page in range(len(leaf.pages) - count, len(leaf.pages)):
            prefix = (namespace, tuple(tokens[: (page + 1) * self.page_size]))
            if prefix in self.twin:
                kept = self.twin[prefix]
                kept.hits, kept.used = max(kept.hits, hits), self.clock
                continue
            self.twin[prefix] = Kept(hits, self.clock)
            stored.append(prefix)
            if len(self.twin) > room:
                worst = min(self.twin, key=self.rank)
                del self.twin[worst]
        assert sorted(pages) == sorted(len(p[1]) // self.page_size - 1 for p in stored if p in self.twin)

    @precondition(lambda self: self.twin)
    @rule(pick=st.integers(0, 100), start=st.integers(0, 3))
    def take(self, pick: int, start: int) -> None:
        namespace, tokens = list(self.twin)[pick % len(self.twin)]
        tokens = (*tokens, 9, 9)
        start = min(start * self.page_size, len(tokens) - 2)
        node = self.leaf(namespace, tokens[: start - start % self.page_size])
        expected: list[Prefix] = []
        for end in range(node.end + self.page_size, len(tokens) + 1, self.page_size):
            if (namespace, tokens[:end]) not in self.twin:
                break
            expected.append((namespace, tokens[:end]))
        keys = self.tier.find(node, tokens, len(tokens) // self.page_size)
        assert len(keys) == len(expected)
        assert (self.tier.following(node, tokens) in keys) == bool(expected)
        if not keys:
            return
        pages = self.tier.take(keys)
        assert [tuple(page.tokens) for page in pages] == [p[1][-self.page_size :] for p in expected]
        for prefix in expected:
            del self.twin[prefix]
        self.taken.append(pages)

    @precondition(lambda self: self.taken)
    @rule()
    def arrive(self) -> None:
        self.tier.free(self.taken.pop(0))

    @rule()
    def clear(self) -> None:
        assert self.tier.clear() == len(self.twin)
        self.twin.clear()

    @invariant()
    def agrees(self) -> None:
        self.tier.check()
        assert self.tier.num_used == len(self.twin) + sum(map(len, self.taken))
        assert len(self.tier.pages()) == len(self.twin)


TestHostTier = HostMachine.TestCase
TestHostTier.settings = examples(150, 40)


class TwoTiers(RuleBasedStateMachine):
    """Both tiers under requests that come, run and go: what ``attach`` finds is what was computed.

    The twin remembers all prefixes that were ever published: nothing else may be found, and what a tier has
    is found. The content of each page is checked position by position.
    """

    @initialize(
        pages=st.integers(4, 12),
        slots=st.integers(1, 10),
        page_size=st.sampled_from([1, 2, 4]),
        policy=st.sampled_from(["lru", "lfu"]),
        budget=st.integers(0, 40),
        leaves=st.sampled_from([0, 2]),
    )
    def start(self, pages: int, slots: int, page_size: int, policy: str, budget: int, leaves: int) -> None:
        self.page_size = page_size
        self.backend = FakeBackend(pages, page_size)
        limits = CacheLimits(
            token_budget=budget,
            policy=policy,
            max_leaves=leaves,
            max_prompts=2,
            host_tokens=slots * page_size,
        )
        self.cache = KVCacheManager(pages, page_size, limits, self.backend.store)
        self.running: list[Request] = []
        self.published: set[Prefix] = set()
        self.known = [[1] * 20, [1] * 8 + [2] * 12]

    @rule(
        pick=st.integers(0, 7),
        cut=st.integers(1, 16),
        tail=st.lists(st.sampled_from([1, 2, 3]), max_size=5),
        namespace=st.sampled_from(["", "", "b"]),
        background=st.booleans(),
    )
    def come(self, pick: int, cut: int, tail: list[int], namespace: str, background: bool) -> None:
        import mini_sglang.engine.host_link as module

        tokens = [*self.known[pick % len(self.known)][:cut], *tail]
        self.known = [*self.known[:2], *self.known[2:][-6:], tokens]
        request = Request("r", tokens, len(tokens), ONE, 1, 0, EOS_IDS, namespace=namespace)
        before, module.INLINE_BYTES = module.INLINE_BYTES, 0 if background else 1 << 30
        try:
            waits = self.cache.fetch(request, len(self.running), busy=bool(self.running))
        finally:
            module.INLINE_BYTES = before
        if waits:
            assert self.running
            return
        found = self.cache.attach(request)
        assert found == len(tokens) if request.from_logits is not None else found < len(tokens)
        whole = found - found % self.page_size
        assert whole == 0 or (namespace, tuple(tokens[:whole])) in self.published
        if not self.cache.extend(request, len(tokens)):
            self.cache.release(request, keep=False)
            return
        self.expect(request, found)
        value = self.hash(tokens[:found])
        for position in range(found, len(tokens)):
            value = mix(value, tokens[position], position)
            self.backend.slots[self.slot(request, position)] = (value, tokens[position], position)
        request.num_computed = len(tokens)
        request.phase = Phase.RUNNING
        self.running.append(request)

        class Step:
            from_logits: int | None = None
            keep_logits: int | None = None

        self.cache.first_token(request, Step())  # type: ignore[arg-type]
        self.cache.publish(request)
        self.cache.keep_prompt(request)
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            self.published.add((namespace, tuple(tokens[:end])))

    def hash(self, tokens: Sequence[int]) -> int:
        from .fake_backend import hash_of

        return hash_of(tokens)

    def slot(self, request: Request, position: int) -> int:
        return request.pages[position // self.page_size] * self.page_size + position % self.page_size

    def expect(self, request: Request, end: int) -> None:
        """Every page of the request up to ``end`` holds its tokens."""
        value = 1
        for position in range(end):
            token = request.tokens[position]
            value = mix(value, token, position)
            assert self.backend.slots[self.slot(request, position)] == (value, token, position)

    @precondition(lambda self: self.running)
    @rule(pick=st.integers(0, 7), keep=st.booleans())
    def go(self, pick: int, keep: bool) -> None:
        request = self.running.pop(pick % len(self.running))
        self.expect(request, len(request.tokens))
        self.cache.release(request, keep=keep)

    @rule()
    def copies_end(self) -> None:
        self.backend._store.finish()

    @rule()
    def clear(self) -> None:
        self.cache.clear()
        assert (
            self.cache.num_free + self.cache.num_private + self.cache._tree.num_pages == self.cache.num_pages
        )

    @invariant()
    def agrees(self) -> None:
        self.cache.check(self.running)
        stats = self.cache.stats()
        assert 0 <= stats["host_tokens_used"] <= stats["host_tokens_total"]


TestTwoTiers = TwoTiers.TestCase
TestTwoTiers.settings = examples(200, 50)


def test_digests_of_a_path_that_was_split_and_shortened() -> None:
    from mini_sglang.engine.radix import RadixCache

    tree, digests = RadixCache(2), Digests(2)
    node = tree.insert([1, 2, 3, 4, 5, 6], [0, 1, 2], "n").node
    whole = digests.of_path(node)
    tree.match([1, 2, 9, 9], "n")
    tree.evict(1)
    assert digests.of_path(node) == whole[:3]
    assert Digests(2).of_path(node) == whole[:3]
    assert Digests(2).of_path(tree.insert([1, 2, 3, 4], [7, 8], "other").node)[1] != whole[1]
