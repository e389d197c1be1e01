"""The way between the pool and the host tier: what leaves the tree goes there, and comes back in need."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from mini_sglang.backend.step import PageStore, Transfer
from mini_sglang.engine.host_tier import HostPage, HostTier
from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.radix import Match, RadixCache, RadixNode

# A copy of fewer bytes is over sooner than a request could be told to wait a step for it.
INLINE_BYTES = 16 << 20


@dataclass(slots=True, eq=False)
class Arrival:
    """Pages on their way from the host to behind ``node``, which is locked until they are there."""

    node: RadixNode
    tokens: Sequence[int]
    host_pages: list[HostPage]
    pages: list[int]
    transfer: Transfer


class HostLink:
    """Moves pages between a tree and its host tier.

    Args:
        store: its host side is open, with the tier's slots.
        make_room: sees to it that so many pages of the pool are free, where that many can be had.

    Attributes:
        arrivals: what is on its way back; its pages belong to neither tree nor free list.
        hits, restored: times that something was brought back, and pages that came.
    """

    def __init__(
        self,
        tier: HostTier,
        tree: RadixCache,
        pages: PageAllocator,
        store: PageStore,
        make_room: Callable[[int], None],
    ) -> None:
        self.tier = tier
        self.arrivals: list[Arrival] = []
        self.hits = 0
        self.restored = 0
        self._tree = tree
        self._pages = pages
        self._store = store
        self._make_room = make_room
        tree.on_evict = tier.note

    @property
    def num_arriving(self) -> int:
        return sum(len(arrival.pages) for arrival in self.arrivals)

    def spill(self) -> None:
        """Copy what the tree has just let go of; its pages may be written after this."""
        leaving, slots = self.tier.leaving()
        if leaving:
            self._store.spill(leaving, slots)

    def awaits(self, match: Match, tokens: Sequence[int]) -> bool:
        """Whether what continues ``match`` on the way of ``tokens`` is coming already."""
        if not self.arrivals:
            return False
        key = self.tier.following(match.node, tokens)
        return any(arrival.host_pages[0].key == key for arrival in self.arrivals)

    def find(self, match: Match, tokens: Sequence[int], page_size: int) -> list[bytes]:
        """What the tier has behind ``match`` on the way of ``tokens``, for ``bring``."""
        return self.tier.find(match.node, tokens, len(tokens) // page_size)

    def bring(self, match: Match, tokens: Sequence[int], keys: Sequence[bytes], *, busy: bool) -> bool:
        """Copy pages back to behind ``match``, whose node is locked and unlocked once they are in the tree.

        True while that goes on, which it does only with ``busy``.
        """
        taken = self.tier.take(keys)  # before others take their slots
        self._make_room(len(taken))
        pages = self._pages.allocate(len(taken))
        background = busy and len(pages) * self._store.page_bytes > INLINE_BYTES
        transfer = self._store.restore([page.slot for page in taken], pages, background=background)
        end = match.node.end + sum(len(page.tokens) for page in taken)
        arrival = Arrival(match.node, tokens[:end], taken, pages, transfer)
        self.hits += 1
        if background:
            self.arrivals.append(arrival)
        else:
            self._arrive(arrival)
        return background

    def settle(self, *, wait: bool = False) -> None:
        """Put the pages that have come in the tree; with ``wait`` all that are on their way."""
        for arrival in list(self.arrivals):
            if wait or arrival.transfer.done:
                self.arrivals.remove(arrival)
                self._arrive(arrival)

    def check(self) -> None:
        """Raises AssertionError where a slot is lost or has two pages."""
        self.tier.check()
        assert self.tier.num_taken == self.num_arriving

    def _arrive(self, arrival: Arrival) -> None:
        arrival.transfer.wait()
        node, fresh = arrival.node, arrival.pages
        # What lies before is locked, hence still there: its pages need no names.
        start = len(arrival.tokens) // self._tree.page_size - len(fresh)
        done = self._tree.insert(arrival.tokens, [*[-1] * start, *fresh], node.namespace)
        # Somebody may have computed the same meanwhile.
        self._pages.free(fresh[: max(0, done.num_existing - start)])
        done.node.hits = max(done.node.hits, min(page.hits for page in arrival.host_pages))
        self._tree.unlock(node)
        self.restored += len(fresh)
        self.tier.free(arrival.host_pages)
