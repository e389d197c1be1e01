"""How the server begins and ends: signals, draining, and what must not be left behind."""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from types import FrameType
from typing import Any

from mini_sglang.api.connections import Connections
from mini_sglang.api.service import Service

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGTERM, signal.SIGINT)
# What the last words to the clients get, once their requests were ended.
_GRACE_SECONDS = 1.0


class Ending:
    """SIGTERM and SIGINT: the first drains the server and then ends it, the second ends it at once.

    While it drains the port stays open and new requests get their 503. It takes over the handlers of
    uvicorn, whose server it tells when to stop, so that both ways to start the server end alike.
    """

    def __init__(self, service: Service, connections: Connections) -> None:
        self._service = service
        self._connections = connections
        self._loop = asyncio.get_running_loop()
        self._previous: dict[int, Any] = {}
        self._task: asyncio.Task[None] | None = None
        self._hurry = asyncio.Event()

    def install(self) -> None:
        """Take over the signals; does nothing outside the main thread, where Python has none."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                self._previous[number] = signal.signal(number, self._on_signal)

    def restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def begin(self) -> None:
        """What a signal does."""
        if self._task is not None:
            logger.warning("ending at once")
            self._hurry.set()
            return
        logger.warning(
            "draining: %d requests in flight get up to %g seconds",
            self._service.in_flight,
            self._service.settings.drain_timeout,
        )
        self._task = self._loop.create_task(self._end())

    async def wait(self) -> None:
        """Wait for an end that has begun."""
        if self._task is not None:
            await asyncio.shield(self._task)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._loop.call_soon_threadsafe(self.begin)

    async def _end(self) -> None:
        deadline = self._loop.time() + self._service.settings.drain_timeout
        drain = asyncio.ensure_future(self._service.drain(self._service.settings.drain_timeout))
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((drain, hurry), return_when=asyncio.FIRST_COMPLETED)
        drain.cancel()
        hurry.cancel()
        self._service.end_all()
        # Also where all requests are served: their readers may be behind.
        await self._until_written(max(deadline, self._loop.time() + _GRACE_SECONDS))
        self._connections.cut_all()
        await self._close()
        self._stop_server()

    async def _close(self) -> None:
        close = asyncio.ensure_future(self._service.close())
        hurry = asyncio.ensure_future(self._hurry.wait())
        await asyncio.wait((close, hurry), return_when=asyncio.FIRST_COMPLETED)
        hurry.cancel()
        if not close.done():
            await self._service.close(at_once=True)
        await close

    async def _until_written(self, deadline: float) -> None:
        while len(self._connections) and self._loop.time() < deadline and not self._hurry.is_set():
            await asyncio.sleep(0.02)
        # The last words of requests that were ended a moment ago.
        await asyncio.sleep(0.05)

    def _stop_server(self) -> None:
        for handler in self._previous.values():
            server: Any = getattr(handler, "__self__", None)
            if hasattr(server, "should_exit"):
                server.should_exit = True
                # uvicorn waits for connections without end; everything of ours is closed by now.
                self._loop.call_later(_GRACE_SECONDS, setattr, server, "force_exit", True)
                return
        # Another ASGI server, whose own handler knows what to do.
        number = signal.SIGTERM
        previous = self._previous.get(number)
        self.restore()
        if callable(previous):
            previous(number, None)
        elif previous is not None:
            signal.raise_signal(number)
