"""The prefix cache as pages that can be written down, and back."""

from __future__ import annotations

import re
from array import array
from collections.abc import Callable, Sequence

from mini_sglang.engine.cache_file import SavedPages
from mini_sglang.engine.host_tier import Digests, HostPage, HostTier
from mini_sglang.engine.pages import PageAllocator
from mini_sglang.engine.radix import RadixCache, RadixNode

# Those of tenants and salts, perhaps with an adapter's name and the fingerprint of its content: they mean the
# same after a restart. Others may stand for what has changed.
_LASTING = re.compile(r"[0-9a-f]*(\|.+@[0-9a-f]{64})?")


def collect(
    tree: RadixCache, host: HostTier | None, page_size: int
) -> tuple[SavedPages, list[int], list[int]]:
    """Everything cached, with the pages of the pool and, for the rest, the slots of the host it lies in."""
    saved = SavedPages(page_size, [], *(array(code) for code in "iiiqq"))
    names: dict[str, int] = {}
    places: dict[bytes, int] = {}
    pages: list[int] = []
    slots: list[int] = []

    def add(tokens: Sequence[int], parent: int, name: str, hits: int, used: int) -> None:
        saved.tokens.extend(tokens)
        saved.parents.append(parent)
        saved.namespaces.append(names.setdefault(name, len(names)))
        saved.hits.append(hits)
        saved.used.append(used)

    last: dict[RadixNode, int] = {}
    digests = Digests(page_size)
    for node in tree.nodes():
        if not _LASTING.fullmatch(node.namespace):
            continue
        assert node.parent is not None
        parent = last.get(node.parent, -1)
        keys = digests.of_path(node)[-len(node.pages) :] if host is not None else []
        for index, page in enumerate(node.pages):
            tokens = node.tokens[index * page_size : (index + 1) * page_size]
            add(tokens, parent, node.namespace, node.hits, node.last_used)
            parent = len(pages)
            pages.append(page)
            if keys:
                places[keys[index]] = parent
        last[node] = parent
    for item in host.pages() if host is not None else ():
        parent = places.get(item.above, -1)
        # One whose way from the root is not all there cannot be found again.
        lost = parent < 0 and item.above != Digests.root(item.namespace)
        if lost or item.key in places or not _LASTING.fullmatch(item.namespace):
            continue
        add(item.tokens, parent, item.namespace, item.hits, item.last_used)
        places[item.key] = len(pages) + len(slots)
        slots.append(item.slot)
    saved.names.extend(names)
    return saved, pages, slots


def adopt(
    saved: SavedPages,
    tree: RadixCache,
    free: PageAllocator,
    budget: int,
    write: Callable[[int, int], None],
    host: HostTier | None,
    write_host: Callable[[int, int], None],
) -> int:
    """Put saved pages in the tree, the latest used first, while free pages last; the rest goes to the host.

    Args:
        budget: most pages of the pool to take.
        write: fills a page of the pool (the second argument) with what is saved of a page (the first);
            ``write_host`` a slot.

    Returns:
        how many pages came back.
    """
    count = 0
    room = min(budget, free.num_free)
    depths = _depths(saved)
    order = sorted(range(len(saved)), key=lambda page: (-saved.used[page], depths[page]))
    chosen: set[int] = set()
    for page in order:
        if len(chosen) < room and (saved.parents[page] < 0 or saved.parents[page] in chosen):
            chosen.add(page)
    inner = {saved.parents[page] for page in chosen}
    leaves = sorted(chosen - inner, key=lambda page: saved.used[page])
    for leaf in leaves:
        path = _path(saved, leaf)
        whole = [token for page in path for token in saved.page_tokens(page)]
        name = saved.names[saved.namespaces[leaf]]
        known = tree.prefix_length(whole, name) // saved.page_size
        fresh = free.allocate(len(path) - known)
        try:
            for page, target in zip(path[known:], fresh, strict=True):
                write(page, target)
        except BaseException:
            free.free(fresh)
            raise
        done = tree.insert(whole, [*[-1] * known, *fresh], name)
        if fresh:
            done.node.hits = saved.hits[leaf]
        count += len(fresh)
    if host is not None:
        keys: dict[int, bytes] = {}
        for page in range(len(saved)):
            parent = saved.parents[page]
            name = saved.names[saved.namespaces[page]]
            above = keys[parent] if parent >= 0 else Digests.root(name)
            tokens = saved.page_tokens(page)
            keys[page] = Digests.next(above, tokens)
            if page in chosen:
                continue
            # Older than anything that this run has used.
            used = saved.used[page] - max(saved.used) - 1
            item = HostPage(keys[page], above, name, tokens, -1, saved.hits[page], used, depths[page])
            if host.put(item):
                write_host(page, item.slot)
                count += 1
    return count


def _depths(saved: SavedPages) -> list[int]:
    depths: list[int] = []
    for parent in saved.parents:
        depths.append(0 if parent < 0 else depths[parent] + 1)
    return depths


def _path(saved: SavedPages, page: int) -> list[int]:
    path: list[int] = []
    while page >= 0:
        path.append(page)
        page = saved.parents[page]
    path.reverse()
    return path
