"""The radix tree of the prefix cache: token sequences to KV pages.

After RadixAttention (Zheng et al., "SGLang: Efficient Execution of Structured Language Model Programs",
2024): finished and running sequences leave their KV in a tree keyed by token ids, a new prompt reuses
the longest path it shares, and unlocked leaves are evicted when room is needed. Here edges hold whole
pages, so every length is a multiple of the page size.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

# Branches of one place that a continuation is looked for in.
_CHILDREN_LOOKED_AT = 64


class RadixNode:
    """One edge of the tree with the pages of its tokens. A plain handle to callers."""

    __slots__ = (
        "children", "end", "entry", "hits", "last_used", "locks", "namespace", "pages", "parent", "tokens",
    )  # fmt: skip

    def __init__(
        self, tokens: Sequence[int], pages: list[int], parent: RadixNode | None, namespace: str = ""
    ) -> None:
        self.tokens = tokens
        self.pages = pages
        self.parent = parent
        self.namespace: str = namespace if parent is None else parent.namespace
        self.end: int = len(tokens) + (0 if parent is None else parent.end)  # tokens from the root to here
        self.children: dict[tuple[int, ...], RadixNode] = {}
        self.locks = 0
        self.last_used = 0
        self.hits = 0
        self.entry = 0  # its latest entry in the heap of victims


@dataclass(slots=True)
class Match:
    """The longest cached prefix: ``pages`` in order, and the node to lock to keep them."""

    node: RadixNode
    pages: list[int]


@dataclass(slots=True)
class Insertion:
    """What ``insert`` did: the node that now ends the sequence, and the tree's pages for it.

    ``pages[:num_existing]`` were in the tree before; the caller keeps ownership of its own copies
    of those and has given the rest away.
    """

    node: RadixNode
    pages: list[int]
    num_existing: int


class RadixCache:
    """Longest-prefix lookup over cached pages, with locks and eviction.

    Lookups and insertions take time linear in the prefix. ``namespace`` keeps separate trees apart
    (tenants, adapters): equal tokens in two namespaces never meet.

    Args:
        page_size: tokens per page.
        policy: "lru" evicts the least recently used leaf, "lfu" the one with the fewest hits.

    Attributes:
        on_evict: called with a leaf, and how many of its last pages are about to leave.
    """

    def __init__(self, page_size: int, policy: str = "lru") -> None:
        self.page_size = page_size
        self._lfu = policy == "lfu"
        self._roots: dict[str, RadixNode] = {}
        self._clock = 0
        self._entry = 0
        self._heap: list[tuple[int, int, int, RadixNode]] = []  # rank, last_used, entry, leaf
        self.num_pages = 0
        self.num_evictable_pages = 0
        self.num_leaves = 0
        self.on_evict: Callable[[RadixNode, int], None] | None = None

    def match(self, tokens: Sequence[int], namespace: str = "", *, touch: bool = True) -> Match:
        """Find the longest cached prefix of ``tokens``, in whole pages.

        With ``touch`` the path counts as used now. A match that ends inside an edge splits it, so that
        exactly the matched part can be locked. The pages stay the tree's; lock the node before
        anything else may evict.
        """
        root = self._roots.get(namespace)
        if root is None:
            return Match(RadixNode((), [], None, namespace), [])
        node, _, rest = self._walk(root, tokens, touch)
        if rest is not None:
            node = self._split(rest[0], rest[1])
            if touch:
                self._touch(node)
        pages: list[int] = []
        for part in self.path(node):
            pages.extend(part.pages)
        return Match(node, pages)

    def prefix_length(self, tokens: Sequence[int], namespace: str = "") -> int:
        """Tokens of ``tokens`` that ``match`` would find; changes nothing."""
        root = self._roots.get(namespace)
        if root is None:
            return 0
        _, length, rest = self._walk(root, tokens, False)
        return length + (rest[1] if rest is not None else 0)

    def continuation(
        self, tokens: Sequence[int], limit: int, namespace: str = "", node: RadixNode | None = None
    ) -> list[int]:
        """What came after a sequence the last time: up to ``limit`` tokens that lie in the tree behind it.

        Changes nothing.

        Args:
            tokens: the sequence, or what of it lies beyond ``node``.
            node: a node of the tree that the sequence passes through; the namespace's root by default.
        """
        node = self._roots.get(namespace) if node is None else node
        if node is None:
            return []
        at = 0
        while len(tokens) - at >= self.page_size:
            child = node.children.get(self._key(tokens, at))
            if child is None:
                return []
            length = min(len(child.tokens), len(tokens) - at)
            if list(child.tokens[:length]) != list(tokens[at : at + length]):
                return []
            if length < len(child.tokens):
                return self._behind(child, length, limit)
            node, at = child, at + length
        rest = tuple(tokens[at:])
        # The latest first: its answer is the likeliest to be given again.
        for key in islice(reversed(node.children), _CHILDREN_LOOKED_AT):
            if key[: len(rest)] == rest:
                return self._behind(node.children[key], len(rest), limit)
        return []

    @staticmethod
    def _behind(node: RadixNode, at: int, limit: int) -> list[int]:
        """Tokens from place ``at`` of an edge on, down the latest branches."""
        found = list(node.tokens[at : at + limit])
        while len(found) < limit and node.children:
            node = node.children[next(reversed(node.children))]
            found += node.tokens[: limit - len(found)]
        return found

    def insert(self, tokens: Sequence[int], pages: Sequence[int], namespace: str = "") -> Insertion:
        """Put a sequence in the tree.

        Args:
            tokens: its length is a whole number of pages.
            pages: the page of each ``page_size`` tokens. The tree takes those beyond what it has.
        """
        if len(tokens) != len(pages) * self.page_size:
            raise ValueError(f"{len(tokens)} tokens do not fill {len(pages)} pages of {self.page_size}")
        root = self._roots.get(namespace)
        if root is None:
            root = self._roots[namespace] = RadixNode((), [], None, namespace)
        node, length, rest = self._walk(root, tokens, True)
        if rest is not None:
            length += rest[1]
            node = self._split(rest[0], rest[1])
            self._touch(node)
        num_existing = length // self.page_size
        if length < len(tokens):
            # A copy as a list, so that slices compare equal to those of other sequences whatever their type.
            leaf = RadixNode(list(tokens[length:]), list(pages[num_existing:]), node)
            node.children[self._key(tokens, length)] = leaf
            if node.parent is None or len(node.children) > 1:
                self.num_leaves += 1
            self.num_pages += len(leaf.pages)
            self.num_evictable_pages += len(leaf.pages)
            node = leaf
            self._touch(node)
        own: list[int] = []
        for part in self.path(node):
            own.extend(part.pages)
        return Insertion(node, own, num_existing)

    def count_hit(self, node: RadixNode) -> None:
        """Record that a request starts from ``node``, which it has locked; "lfu" ranks by this count.

        Kept apart from ``match``: a request that waits for room is matched again at every step.
        """
        for part in self.path(node):
            part.hits += 1

    def lock(self, node: RadixNode) -> None:
        """Keep the path to ``node`` from eviction until ``unlock``; locks are counted."""
        for part in self.path(node):
            if part.locks == 0:
                self.num_evictable_pages -= len(part.pages)
            part.locks += 1

    def unlock(self, node: RadixNode) -> None:
        for part in self.path(node):
            if part.locks == 0:
                raise ValueError("a prefix cache node was unlocked more often than locked")
            part.locks -= 1
            if part.locks == 0:
                self.num_evictable_pages += len(part.pages)
                self._offer(part)

    def evict(self, num_pages: int) -> list[int]:
        """Free ``num_pages`` pages, or as many as unlocked leaves hold; returns them.

        The last leaf touched loses only the tail that is needed, and stays useful as a shorter prefix.
        """
        freed: list[int] = []
        while len(freed) < num_pages:
            leaf = self._pop_victim()
            if leaf is None:
                break
            wanted = num_pages - len(freed)
            if self.on_evict is not None:
                self.on_evict(leaf, min(wanted, len(leaf.pages)))
            freed.extend(self._remove(leaf) if wanted >= len(leaf.pages) else self._shorten(leaf, wanted))
        return freed

    def trim_leaves(self, max_leaves: int) -> list[int]:
        """Drop unlocked leaves until at most ``max_leaves`` are left or all others are locked."""
        freed: list[int] = []
        while self.num_leaves > max_leaves:
            leaf = self._pop_victim()
            if leaf is None:
                break
            if self.on_evict is not None:
                self.on_evict(leaf, len(leaf.pages))
            freed.extend(self._remove(leaf))
        return freed

    def holds(self, node: RadixNode, end: int) -> bool:
        """Whether ``node``, which once ended a path of ``end`` tokens, is in the tree and still does."""
        return node.parent is not None and node.end == end

    def nodes(self) -> Iterator[RadixNode]:
        """Every edge of the tree, those above before those below."""
        return self._nodes()

    def pages(self) -> list[int]:
        """Every page the tree owns, for invariant checks."""
        return [page for node in self._nodes() for page in node.pages]

    def check(self) -> None:
        """Recount what is kept incrementally.

        Raises:
            AssertionError: a counter or the shape of the tree is wrong.
        """
        nodes = list(self._nodes())
        assert self.num_pages == sum(len(n.pages) for n in nodes)
        assert self.num_evictable_pages == sum(len(n.pages) for n in nodes if n.locks == 0)
        assert self.num_leaves == sum(1 for n in nodes if not n.children)
        for node in nodes:
            assert node.parent is not None and node.parent.children[self._key(node.tokens, 0)] is node
            assert len(node.tokens) == len(node.pages) * self.page_size > 0
            assert node.end == node.parent.end + len(node.tokens)
            assert node.parent.parent is None or node.parent.locks >= node.locks

    def _walk(
        self, root: RadixNode, tokens: Sequence[int], touch: bool
    ) -> tuple[RadixNode, int, tuple[RadixNode, int] | None]:
        """Deepest wholly matched node, its length, and a child matched in part with how far."""
        if touch:
            self._clock += 1
        node, length = root, 0
        while len(tokens) - length >= self.page_size:
            child = node.children.get(self._key(tokens, length))
            if child is None:
                break
            common = self._common(child.tokens, tokens, length)
            if common < len(child.tokens):
                return node, length, (child, common)
            node, length = child, length + common
            if touch:
                self._touch(node)
        return node, length, None

    def _key(self, tokens: Sequence[int], start: int) -> tuple[int, ...]:
        return tuple(tokens[start : start + self.page_size])

    def _common(self, edge: Sequence[int], tokens: Sequence[int], start: int) -> int:
        """Length of the common prefix of ``edge`` and ``tokens[start:]`` in whole pages."""
        limit = min(len(edge), len(tokens) - start)
        if list(edge[:limit]) == list(tokens[start : start + limit]):
            return limit - limit % self.page_size
        low, high = 0, limit  # edge[:low] agrees, edge[:high] does not
        while high - low > 1:
            middle = (low + high) // 2
            if list(edge[low:middle]) == list(tokens[start + low : start + middle]):
                low = middle
            else:
                high = middle
        return low - low % self.page_size

    def _split(self, node: RadixNode, length: int) -> RadixNode:
        """Cut an edge after ``length`` tokens. The lower part stays ``node``, which locks refer to."""
        assert node.parent is not None
        num_pages = length // self.page_size
        upper = RadixNode(node.tokens[:length], node.pages[:num_pages], node.parent)
        upper.locks, upper.last_used, upper.hits = node.locks, node.last_used, node.hits
        node.parent.children[self._key(node.tokens, 0)] = upper
        node.tokens, node.pages, node.parent = node.tokens[length:], node.pages[num_pages:], upper
        upper.children[self._key(node.tokens, 0)] = node
        return upper

    def _touch(self, node: RadixNode) -> None:
        node.last_used = self._clock
        self._offer(node)

    def _offer(self, node: RadixNode) -> None:
        """Enter an unlocked leaf among the victims; older entries of it become stale."""
        if node.locks or node.children or node.parent is None:
            return
        if len(self._heap) > 64 + 4 * self.num_leaves:
            self._heap = [e for e in self._heap if self._fresh(e)]
            heapq.heapify(self._heap)
        self._entry += 1
        node.entry = self._entry
        rank = node.hits if self._lfu else node.last_used
        heapq.heappush(self._heap, (rank, node.last_used, self._entry, node))

    def _fresh(self, entry: tuple[int, int, int, RadixNode]) -> bool:
        node = entry[3]
        return entry[2] == node.entry and node.parent is not None and not node.locks and not node.children

    def _pop_victim(self) -> RadixNode | None:
        while self._heap:
            entry = heapq.heappop(self._heap)
            if self._fresh(entry):
                return entry[3]
        return None

    def _remove(self, leaf: RadixNode) -> list[int]:
        parent = leaf.parent
        assert parent is not None
        del parent.children[self._key(leaf.tokens, 0)]
        leaf.parent = None
        self.num_pages -= len(leaf.pages)
        self.num_evictable_pages -= len(leaf.pages)
        self.num_leaves -= 1
        if parent.parent is not None and not parent.children:
            self.num_leaves += 1
            self._offer(parent)
        elif parent.parent is None and not parent.children:
            self._roots = {name: root for name, root in self._roots.items() if root is not parent}
        return leaf.pages

    def _shorten(self, leaf: RadixNode, num_pages: int) -> list[int]:
        kept = len(leaf.pages) - num_pages
        tail = leaf.pages[kept:]
        leaf.pages, leaf.tokens = leaf.pages[:kept], leaf.tokens[: kept * self.page_size]
        leaf.end -= num_pages * self.page_size
        self.num_pages -= num_pages
        self.num_evictable_pages -= num_pages
        self._offer(leaf)
        return tail

    @staticmethod
    def path(node: RadixNode) -> list[RadixNode]:
        """Nodes from below the root down to ``node``."""
        path: list[RadixNode] = []
        at: RadixNode | None = node
        while at is not None and at.parent is not None:
            path.append(at)
            at = at.parent
        path.reverse()
        return path

    def _nodes(self) -> Iterator[RadixNode]:
        stack = list(self._roots.values())
        while stack:
            node = stack.pop()
            stack.extend(node.children.values())
            if node.parent is not None:
                yield node
