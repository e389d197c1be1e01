"""What a request gave up while a step that uses it was under way."""

from __future__ import annotations

from collections.abc import Sequence

from mini_sglang.engine.radix import RadixNode


class Limbo:
    """Pages and locks that become free when the step that was submitted last, as they came, is done.

    Attributes:
        newest: the number of the step submitted last; numbers ascend.
    """

    def __init__(self) -> None:
        self.newest = 0
        self._pages: list[tuple[int, Sequence[int]]] = []
        self._nodes: list[tuple[int, RadixNode]] = []

    def hold(self, pages: Sequence[int]) -> None:
        """Keep pages that nobody else may have yet."""
        if pages:
            self._pages.append((self.newest, pages))

    def hold_node(self, node: RadixNode) -> None:
        """Keep a node of the tree locked."""
        self._nodes.append((self.newest, node))

    def landed(self, number: int) -> tuple[list[int], list[RadixNode]]:
        """Give out what waited for steps up to this number: pages, and nodes to be unlocked."""
        pages = [page for at, held in self._pages if at <= number for page in held]
        nodes = [node for at, node in self._nodes if at <= number]
        self._pages = [entry for entry in self._pages if entry[0] > number]
        self._nodes = [entry for entry in self._nodes if entry[0] > number]
        return pages, nodes

    def pages(self) -> list[int]:
        """Every page that is held, for invariant checks."""
        return [page for _, held in self._pages for page in held]

    def nodes(self) -> list[RadixNode]:
        """Every node that is held locked, for invariant checks."""
        return [node for _, node in self._nodes]
