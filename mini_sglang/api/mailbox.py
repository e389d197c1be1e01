"""Token events on their way from an engine's thread to their readers, who are woken as seldom as will do.

Between two steps every microsecond counts: waking a thread or an event loop takes some, and it then takes
the processor from the model.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

from mini_sglang.types import TokenEvent, TokenLogprob


class Inbox:
    """The events of one request. One thread puts them in, one takes them out.

    Args:
        ring: called by ``put`` when the reader is to look again.
        whole: whether the reader wants all as one, at the end. Nothing but tokens is kept until then: Python
            looks through all objects that there are whenever there are many new ones.

    Attributes:
        first_token_at: when the first token came, by ``time.perf_counter``.
    """

    def __init__(self, ring: Callable[[], None], *, whole: bool = False) -> None:
        self._ring = ring
        self._gathered = _Gathered() if whole else None
        self._events: deque[TokenEvent] = deque()
        self._awaited = False
        self.first_token_at: float | None = None

    def put(self, event: TokenEvent) -> None:
        """A ``Sink``; raises what ``ring`` does."""
        if self.first_token_at is None and event.token_ids:
            self.first_token_at = time.perf_counter()
        if self._gathered is not None:
            self._gathered.add(event)
            if event.finish is None:
                return
            event = self._gathered.with_end(event)
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
            gathered = _Gathered()
            for event in events:
                gathered.add(event)
            events.clear()
            return gathered.with_end(event)
        if not events:
            self._awaited = True
        return events.popleft() if events else None


class _Gathered:
    """What the events of one request say one after another."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._logprobs: list[TokenLogprob] = []
        self._prompt: tuple[TokenLogprob, ...] = ()

    def add(self, event: TokenEvent) -> None:
        self._ids.extend(event.token_ids)
        self._logprobs.extend(event.logprobs)
        self._prompt = event.prompt_logprobs or self._prompt

    def with_end(self, last: TokenEvent) -> TokenEvent:
        """As one event; ``last`` is among them."""
        ids, logprobs = tuple(self._ids), tuple(self._logprobs)
        return replace(last, token_ids=ids, logprobs=logprobs, prompt_logprobs=self._prompt)


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
