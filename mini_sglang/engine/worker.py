"""An engine with a thread of its own, so that any number of threads and event loops can use it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.request import Request
from mini_sglang.errors import EngineError
from mini_sglang.types import FinishReason, TokenEvent

logger = logging.getLogger(__name__)

Sink = Callable[[TokenEvent], None]
T = TypeVar("T")


class EngineThread:
    """Drives an ``EngineCore``; commands go in through a queue, events come out through sinks.

    A request's sink is called in the engine's thread, in order, and last with the terminal event. It
    must be quick and must not raise; one that does loses its request, and nobody else's.
    """

    def __init__(self, core: EngineCore) -> None:
        self.core = core
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._lock = threading.Lock()
        self._closed: str | None = None
        self._thread = threading.Thread(target=self._loop, name="mini-sglang-engine", daemon=True)
        self._thread.start()

    def submit(self, request: Request, sink: Sink) -> None:
        """Queue a request made by ``core.make_request``.

        Raises:
            EngineError: the engine is closed or has died.
        """

        def add() -> None:
            try:
                self.core.add(request)
            except Exception as error:
                # Refused (its id is taken): the sink of the running request of that id stays.
                event = TokenEvent(request.request_id, finish=FinishReason.ERROR, error=str(error))
                self._call_sink(sink, event)
            else:
                self._sinks[request.request_id] = sink

        self._send(add)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; does nothing where it has ended, or the engine has."""

        def abort() -> None:
            event = self.core.abort(request_id, reason)
            if event is not None:
                self._deliver(event)

        try:
            self._send(abort)
        except EngineError:
            logger.debug("abort of %s after the engine ended", request_id)

    def call(self, function: Callable[[], T]) -> T:
        """Run ``function`` in the engine's thread between two steps and give its result.

        A sink may call this too: it is in that thread already.

        Raises:
            EngineError: the engine is closed or has died. What ``function`` raises is raised here.
        """
        if threading.current_thread() is self._thread:
            return function()
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(function())
            except BaseException as error:
                future.set_exception(error)

        self._send(run)
        while True:
            try:
                return future.result(timeout=1.0)
            except TimeoutError:
                if future.done():  # ``function`` raised it, or the result came this instant
                    return future.result()
                if not self._thread.is_alive():
                    raise EngineError(self._closed or "the engine has ended") from None

    def close(self) -> None:
        """Abort what runs, deliver the terminal events and end the thread. Safe to call twice."""
        with self._lock:
            if self._closed is None:
                self._closed = "the engine is closed"
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Callable[[], None]) -> None:
        with self._lock:
            if self._closed is not None:
                raise EngineError(self._closed)
            self._commands.put(command)

    def _loop(self) -> None:
        try:
            while self._obey():
                for event in self.core.step():
                    self._deliver(event)
            self._end_all(FinishReason.ABORT, None)
        except BaseException as error:
            logger.exception("the engine died")
            with self._lock:
                self._closed = f"the engine died: {error!r:.200}"
            self._end_all(FinishReason.ERROR, self._closed)

    def _obey(self) -> bool:
        """Carry out what is queued, waiting for it when there is nothing to run; False to end."""
        while True:
            try:
                command = self._commands.get(block=not self.core.has_work)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()

    def _deliver(self, event: TokenEvent) -> None:
        sink = self._sinks.get(event.request_id)
        if event.finish is not None:
            self._sinks.pop(event.request_id, None)
        if sink is not None and not self._call_sink(sink, event):
            self._sinks.pop(event.request_id, None)
            self.core.abort(event.request_id)

    @staticmethod
    def _call_sink(sink: Sink, event: TokenEvent) -> bool:
        try:
            sink(event)
        except Exception:
            logger.exception("the receiver of request %s failed; the request is dropped", event.request_id)
            return False
        return True

    def _end_all(self, reason: FinishReason, error: str | None) -> None:
        # Commands that raced with the end: an add still gets its terminal event, a call its result.
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                break
            if command is not None:
                try:
                    command()
                except Exception:
                    logger.debug("a command failed after the engine ended", exc_info=True)
        while self._sinks:
            request_id = next(iter(self._sinks))
            # A core that died is not touched again: it may be half way through anything.
            event = self.core.abort(request_id, reason) if error is None else None
            sink = self._sinks.pop(request_id)
            self._call_sink(sink, event or TokenEvent(request_id, finish=reason, error=error))
