"""Token events on their way from an engine's thread to their readers, who are woken as seldom as will do.

Between two steps every microsecond counts: waking a thread or an event loop takes some, and it then takes
the processor from the model.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Collection
from dataclasses import replace
from itertools import chain

from mini_sglang.types import TokenEvent


class Inbox:
    """The events of one request. One thread puts them in, one takes them out.

    Args:
        ring: called by ``put`` when the reader is to look again.

    Attributes:
        first_token_at: when the first token came, by ``time.perf_counter``.
    """

    def __init__(self, ring: Callable[[], None]) -> None:
        self._ring = ring
        self._events: deque[TokenEvent] = deque()
        self._awaited = False
        self.first_token_at: float | None = None

    def put(self, event: TokenEvent) -> None:
        """A ``Sink``; raises what ``ring`` does."""
        if self.first_token_at is None and event.token_ids:
            self.first_token_at = time.perf_counter()
        self._events.append(event)
        # Looked at last, as the reader looks for an event last: one of the two sees the other.
        if self._awaited or event.finish is not None:
            self._awaited = False
            self._ring()

    def take(self, *, patient: bool) -> TokenEvent | None:
        """The next event; where there is none, ``ring`` is called for the one that comes.

        ``patient`` waits for the last event: ``ring`` is called for that one alone, the others lie here
        until then, and all come as one.
        """
        events = self._events
        if patient:
            if not events or events[-1].finish is None:
                return None
            together = _together(events)
            events.clear()
            return together
        if not events:
            self._awaited = True
        return events.popleft() if events else None


def _together(events: Collection[TokenEvent]) -> TokenEvent:
    """One event that says what ``events``, up to the last of a request, say one after another."""
    *_, last = events
    return replace(
        last,
        token_ids=tuple(chain.from_iterable(event.token_ids for event in events)),
        logprobs=tuple(chain.from_iterable(event.logprobs for event in events)),
        prompt_logprobs=next((event.prompt_logprobs for event in events if event.prompt_logprobs), ()),
    )


class LoopCalls:
    """Has functions called on an event loop, which is woken once for all that came since it last looked."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self._calls: deque[Callable[[], None]] = deque()
        self._woken = False

    def put(self, call: Callable[[], None]) -> None:
        """From any thread.

        Raises:
            RuntimeError: the loop is closed.
        """
        if self.loop.is_closed():
            raise RuntimeError("the event loop is closed")
        self._calls.append(call)
        # In this order: whoever finds the flag up put its call before the loop took it down.
        if not self._woken:
            self._woken = True
            self.loop.call_soon_threadsafe(self._run)

    def _run(self) -> None:
        self._woken = False
        while self._calls:
            self._calls.popleft()()
