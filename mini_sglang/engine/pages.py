"""The free list of the KV pool's pages."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


class PageAllocator:
    """Hands out page ids ``0 … num_pages - 1``; each page has one owner at a time.

    A page is free, or owned by one request, or owned by the radix tree (which requests then share for
    reading).
    """

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        # A stack that gives ascending ids first, so that a fresh sequence lies in one stretch of memory.
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_free = bytearray(b"\x01") * num_pages

    @property
    def num_free(self) -> int:
        return len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Take ``count`` pages.

        Raises:
            MemoryError: fewer than ``count`` are free; none is taken then.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} KV pages wanted, {len(self._free)} free")
        if count == 0:
            return []
        taken = self._free[-count:]
        del self._free[-count:]
        taken.reverse()
        for page in taken:
            self._is_free[page] = 0
        return taken

    def free(self, pages: Sequence[int] | Iterable[int]) -> None:
        """Give pages back.

        Raises:
            ValueError: a page is free already, which means that two owners believed they held it.
        """
        for page in pages:
            if self._is_free[page]:
                raise ValueError(f"KV page {page} was freed twice")
            self._is_free[page] = 1
            self._free.append(page)

    def free_pages(self) -> frozenset[int]:
        """The free page ids, for invariant checks."""
        return frozenset(self._free)
