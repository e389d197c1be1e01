"""Prompts computed whole: what is left to do when one of them comes again is to choose a token.

An entry owns a copy of the prompt's last, partly filled page and the logits of its last token; its whole
pages are the radix tree's, which may drop them: the entry then is of no use.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass

from mini_sglang.engine.radix import RadixCache, RadixNode

PromptKey = tuple[str, tuple[int, ...]]
"""Namespace and token ids."""


@dataclass(slots=True, eq=False)
class PromptEntry:
    """One prompt.

    Attributes:
        node: the radix node that ends its whole pages, ``end`` tokens.
        tail: the page of the tokens after those; None where there are none.
        slot: the number its logits are kept under.
    """

    key: PromptKey
    node: RadixNode
    end: int
    tail: int | None
    slot: int


class PromptCache:
    """The least recently used entries make room: at most ``size`` of them, ``token_budget`` tokens in all.

    Pages go in and come out as numbers; whoever calls frees those that are given back.
    """

    def __init__(self, size: int, token_budget: int) -> None:
        self._size = size
        self._token_budget = token_budget
        self._entries: OrderedDict[PromptKey, PromptEntry] = OrderedDict()
        self._free_slots = list(range(size - 1, -1, -1))
        self.num_tokens = 0
        self.num_pages = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: PromptKey) -> PromptEntry | None:
        return self._entries.get(key)

    def touch(self, entry: PromptEntry) -> None:
        """Count it as used now."""
        self._entries.move_to_end(entry.key)

    def reserve(self, num_tokens: int) -> tuple[int | None, list[int]]:
        """A slot for the logits of a prompt that is about to be computed, None where it cannot be had.

        Also gives pages that are now free. The slot goes to ``put`` or ``give_back``.
        """
        if num_tokens > self._token_budget:
            return None, []
        pages: list[int] = []
        if not self._free_slots and self._entries:
            pages = self._evict_oldest()
        return (self._free_slots.pop() if self._free_slots else None), pages

    def give_back(self, slot: int) -> None:
        self._free_slots.append(slot)

    def put(self, entry: PromptEntry) -> list[int]:
        """Keep an entry, whose slot is from ``reserve``; gives pages that are now free."""
        known = self._entries.get(entry.key)
        pages = self.drop(known) if known is not None else []
        self._entries[entry.key] = entry
        self.num_tokens += len(entry.key[1])
        self.num_pages += entry.tail is not None
        while self.num_tokens > self._token_budget:
            pages += self._evict_oldest()
        return pages

    def drop(self, entry: PromptEntry) -> list[int]:
        """Forget an entry; gives its page."""
        del self._entries[entry.key]
        self._free_slots.append(entry.slot)
        self.num_tokens -= len(entry.key[1])
        if entry.tail is None:
            return []
        self.num_pages -= 1
        return [entry.tail]

    def prune(self, tree: RadixCache) -> list[int]:
        """Forget entries whose whole pages the tree has dropped; gives their pages."""
        stale = [
            entry for entry in self._entries.values() if entry.end and not tree.holds(entry.node, entry.end)
        ]
        self.evictions += len(stale)
        return [page for entry in stale for page in self.drop(entry)]

    def evict(self, num_pages: int) -> list[int]:
        """Forget entries until they have given ``num_pages`` pages, or none is left."""
        pages: list[int] = []
        while len(pages) < num_pages and self._entries:
            pages += self._evict_oldest()
        return pages

    def clear(self) -> list[int]:
        """Forget all; gives their pages."""
        return [page for entry in list(self._entries.values()) for page in self.drop(entry)]

    def pages(self) -> list[int]:
        """Every page the entries own, for invariant checks."""
        return [entry.tail for entry in self._entries.values() if entry.tail is not None]

    def check(self, reserved: Iterable[int]) -> None:
        """Recount; ``reserved`` are the slots that ``reserve`` gave and that are still out.

        Raises:
            AssertionError: a counter is off, or a slot is lost or used twice.
        """
        entries = self._entries.values()
        assert self.num_tokens == sum(len(entry.key[1]) for entry in entries) <= self._token_budget
        assert self.num_pages == len(self.pages())
        slots = [*self._free_slots, *(entry.slot for entry in entries), *reserved]
        assert sorted(slots) == list(range(self._size)), "a logits slot is lost or used twice"

    def _evict_oldest(self) -> list[int]:
        self.evictions += 1
        return self.drop(next(iter(self._entries.values())))
