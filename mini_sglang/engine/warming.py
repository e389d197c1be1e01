"""Prefixes computed when nobody waits: a chunk at a time, and only while no request is there."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Sequence

from mini_sglang.engine.request import Request

logger = logging.getLogger(__name__)

WARM = "(warm)"
"""Begins the ids of these requests, which no client can give."""

MakeRequest = Callable[[str, Sequence[int]], Request]


class WarmQueue:
    """Prefixes that are still to be put in the cache.

    Each chunk is a request of its own for the prefix up to the chunk's end, which starts from the chunks
    before it: so a request that comes meanwhile waits for one step at most.

    Args:
        chunk_tokens: tokens per step.
        make_request: ``EngineCore.make_prefix_request``.

    Attributes:
        total, done: prefixes that were added, and those that are in the cache.
        failed: prefixes of which a step failed, or that the cache did not keep.
    """

    def __init__(self, chunk_tokens: int, make_request: MakeRequest) -> None:
        self._chunk = chunk_tokens
        self._make_request = make_request
        self._queue: deque[list[int]] = deque()
        self._at = 0  # tokens of the first one that were asked for
        self._count = 0
        self.total = 0
        self.done = 0
        self.failed = 0

    def __len__(self) -> int:
        return len(self._queue)

    def add(self, prompt_ids: Sequence[int]) -> None:
        """Queue a prefix that ``make_request`` takes."""
        self._queue.append(list(prompt_ids))
        self.total += 1

    def next(self) -> Request | None:
        """The request for the next chunk, None where nothing is left."""
        if not self._queue:
            return None
        prefix = self._queue[0]
        self._at = min(len(prefix), self._at + self._chunk)
        self._count += 1
        return self._make_request(f"{WARM}{self._count}", prefix[: self._at])

    def ended(self, error: str | None, cached_tokens: int, page_size: int) -> None:
        """The request of ``next`` has ended.

        Args:
            error: why it failed.
            cached_tokens: how much of the chunk's request is in the cache now, in whole pages.
        """
        prefix = self._queue[0]
        if error is None and self._at < len(prefix):
            return
        self._queue.popleft()
        self._at = 0
        kept = cached_tokens >= len(prefix) - len(prefix) % page_size
        if error is None and kept:
            self.done += 1
            logger.info("warm prefix of %d tokens is in the cache", len(prefix))
            return
        self.failed += 1
        logger.warning(
            "a warm prefix of %d tokens is not in the cache: %s",
            len(prefix),
            error or f"it has room for {cached_tokens} of them",
        )
