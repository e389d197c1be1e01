"""The radix tree against a twin that stores every prefix of every sequence by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

from mini_sglang.engine.radix import RadixCache, RadixNode

from .fake_backend import examples

Prefix = tuple[str, tuple[int, ...]]  # namespace, tokens


@dataclass
class Stored:
    page: int
    locks: int = 0
    used: int = 0
    hits: int = 0


class Twin:
    """One entry per stored page, keyed by all tokens up to its end; ``ends`` are where edges end."""

    def __init__(self, page_size: int, lfu: bool) -> None:
        self.page_size = page_size
        self.lfu = lfu
        self.stored: dict[Prefix, Stored] = {}
        self.ends: set[Prefix] = set()
        self.clock = 0

    def path(self, namespace: str, tokens: Sequence[int]) -> list[Prefix]:
        """The stored prefixes of ``tokens``, shortest first."""
        found: list[Prefix] = []
        for end in range(self.page_size, len(tokens) + 1, self.page_size):
            prefix = (namespace, tuple(tokens[:end]))
            if prefix not in self.stored:
                break
            found.append(prefix)
        return found

    def touch(self, path: list[Prefix]) -> None:
        self.clock += 1
        for prefix in path:
            self.stored[prefix].used = self.clock

    def insert(self, namespace: str, tokens: Sequence[int], pages: Sequence[int]) -> tuple[list[int], int]:
        existing = self.path(namespace, tokens)
        if existing:
            self.ends.add(existing[-1])
        for index in range(len(existing), len(pages)):
            self.stored[(namespace, tuple(tokens[: (index + 1) * self.page_size]))] = Stored(pages[index])
        path = self.path(namespace, tokens)
        self.ends.add(path[-1])
        self.touch(path)
        return [self.stored[prefix].page for prefix in path], len(existing)

    def leaves(self) -> list[Prefix]:
        inner = {(name, tokens[: -self.page_size]) for name, tokens in self.stored}
        return [prefix for prefix in self.stored if prefix not in inner]

    def edge(self, leaf: Prefix) -> list[Prefix]:
        """The prefixes of the edge that ends in ``leaf``."""
        edge = [leaf]
        while True:
            above = (leaf[0], edge[0][1][: -self.page_size])
            if not above[1] or above in self.ends:
                return edge
            edge.insert(0, above)

    def victim(self) -> Prefix | None:
        free = [leaf for leaf in self.leaves() if self.stored[leaf].locks == 0]

        def rank(leaf: Prefix) -> tuple[int, int]:
            entry = self.stored[leaf]
            return (entry.hits, entry.used) if self.lfu else (entry.used, 0)

        assert len({rank(leaf) for leaf in free}) == len(free), "the twin's order must be total"
        return min(free, key=rank, default=None)

    def drop(self, edge: list[Prefix], count: int) -> list[int]:
        """Remove the last ``count`` pages of a leaf."""
        self.ends.discard(edge[-1])
        if count < len(edge):
            self.ends.add(edge[-count - 1])
        return [self.stored.pop(prefix).page for prefix in edge[len(edge) - count :]]

    def evict(self, num_pages: int) -> list[int]:
        freed: list[int] = []
        while len(freed) < num_pages and (leaf := self.victim()):
            edge = self.edge(leaf)
            freed += self.drop(edge, min(len(edge), num_pages - len(freed)))
        return freed

    def trim(self, max_leaves: int) -> list[int]:
        freed: list[int] = []
        while len(self.leaves()) > max_leaves and (leaf := self.victim()):
            edge = self.edge(leaf)
            freed += self.drop(edge, len(edge))
        return freed


# A cut of a sequence seen before, with a few tokens after it, so that prefixes of all lengths are shared.
sequences = st.tuples(
    st.integers(0, 7), st.integers(0, 20), st.lists(st.sampled_from([1, 1, 2, 3]), max_size=8)
)
names = st.sampled_from(["", "", "", "tenant"])


class RadixMachine(RuleBasedStateMachine):
    locks = Bundle("locks")

    @initialize(page_size=st.sampled_from([1, 2, 4]), policy=st.sampled_from(["lru", "lfu"]))
    def start(self, page_size: int, policy: str) -> None:
        self.page_size = page_size
        self.tree = RadixCache(page_size, policy)
        self.twin = Twin(page_size, policy == "lfu")
        self.next_page = 0
        self.known = [[1] * 20, [1] * 8 + [2] * 12]

    def tokens(self, sequence: tuple[int, int, list[int]]) -> list[int]:
        pick, cut, tail = sequence
        tokens = [*self.known[pick % len(self.known)][:cut], *tail]
        self.known = [*self.known[:2], *self.known[2:][-6:], tokens]
        return tokens

    @rule(sequence=sequences, namespace=names, kind=st.sampled_from([list, tuple]))
    def insert(self, sequence: tuple[int, int, list[int]], namespace: str, kind: type) -> None:
        tokens = self.tokens(sequence)
        count = len(tokens) // self.page_size
        if count == 0:
            return
        tokens = tokens[: count * self.page_size]
        pages = list(range(self.next_page, self.next_page + count))
        self.next_page += count
        done = self.tree.insert(kind(tokens), pages, namespace)
        assert (done.pages, done.num_existing) == self.twin.insert(namespace, tokens, pages)

    @precondition(lambda self: self.twin.stored)
    @rule(
        pick=st.integers(0, 100),
        cut=st.integers(0, 3),
        tail=st.lists(st.integers(1, 3), max_size=5),
        touch=st.booleans(),
        lock=st.booleans(),
        target=locks,
    )
    def match(self, pick: int, cut: int, tail: list[int], touch: bool, lock: bool) -> object:
        """Look up a prefix that is stored, less a few tokens and with others in their place."""
        stored = list(self.twin.stored)
        namespace, start = stored[pick % len(stored)]
        tokens = [*start[: len(start) - cut], *tail]
        path = self.twin.path(namespace, tokens)
        assert self.tree.prefix_length(tokens, namespace) == len(path) * self.page_size
        found = self.tree.match(tokens, namespace, touch=touch)
        assert found.pages == [self.twin.stored[prefix].page for prefix in path]
        if path:
            self.twin.ends.add(path[-1])
        if touch:
            self.twin.touch(path)
        if not lock:
            return multiple()
        self.tree.lock(found.node)
        for prefix in path:
            self.twin.stored[prefix].locks += 1
        return (found.node, path)

    @rule(lock=locks)
    def count_hit(self, lock: tuple[RadixNode, list[Prefix]]) -> None:
        self.tree.count_hit(lock[0])
        for prefix in lock[1]:
            self.twin.stored[prefix].hits += 1

    @rule(lock=consumes(locks))
    def unlock(self, lock: tuple[RadixNode, list[Prefix]]) -> None:
        self.tree.unlock(lock[0])
        for prefix in lock[1]:
            self.twin.stored[prefix].locks -= 1

    @precondition(lambda self: self.twin.stored)
    @rule(count=st.integers(0, 6))
    def evict(self, count: int) -> None:
        assert sorted(self.tree.evict(count)) == sorted(self.twin.evict(count))

    @precondition(lambda self: self.twin.stored)
    @rule(count=st.integers(0, 6))
    def trim(self, count: int) -> None:
        assert sorted(self.tree.trim_leaves(count)) == sorted(self.twin.trim(count))

    @invariant()
    def agrees(self) -> None:
        self.tree.check()
        stored = self.twin.stored
        assert sorted(self.tree.pages()) == sorted(entry.page for entry in stored.values())
        assert self.tree.num_pages == len(stored)
        assert self.tree.num_evictable_pages == sum(entry.locks == 0 for entry in stored.values())
        assert self.tree.num_leaves == len(self.twin.leaves())
        for namespace, tokens in stored:
            assert self.tree.prefix_length(tokens, namespace) == len(tokens)
        by_page = {entry.page: entry for entry in stored.values()}
        for node in self.tree._nodes():
            counts = {(by_page[page].locks, by_page[page].hits) for page in node.pages}
            assert counts == {(node.locks, node.hits)}
        # Two clocks, one order.
        times = sorted({(by_page[page].used, n.last_used) for n in self.tree._nodes() for page in n.pages})
        assert len({used for used, _ in times}) == len({last for _, last in times}) == len(times)
        assert [last for _, last in times] == sorted(last for _, last in times)


TestRadix = RadixMachine.TestCase
TestRadix.settings = examples(150, 40)


def cache(policy: str = "lru", page_size: int = 2) -> RadixCache:
    return RadixCache(page_size, policy)


def test_equal_first_pages_split_where_tokens_differ() -> None:
    tree = cache()
    tree.insert([1, 2, 3, 4, 5, 6], [10, 11, 12])
    done = tree.insert([1, 2, 3, 4, 7, 8], [20, 21, 22])
    assert (done.pages, done.num_existing) == ([10, 11, 22], 2)
    assert tree.match([1, 2, 3, 4, 5, 9]).pages == [10, 11]
    assert tree.match([1, 2, 3]).pages == [10]
    assert tree.num_leaves == 2


def test_a_split_under_a_lock_keeps_both_halves_locked() -> None:
    tree = cache()
    node = tree.insert([1, 2, 3, 4], [0, 1]).node
    tree.lock(node)
    upper = tree.match([1, 2, 9, 9]).node
    assert tree.evict(9) == []
    tree.lock(upper)
    tree.unlock(node)
    assert tree.evict(9) == [1]
    tree.unlock(upper)
    assert tree.evict(9) == [0]


def test_eviction_takes_the_tail_it_needs_and_no_more() -> None:
    tree = cache()
    tree.insert([1, 2, 3, 4, 5, 6], [0, 1, 2])
    assert tree.evict(1) == [2]
    assert tree.match([1, 2, 3, 4, 5, 6]).pages == [0, 1]


@pytest.mark.parametrize(("policy", "kept"), [("lru", [1, 1]), ("lfu", [2, 2])])
def test_policies_differ(policy: str, kept: list[int]) -> None:
    tree = cache(policy)
    tree.insert([1, 1], [1])
    tree.insert([2, 2], [2])
    for _ in range(3):
        node = tree.match([2, 2]).node
        tree.lock(node)
        tree.count_hit(node)
        tree.unlock(node)
    tree.match([1, 1])
    tree.evict(1)
    assert tree.prefix_length(kept) == 2 and tree.num_pages == 1


def test_matching_without_starting_is_no_hit() -> None:
    tree = cache("lfu")
    tree.insert([1, 1], [1])
    tree.insert([2, 2], [2])
    node = tree.match([1, 1]).node
    tree.lock(node)
    tree.count_hit(node)
    tree.unlock(node)
    for _ in range(5):
        tree.match([2, 2])
    assert tree.evict(1) == [2]


def test_unlock_without_lock_raises() -> None:
    tree = cache()
    node = tree.insert([1, 2], [0]).node
    with pytest.raises(ValueError, match="unlocked more often"):
        tree.unlock(node)


def test_insert_refuses_part_of_a_page() -> None:
    with pytest.raises(ValueError, match="3 tokens do not fill 1 pages of 2"):
        cache().insert([1, 2, 3], [0])


def test_memory_stays_flat_over_many_locks_and_namespaces() -> None:
    tree = cache()
    tree.insert([1, 2], [0])
    for turn in range(3000):
        node = tree.match([1, 2], touch=turn % 2 == 0).node
        tree.lock(node)
        tree.unlock(node)
    assert len(tree._heap) <= 64 + 4 * tree.num_leaves + 1
    for turn in range(200):
        tree.insert([1, 2], [1], f"tenant {turn}")
        assert tree.evict(2)
    assert tree._roots == {}
