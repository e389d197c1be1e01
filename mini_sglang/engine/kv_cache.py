"""Who owns which KV page: the pages of running requests, and the prefix cache they leave behind."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.radix import RadixCache
from mini_sglang.engine.request import Request


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """What the prefix cache may hold; see the settings of the same names.

    ``max_leaves`` 0 is no bound. ``token_budget`` counts cached tokens that no running request uses.
    """

    enabled: bool = True
    max_leaves: int = 0
    max_prompt_tokens: int = 4096
    token_budget: int = 65536
    policy: str = "lru"


class KVCacheManager:
    """Gives requests their pages, from the prefix cache where it can, and takes them back.

    Every page is free, in the tree, or private to one running request, so
    ``num_free + num_cached + num_private == num_pages`` at any moment; ``check`` verifies it.
    """

    def __init__(self, num_pages: int, page_size: int, limits: CacheLimits) -> None:
        self.page_size = page_size
        self.limits = limits
        self._pages = PageAllocator(num_pages)
        self._tree = RadixCache(page_size, limits.policy)
        self.num_private = 0
        self.evicted_tokens = 0

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_free(self) -> int:
        return self._pages.num_free

    @property
    def num_cached(self) -> int:
        """Pages the tree owns, in use or not."""
        return self._tree.num_pages

    @property
    def num_available(self) -> int:
        """Pages that could be had now: free ones and those of unlocked prefixes."""
        return self._pages.num_free + self._tree.num_evictable_pages

    @property
    def num_prefixes(self) -> int:
        return self._tree.num_leaves

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cached_prefix(self, request: Request) -> int:
        """Tokens of ``request`` that ``attach`` would find; changes nothing."""
        return self._tree.prefix_length(self._reusable(request), request.namespace)

    def attach(self, request: Request) -> int:
        """Lock the longest cached prefix for a request that holds no pages; returns its tokens.

        At least one token is left to compute, since the next one is sampled from its logits.
        """
        match = self._tree.match(self._reusable(request), request.namespace)
        self._tree.lock(match.node)
        request.node = match.node
        request.pages = array("i", match.pages)
        request.num_tree_pages = len(match.pages)
        request.num_computed = len(match.pages) * self.page_size
        return request.num_computed

    def count_hit(self, request: Request) -> None:
        """Record, once per request, that it starts from the prefix ``attach`` found."""
        if request.node is not None:
            self._tree.count_hit(request.node)

    def extend(self, request: Request, num_tokens: int) -> bool:
        """Grow the page table to hold ``num_tokens`` tokens, evicting unlocked prefixes if need be.

        Returns False, and changes nothing for the request, when the pages cannot be had.
        """
        missing = -(-num_tokens // self.page_size) - len(request.pages)
        if missing <= 0:
            return True
        if missing > self.num_available:
            return False
        self._evict(missing - self._pages.num_free)
        request.pages.extend(self._pages.allocate(missing))
        self.num_private += missing
        return True

    def extend_for_drafts(self, request: Request, num_tokens: int) -> int:
        """Grow the page table towards ``num_tokens`` tokens; returns what it holds.

        A guess takes free pages. Where there are none one page is evicted, which the request would soon
        need in any case.
        """
        missing = self.pages_for(num_tokens) - len(request.pages)
        missing = min(missing, max(1, self._pages.num_free), self.num_available)
        if missing > 0:
            self.extend(request, (len(request.pages) + missing) * self.page_size)
        return len(request.pages) * self.page_size

    def give_back(self, request: Request) -> None:
        """Free the pages behind a request's last token, which wrong drafts were written to."""
        kept = self.pages_for(len(request.tokens))
        if len(request.pages) > kept:
            self._drop_private(request.pages[kept:])
            del request.pages[kept:]

    def continuation(self, request: Request, limit: int) -> list[int]:
        """Up to ``limit`` tokens that followed all of a running request's the last time it was asked."""
        # Of a request that shares nothing the node may be none of the tree's.
        node = request.node if request.num_tree_pages else None
        behind = request.tokens[request.num_tree_pages * self.page_size :]
        return self._tree.continuation(behind, limit, request.namespace, node)

    def publish(self, request: Request) -> None:
        """Share the whole computed pages of a running request, so that others can start from them.

        Where another request published the same tokens first, its pages replace ours.
        """
        num_pages = request.num_computed // self.page_size
        if not self._insertable(request) or num_pages <= request.num_tree_pages:
            return
        done = self._tree.insert(
            request.tokens[: num_pages * self.page_size], request.pages[:num_pages], request.namespace
        )
        self._tree.lock(done.node)
        duplicates = request.pages[request.num_tree_pages : done.num_existing]
        self._drop_private(duplicates)
        self.num_private -= num_pages - max(done.num_existing, request.num_tree_pages)
        if request.node is not None:
            self._tree.unlock(request.node)
        request.node = done.node
        request.pages[:num_pages] = array("i", done.pages)
        request.num_tree_pages = num_pages
        self._trim()

    def release(self, request: Request, *, keep: bool) -> None:
        """Take all pages back from a request that stops running.

        With ``keep`` its computed KV stays in the prefix cache, where the limits allow.
        """
        if keep:
            self.publish(request)
        self._drop_private(request.pages[request.num_tree_pages :])
        if request.node is not None:
            self._tree.unlock(request.node)
        request.node = None
        request.pages = array("i")
        request.num_tree_pages = 0
        request.num_computed = 0
        self._trim()

    def clear(self) -> int:
        """Drop every prefix that no running request uses; returns the tokens dropped."""
        before = self._pages.num_free
        self._evict(self._tree.num_evictable_pages)
        return (self._pages.num_free - before) * self.page_size

    def check(self, running: Iterable[Request] = ()) -> None:
        """Verify that every page has exactly one owner.

        Raises:
            AssertionError: a page is lost, owned twice, or a counter is off.
        """
        self._tree.check()
        free = self._pages.free_pages()
        tree = self._tree.pages()
        private = [page for r in running for page in r.pages[r.num_tree_pages :]]
        owned = [*free, *tree, *private]
        assert len(owned) == len(set(owned)), "a KV page has two owners"
        assert len(owned) == self.num_pages, "a KV page is lost"
        assert self.num_private == len(private)
        assert self.num_free + self.num_cached + self.num_private == self.num_pages
        for request in running:
            shared = request.pages[: request.num_tree_pages]
            assert set(shared) <= set(tree), "a running request reads a page that was evicted"

    def _reusable(self, request: Request) -> Sequence[int]:
        if not self.limits.enabled or request.wants_prompt_logprobs:
            return ()
        return request.tokens[: len(request.tokens) - 1]

    def _insertable(self, request: Request) -> bool:
        return self.limits.enabled and request.num_prompt <= self.limits.max_prompt_tokens

    def _drop_private(self, pages: Sequence[int]) -> None:
        self._pages.free(pages)
        self.num_private -= len(pages)

    def _trim(self) -> None:
        budget_pages = self.limits.token_budget // self.page_size
        self._evict(self._tree.num_evictable_pages - budget_pages)
        if self.limits.max_leaves and self._tree.num_leaves > self.limits.max_leaves:
            freed = self._tree.trim_leaves(self.limits.max_leaves)
            self.evicted_tokens += len(freed) * self.page_size
            self._pages.free(freed)

    def _evict(self, num_pages: int) -> None:
        if num_pages > 0:
            freed = self._tree.evict(num_pages)
            self.evicted_tokens += len(freed) * self.page_size
            self._pages.free(freed)
