"""The second tier of the prefix cache: pages that left the pool, in host memory, found again by their tokens.

A page is known by a digest of everything it depends on: the namespace and all tokens up to its end. So it
needs no tree of its own: after the longest prefix that the radix tree has, the digests of the pages that
follow are looked up one by one.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.radix import RadixCache, RadixNode


@dataclass(slots=True, eq=False)
class HostPage:
    """A page in host memory; ``above`` is the digest of the page before it, or of the namespace."""

    key: bytes
    above: bytes
    namespace: str
    tokens: Sequence[int]
    slot: int
    hits: int
    last_used: int
    depth: int  # pages before it
    entry: int = 0  # its latest entry in the heap of victims


class Digests:
    """Digests of the pages of a path of the tree. It remembers the last path it was asked for."""

    def __init__(self, page_size: int) -> None:
        self._page_size = page_size
        self._node: RadixNode | None = None
        self._keys: list[bytes] = []

    @staticmethod
    def root(namespace: str) -> bytes:
        return blake2b(namespace.encode(), digest_size=32).digest()

    @staticmethod
    def next(above: bytes, tokens: Sequence[int]) -> bytes:
        """Of the page with ``tokens`` after the one of digest ``above``."""
        return blake2b(above + array("i", tokens).tobytes(), digest_size=32).digest()

    def of_path(self, node: RadixNode) -> list[bytes]:
        """That of the namespace, then one for each page from the root to the end of ``node``."""
        size = self._page_size
        # A node's path changes in one way only: it gets shorter.
        if self._node is not node or len(self._keys) <= node.end // size:
            keys = [self.root(node.namespace)]
            for part in RadixCache.path(node):
                for start in range(0, len(part.tokens), size):
                    keys.append(self.next(keys[-1], part.tokens[start : start + size]))
            self._node, self._keys = node, keys
        return self._keys[: node.end // size + 1]


class HostTier:
    """Which page lies in which of the host's slots, and which goes when one more is to come.

    Least recently used goes first, or with "lfu" the one with the fewest hits, and of equal ones the deepest,
    since nothing can start from a page without those before it. ``num_free + num_used == num_slots``; used
    are the pages that can be found and those on their way back (``take``).
    """

    def __init__(self, num_slots: int, page_size: int, policy: str) -> None:
        self._slots = PageAllocator(num_slots)
        self._page_size = page_size
        self._lfu = policy == "lfu"
        self._pages: dict[bytes, HostPage] = {}
        self._leaving: dict[int, int] = {}  # slot: the page of the pool that goes there
        self._heap: list[tuple[tuple[int, int, int], int, HostPage]] = []
        self._entry = 0
        self._evicted_paths = Digests(page_size)
        self._matched_paths = Digests(page_size)
        self.num_taken = 0
        self.spilled = 0
        self.dropped = 0

    @property
    def num_slots(self) -> int:
        return self._slots.num_pages

    @property
    def num_used(self) -> int:
        return self._slots.num_pages - self._slots.num_free

    def note(self, leaf: RadixNode, count: int) -> None:
        """Take in the last ``count`` pages of a leaf; ``leaving`` tells what to copy then."""
        keys, size = self._evicted_paths.of_path(leaf), self._page_size
        first = len(leaf.pages) - count
        depth = len(keys) - 1 - count
        for place in range(count):
            tokens = leaf.tokens[(first + place) * size : (first + place + 1) * size]
            page = HostPage(
                key=keys[depth + place + 1],
                above=keys[depth + place],
                namespace=leaf.namespace,
                tokens=tokens,
                slot=-1,
                hits=leaf.hits,
                last_used=leaf.last_used,
                depth=depth + place,
            )
            if self.put(page):
                self._leaving[page.slot] = leaf.pages[first + place]

    def leaving(self) -> tuple[list[int], list[int]]:
        """Pages of the pool to be copied now, and the slot of each."""
        slots, pages = list(self._leaving), list(self._leaving.values())
        self._leaving.clear()
        return pages, slots

    def put(self, page: HostPage) -> bool:
        """Find a slot for a page and set it; False where it is there already, or everything outranks it."""
        known = self._pages.get(page.key)
        if known is not None:
            known.hits, known.last_used = max(known.hits, page.hits), max(known.last_used, page.last_used)
            self._offer(known)
            return False
        if self._slots.num_free == 0:
            victim = self._victim()
            if victim is None or self._rank(victim) > self._rank(page):
                self.dropped += 1
                if victim is not None:
                    self._offer(victim)
                return False
            self._forget(victim)
            self.dropped += 1
        page.slot = self._slots.allocate(1)[0]
        self._pages[page.key] = page
        self._offer(page)
        self.spilled += 1
        return True

    def find(self, node: RadixNode, tokens: Sequence[int], limit: int) -> list[bytes]:
        """Digests of the pages that follow ``node`` on the way of ``tokens``, none from ``limit`` on."""
        found: list[bytes] = []
        if not self._pages:
            return found
        size = self._page_size
        start = node.end // size
        key = self._matched_paths.of_path(node)[-1]
        for page in range(start, limit):
            key = Digests.next(key, tokens[page * size : (page + 1) * size])
            if key not in self._pages:
                break
            found.append(key)
        return found

    def following(self, node: RadixNode, tokens: Sequence[int]) -> bytes | None:
        """The digest of the one page that follows ``node`` on the way of ``tokens``."""
        end = node.end + self._page_size
        if end > len(tokens):
            return None
        return Digests.next(self._matched_paths.of_path(node)[-1], tokens[node.end : end])

    def take(self, keys: Sequence[bytes]) -> list[HostPage]:
        """Take pages out; their slots stay used until ``free``."""
        taken = [self._pages.pop(key) for key in keys]
        for page in taken:
            page.entry = 0
        self.num_taken += len(taken)
        return taken

    def free(self, pages: Sequence[HostPage]) -> None:
        """Let go of pages that were taken."""
        self._slots.free(page.slot for page in pages)
        self.num_taken -= len(pages)

    def clear(self) -> int:
        """Drop every page that is not on its way back; returns how many."""
        count = len(self._pages)
        for page in list(self._pages.values()):
            self._forget(page)
        return count

    def pages(self) -> list[HostPage]:
        """Every page that can be found, those nearer the root first."""
        return sorted(self._pages.values(), key=lambda page: page.depth)

    def check(self) -> None:
        """Verify that every slot is free or has one page.

        Raises:
            AssertionError: it is not so.
        """
        slots = [page.slot for page in self._pages.values()]
        assert len(set(slots)) == len(slots), "a host slot has two pages"
        assert not set(slots) & self._slots.free_pages(), "a host page lies in a free slot"
        assert len(slots) + self.num_taken == self.num_used, "a host slot is lost"
        assert self._slots.num_free + self.num_used == self.num_slots
        assert not self._leaving, "a page was to be copied and was not"

    def _rank(self, page: HostPage) -> tuple[int, int, int]:
        return (page.hits if self._lfu else 0, page.last_used, -page.depth)

    def _offer(self, page: HostPage) -> None:
        if len(self._heap) > 64 + 4 * self.num_slots:
            self._heap = [item for item in self._heap if item[2].entry == item[1]]
            heapq.heapify(self._heap)
        self._entry += 1
        page.entry = self._entry
        heapq.heappush(self._heap, (self._rank(page), self._entry, page))

    def _victim(self) -> HostPage | None:
        while self._heap:
            _, entry, page = heapq.heappop(self._heap)
            if page.entry == entry:
                return page
        return None

    def _forget(self, page: HostPage) -> None:
        del self._pages[page.key]
        page.entry = 0
        self._leaving.pop(page.slot, None)
        self._slots.free([page.slot])
