"""Who comes before whom: priorities with ageing, and a line of waiters kept in that order."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import attrgetter
from typing import Generic, Protocol, TypeVar

Order = tuple[float, float, int]
"""Smaller comes first. It never changes while a request lives, so nothing need be sorted again."""


def order_of(arrival: float, priority: int, aging_seconds: float, serial: int) -> Order:
    """The place of a request among all others.

    A step of priority is worth ``aging_seconds`` of waiting, so a request counts as if it had arrived
    that much earlier: every waiting request ages at the same rate, and comparing two of them gives the
    same at any time. A request is overtaken only by those that come within ``aging_seconds`` times the
    difference of priorities after it. With 0 there is no ageing: the higher priority always goes first.

    Args:
        arrival: seconds, of a clock that all requests of one line share.
        serial: different for each; decides between requests that are equal in all else.
    """
    if aging_seconds == 0:
        return (float(-priority), arrival, serial)
    return (arrival - priority * aging_seconds, arrival, serial)


class Ordered(Protocol):
    @property
    def order(self) -> Order: ...


T = TypeVar("T", bound=Ordered)
_order_of = attrgetter("order")


class Line(Generic[T]):
    """Waiting items, first to last. Adding and removing one compares it with O(log n) others."""

    def __init__(self) -> None:
        self._items: list[T] = []

    def add(self, item: T) -> None:
        insort(self._items, item, key=_order_of)

    def remove(self, item: T) -> None:
        """Raises ``ValueError`` where it is not here."""
        at = bisect_left(self._items, item.order, key=_order_of)
        if at == len(self._items) or self._items[at] is not item:
            raise ValueError("not in line")
        del self._items[at]

    def pop(self, at: int = 0) -> T:
        return self._items.pop(at)

    def clear(self) -> None:
        self._items.clear()

    def __getitem__(self, at: int) -> T:
        return self._items[at]

    def __len__(self) -> int:
        return len(self._items)

    def __iter__(self) -> Iterator[T]:
        return iter(self._items)
