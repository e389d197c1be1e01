"""Who owns which KV page: the pages of running requests, and the caches they leave behind."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

from mini_sglang.backend.step import PageStore, SequenceStep
from mini_sglang.engine.cache_file import CacheFile, write_cache
from mini_sglang.engine.cache_limits import CacheLimits
from mini_sglang.engine.host_link import HostLink
from mini_sglang.engine.host_tier import HostTier
from mini_sglang.engine.limbo import Limbo
from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.prompt_cache import PromptCache, PromptEntry
from mini_sglang.engine.radix import Match, RadixCache
from mini_sglang.engine.request import Request
from mini_sglang.engine.saved_cache import adopt, collect
from mini_sglang.errors import InvalidValueError


class KVCacheManager:
    """Gives requests their pages, from the prefix cache where it can, and takes them back.

    Every page is free, cached (in the tree, of the exact-prompt cache, or on its way back from the host), or
    private to one running request or to a step under way (``limbo``), so
    ``num_free + num_cached + num_private == num_pages`` at any moment;
    ``check`` verifies it.
    """

    def __init__(
        self, num_pages: int, page_size: int, limits: CacheLimits, store: PageStore | None = None
    ) -> None:
        self.page_size = page_size
        self.limits = limits
        self._store = store
        self._pages = PageAllocator(num_pages)
        self.limbo = Limbo()
        self._tree = RadixCache(page_size, limits.policy)
        self._reserved: set[int] = set()  # slots for the logits of prompts that are being computed
        self.prompts: PromptCache | None = None
        self.host: HostLink | None = None
        self.num_private = 0
        self.evicted_tokens = 0
        self.loaded = 0  # pages
        if not limits.enabled or store is None:
            return
        if limits.max_prompts:
            self.prompts = PromptCache(limits.max_prompts, limits.prompt_token_budget)
        if limits.host_tokens:
            slots = limits.host_tokens // page_size
            # First: there may not be memory for so many.
            store.open_host(slots)
            tier = HostTier(slots, page_size, limits.policy)
            self.host = HostLink(tier, self._tree, self._pages, store, self._make_room)

    @property
    def num_pages(self) -> int:
        return self._pages.num_pages

    @property
    def num_free(self) -> int:
        return self._pages.num_free

    @property
    def num_cached(self) -> int:
        """Pages the caches own, in use or not."""
        return self._tree.num_pages + self._num_kept + self._num_arriving

    @property
    def num_available(self) -> int:
        """Pages that could be had now: free ones, and those of unlocked prefixes and of whole prompts."""
        return self._pages.num_free + self._tree.num_evictable_pages + self._num_kept

    @property
    def num_prefixes(self) -> int:
        return self._tree.num_leaves

    def pages_for(self, num_tokens: int) -> int:
        return -(-num_tokens // self.page_size)

    def cached_prefix(self, request: Request) -> int:
        """Tokens of ``request`` that ``attach`` would find in the tree; changes nothing."""
        return self._tree.prefix_length(self._reusable(request), request.namespace)

    def cached_tokens(self, tokens: Sequence[int], namespace: str = "") -> int:
        """How many of ``tokens`` are in the tree, in whole pages; changes nothing."""
        return self._tree.prefix_length(tokens, namespace)

    def fetch(self, request: Request, headroom: int, *, busy: bool) -> bool:
        """Bring back from the host what continues the request's cached prefix, for ``attach`` to find.

        True while that is under way, which it is only with ``busy``: while other requests have steps to run.

        Args:
            headroom: pages that must be left free for them.
        """
        if self.host is None:
            return False
        self.host.settle()
        tokens = self._reusable(request) if self._entry(request) is None else request.tokens
        match = self._tree.match(tokens, request.namespace)
        if self.host.awaits(match, tokens):
            if busy:
                return True
            self.host.settle(wait=True)
            match = self._tree.match(tokens, request.namespace)
        keys = self.host.find(match, tokens, self.page_size)
        self._tree.lock(match.node)
        # As the scheduler asks, so that nothing is fetched for a request that must wait for room.
        missing = self.pages_for(len(request.tokens)) - len(match.pages)
        if not keys or missing + headroom > self.num_available:
            self._tree.unlock(match.node)
            return False
        return self.host.bring(match, tokens, keys, busy=busy)

    def attach(self, request: Request) -> int:
        """Lock the longest cached prefix for a request that holds no pages; returns its tokens.

        At least one token is left to compute, since the next one is sampled from its logits; but for a prompt
        whose logits are kept none is left, and ``extend`` then copies its last page.
        """
        entry = self._entry(request)
        if entry is not None and self.prompts is not None:
            match = self._tree.match(request.tokens[: entry.end], request.namespace)
            if len(match.pages) * self.page_size == entry.end:
                self.prompts.touch(entry)
                entry.node = match.node
                self._hold(request, match)
                request.num_computed = len(request.tokens)
                request.from_logits, request.tail_page = entry.slot, entry.tail
                return request.num_computed
        match = self._tree.match(self._reusable(request), request.namespace)
        self._hold(request, match)
        return request.num_computed

    def _hold(self, request: Request, match: Match) -> None:
        self._tree.lock(match.node)
        request.node = match.node
        request.pages = array("i", match.pages)
        request.num_tree_pages = len(match.pages)
        request.num_computed = len(match.pages) * self.page_size

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
            self.settle()
            if missing > self.num_available:
                return False
        self._make_room(missing)
        request.pages.extend(self._pages.allocate(missing))
        self.num_private += missing
        if request.tail_page is not None:
            # Nothing was written since ``attach``: it holds the prompt's end even if it was evicted just now.
            assert self._store is not None and missing == 1
            if request.tail_page != request.pages[-1]:
                self._store.copy([request.tail_page], [request.pages[-1]])
            request.tail_page = None
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

    def first_token(self, request: Request, step: SequenceStep) -> None:
        """Complete the step that chooses a request's first token: from kept logits, or to be kept."""
        step.from_logits = request.from_logits
        if self.prompts is None or request.from_logits is not None or not self._insertable(request):
            return
        if request.keep_logits is not None:  # of a step that came to nothing
            step.keep_logits = request.keep_logits
            return
        request.keep_logits, pages = self.prompts.reserve(request.num_prompt)
        self._pages.free(pages)
        step.keep_logits = request.keep_logits
        if request.keep_logits is not None:
            self._reserved.add(request.keep_logits)

    def keep_no_logits(self, request: Request) -> None:
        """Undo what ``first_token`` reserved: the step did not come to choose the token."""
        if request.keep_logits is not None and self.prompts is not None:
            self._reserved.discard(request.keep_logits)
            self.prompts.give_back(request.keep_logits)
            request.keep_logits = None

    def keep_prompt(self, request: Request) -> None:
        """Put a prompt in the exact-prompt cache: its step is done, its whole pages are published.

        Does nothing for one whose last step is still to come, or under way.
        """
        if request.num_computed < request.num_prompt:
            return
        request.from_logits = None
        slot, request.keep_logits = request.keep_logits, None
        if slot is None:
            return
        assert self.prompts is not None and self._store is not None and request.node is not None
        self._reserved.discard(slot)
        end = request.num_prompt - request.num_prompt % self.page_size
        tail: int | None = None
        if request.num_tree_pages * self.page_size == end:
            if end < request.num_prompt:
                self._make_room(1)
                if self._pages.num_free:
                    tail = self._pages.allocate(1)[0]
                    self._store.copy([request.pages[end // self.page_size]], [tail])
            if (end < request.num_prompt) == (tail is not None):
                entry = PromptEntry(request.prompt_key, request.node, end, tail, slot)
                self._pages.free(self.prompts.put(entry))
                return
        self.prompts.give_back(slot)

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
        self._give_up_private(request, duplicates)
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
        self._give_up_private(request, request.pages[request.num_tree_pages :])
        if request.node is not None:
            if request.flights:
                self.limbo.hold_node(request.node)
            else:
                self._tree.unlock(request.node)
        request.node = None
        request.from_logits = request.tail_page = None
        self.keep_no_logits(request)
        request.pages = array("i")
        request.num_tree_pages = 0
        request.num_computed = 0
        self._trim()

    def landed(self, number: int) -> None:
        """Steps up to this number are done: what waited for them is free."""
        pages, nodes = self.limbo.landed(number)
        self._drop_private(pages)
        for node in nodes:
            self._tree.unlock(node)
        if nodes:
            self._trim()

    def clear(self) -> int:
        """Drop every prefix that no running request uses, in both tiers; returns the tokens dropped."""
        self.settle()
        before = self._pages.num_free
        if self.prompts is not None:
            self._pages.free(self.prompts.clear())
        self._tree.on_evict = None
        self._evict(self._tree.num_evictable_pages)
        num_pages = self._pages.num_free - before
        if self.host is not None:
            num_pages += self.host.tier.clear()
            self._tree.on_evict = self.host.tier.note
        return num_pages * self.page_size

    def save(self, path: Path) -> int:
        """Write the prefix cache, both tiers, to a file; returns its tokens.

        Raises:
            CacheFileError: it cannot be written, or there is a file that is no prefix cache.
            InvalidValueError: the prefix cache is off.
        """
        store = self._saving()
        self.settle()
        tier = None if self.host is None else self.host.tier
        saved, pages, slots = collect(self._tree, tier, self.page_size)
        write_cache(path, store.identity(), saved, store.page_bytes, store.read(pages, slots))
        return len(saved) * self.page_size

    def load(self, path: Path) -> int:
        """Put a saved prefix cache beside what is cached, as far as there is room; returns the tokens added.

        Raises:
            CacheFileError: it is missing, damaged, or of another model or other settings; nothing changes.
            InvalidValueError: the prefix cache is off.
        """
        store = self._saving()
        budget = self.limits.token_budget // self.page_size - self._tree.num_evictable_pages
        with CacheFile(path, store.identity(), store.page_bytes) as file:
            count = adopt(
                file.pages,
                self._tree,
                self._pages,
                budget,
                lambda saved, page: store.write(page, file.kv(saved)),
                None if self.host is None else self.host.tier,
                lambda saved, slot: store.write_host(slot, file.kv(saved)),
            )
        self._trim()
        self.loaded += count
        return count * self.page_size

    def _saving(self) -> PageStore:
        if self._store is None or not self.limits.enabled:
            raise InvalidValueError("PREFIX_CACHE", 0, "on to be saved or loaded")
        return self._store

    def stats(self) -> dict[str, int]:
        """Counters and gauges of the exact-prompt cache and the host tier, all 0 where they are off."""
        size, prompts, link = self.page_size, self.prompts, self.host
        tier = None if link is None else link.tier
        return {
            "prefill_cache_entries": 0 if prompts is None else len(prompts),
            "prefill_cache_tokens": 0 if prompts is None else prompts.num_tokens,
            "prefill_cache_evictions": 0 if prompts is None else prompts.evictions,
            "prefix_loaded_tokens": self.loaded * size,
            "host_hits": 0 if link is None else link.hits,
            "host_tokens_total": 0 if tier is None else tier.num_slots * size,
            "host_tokens_used": 0 if tier is None else tier.num_used * size,
            "host_spilled_tokens": 0 if tier is None else tier.spilled * size,
            "host_restored_tokens": 0 if link is None else link.restored * size,
            "host_dropped_tokens": 0 if tier is None else tier.dropped * size,
        }

    def check(self, running: Iterable[Request] = ()) -> None:
        """Verify that every page has exactly one owner.

        Raises:
            AssertionError: a page is lost, owned twice, or a counter is off.
        """
        self._tree.check()
        running = list(running)
        free = self._pages.free_pages()
        tree = self._tree.pages()
        private = [page for r in running for page in r.pages[r.num_tree_pages :]]
        private += self.limbo.pages()
        arriving: list[int] = []
        kept: list[int] = []
        if self.prompts is not None:
            kept = self.prompts.pages()
            self.prompts.check(self._reserved)
            held = {r.keep_logits for r in running if r.keep_logits is not None}
            assert held == self._reserved, "a slot for logits is held by nobody"
        if self.host is not None:
            self.host.check()
            arriving = [page for arrival in self.host.arrivals for page in arrival.pages]
        owned = [*free, *tree, *private, *arriving, *kept]
        assert len(owned) == len(set(owned)), "a KV page has two owners"
        assert len(owned) == self.num_pages, "a KV page is lost"
        assert self.num_private == len(private)
        assert self.num_free + self.num_cached + self.num_private == self.num_pages
        for request in running:
            shared = request.pages[: request.num_tree_pages]
            assert set(shared) <= set(tree), "a running request reads a page that was evicted"

    @property
    def _num_kept(self) -> int:
        return 0 if self.prompts is None else self.prompts.num_pages

    @property
    def _num_arriving(self) -> int:
        return 0 if self.host is None else self.host.num_arriving

    def settle(self) -> None:
        """Wait for pages that are on their way from the host, so that they can be used or evicted."""
        if self.host is not None:
            self.host.settle(wait=True)

    def _entry(self, request: Request) -> PromptEntry | None:
        """What is kept of the request's whole prompt, where it may start from that."""
        if self.prompts is None or not len(self.prompts) or request.num_output or request.prefill_only:
            return None
        return None if request.wants_prompt_logprobs else self.prompts.get(request.prompt_key)

    def _reusable(self, request: Request) -> Sequence[int]:
        if not self.limits.enabled or request.wants_prompt_logprobs:
            return ()
        return request.tokens[: len(request.tokens) - 1]

    def _insertable(self, request: Request) -> bool:
        return self.limits.enabled and request.num_prompt <= self.limits.max_prompt_tokens

    def _give_up_private(self, request: Request, pages: Sequence[int]) -> None:
        """Free pages of a request, once no step under way can read or write them."""
        if request.flights:
            self.limbo.hold(pages)
        else:
            self._drop_private(pages)

    def _drop_private(self, pages: Sequence[int]) -> None:
        self._pages.free(pages)
        self.num_private -= len(pages)

    def _trim(self) -> None:
        budget_pages = self.limits.token_budget // self.page_size
        self._evict(self._tree.num_evictable_pages - budget_pages)
        if self.limits.max_leaves and self._tree.num_leaves > self.limits.max_leaves:
            self._give_up(self._tree.trim_leaves(self.limits.max_leaves))

    def _make_room(self, num_pages: int) -> None:
        """Free pages until there are ``num_pages``, or no more can be had."""
        self._evict(num_pages - self._pages.num_free)

    def _evict(self, num_pages: int) -> None:
        if num_pages <= 0:
            return
        freed = self._tree.evict(num_pages) if self._tree.num_evictable_pages else []
        self._give_up(freed)
        if len(freed) < num_pages and self.prompts is not None:
            self._pages.free(self.prompts.evict(num_pages - len(freed)))

    def _give_up(self, pages: list[int]) -> None:
        """Free pages that the tree has let go of, once they are copied to the host."""
        if not pages:
            return
        self.evicted_tokens += len(pages) * self.page_size
        if self.host is not None:
            # Entries of whole prompts stay: their pages may come back.
            self.host.spill()
        elif self.prompts is not None:
            self._pages.free(self.prompts.prune(self._tree))
        self._pages.free(pages)
