"""An engine with a thread of its own, so that any number of threads and event loops can use it."""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import TypeVar

from mini_sglang.engine.adapters import NoAdapterError
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.handle import (
    ENGINE_DIED,
    NOT_STARTED,
    EngineInfo,
    Sink,
    Work,
    call_sink,
    call_watchers,
)
from mini_sglang.engine.request import Request
from mini_sglang.errors import BackendLostError, EngineError, MiniSglangError
from mini_sglang.types import Adapter, FinishReason, TokenEvent

logger = logging.getLogger(__name__)

T = TypeVar("T")

_LOOK_SECONDS = 0.5  # between looks whether an idle engine's backend is still there


class _KilledError(MiniSglangError):
    """Ends the thread; what it says is the engine's failure."""


class EngineThread:
    """Drives an ``EngineCore``; commands go in through a queue, events come out through sinks.

    An ``EngineHandle``. A request's sink is called in the engine's thread, in order, and last with the
    terminal event. It must be quick and must not raise; one that does loses its request, and nobody
    else's.

    Args:
        core: the engine, or a function that loads one; it is called in the thread, and until it is
            back the state is "starting".
    """

    core: EngineCore

    def __init__(self, core: EngineCore | Callable[[], EngineCore]) -> None:
        self._commands: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._sinks: dict[str, Sink] = {}
        self._started: set[str] = set()  # of those in _sinks, what a step has been tried of
        self._arriving = 0  # submitted and not in _sinks yet
        self._lock = threading.Lock()
        self._state = "starting"
        self._closed: str | None = "the engine is still starting"
        self._watchers: list[Callable[[], None]] = []
        if isinstance(core, EngineCore):
            self._open(core)
        load = None if isinstance(core, EngineCore) else core
        self._thread = threading.Thread(
            target=self._run, args=(load,), name="mini-sglang-engine", daemon=True
        )
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        if self._state == "starting" or not hasattr(self, "core"):
            raise EngineError(self._closed or "the engine is still starting")
        return self.core.info

    @property
    def state(self) -> str:
        return self._state

    @property
    def failure(self) -> str | None:
        return self._closed if self._state == "dead" else None

    def watch(self, callback: Callable[[], None]) -> None:
        self._watchers.append(callback)

    def stats(self) -> dict[str, int]:
        """Counters and gauges, perhaps in the middle of a step; ``call`` gives them between two."""
        return self.core.stats() if hasattr(self, "core") else {}

    @property
    def in_flight(self) -> int:
        """Requests that were submitted and have not ended."""
        return self._arriving + len(self._sinks)

    def submit(self, work: Work | Request, sink: Sink) -> None:
        """Queue work, or a request made by ``core.make_request``.

        Raises:
            EngineError: the engine is closed, has died or is still starting.
        """

        def add() -> None:
            try:
                self.core.add(work if isinstance(work, Request) else self.core.request_of(work))
            except Exception as error:
                # Refused (its id is taken): the sink of the running request of that id stays.
                kind = NOT_STARTED if isinstance(error, NoAdapterError) else None
                event = TokenEvent(
                    work.request_id, finish=FinishReason.ERROR, error=str(error), error_kind=kind
                )
                call_sink(sink, event)
            else:
                self._sinks[work.request_id] = sink
            with self._lock:
                self._arriving -= 1

        self._send(add, arriving=1)

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

    def load_adapter(self, adapter: Adapter, *, at_once: bool = False) -> Future[None]:
        """See ``EngineHandle``; the engine must have been ready."""
        future: Future[None] = Future()

        def load() -> None:
            try:
                if at_once:
                    self.call(lambda: self.core.adapters.load(adapter))
                else:
                    prepared = self.core.adapters.read(adapter)
                    self.call(lambda: self.core.adapters.attach(adapter, prepared))
                future.set_result(None)
            except BaseException as error:
                future.set_exception(error)

        try:
            if at_once:
                self._send(load)  # in the engine's own thread, where ``call`` is at once
            else:
                threading.Thread(target=load, name="mini-sglang-adapter", daemon=True).start()
        except EngineError as error:
            future.set_exception(error)
        return future

    def unload_adapter(self, key: str) -> None:
        with suppress(EngineError):
            self._send(lambda: self.core.adapters.unload(key))

    def kill(self, why: str) -> None:
        """Have the engine die after the step it is in; nothing can end that."""

        def die() -> None:
            raise _KilledError(why)

        with suppress(EngineError):
            self._send(die)

    def close(self) -> None:
        """Abort what runs, deliver the terminal events and end the thread. Safe to call twice."""
        with self._lock:
            if self._state in ("starting", "ready"):
                self._state = "closed"
                self._closed = "the engine is closed"
                self._commands.put(None)
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, command: Callable[[], None], arriving: int = 0) -> None:
        with self._lock:
            if self._closed is not None:
                raise EngineError(self._closed)
            self._commands.put(command)
            self._arriving += arriving

    def _open(self, core: EngineCore) -> None:
        core.on_start = self._started.update
        self.core = core
        self._state, self._closed = "ready", None

    def _run(self, load: Callable[[], EngineCore] | None) -> None:
        try:
            if load is not None:
                core = load()
                with self._lock:
                    if self._state == "starting":
                        self._open(core)
                call_watchers(self._watchers, "the engine")
            if hasattr(self, "core"):
                self._loop()
        except BaseException as error:
            self._die(error)
        finally:
            call_watchers(self._watchers, "the engine")

    def _loop(self) -> None:
        while self._obey():
            for event in self.core.step():
                self._deliver(event)
        self._end_all(FinishReason.ABORT, None)
        self.core.close()

    def _die(self, error: BaseException) -> None:
        started = hasattr(self, "core")
        said = isinstance(error, _KilledError) or (isinstance(error, MiniSglangError) and not started)
        lost = isinstance(error, BackendLostError)
        if not said and not lost:
            logger.exception("the engine died")
        with self._lock:
            self._state = "dead"
            why = str(error) if said or lost else f"{error!r:.200}"
            self._closed = why if said else f"the engine died: {why}"
        if started:
            self._end_all(FinishReason.ERROR, self._closed)
            with suppress(Exception):
                self.core.release()

    def _obey(self) -> bool:
        """Carry out what is queued, waiting for it when there is nothing to run; False to end."""
        idle = _LOOK_SECONDS if self.core.needs_looks else None
        while not (self.core.has_work and self._commands.empty()):
            try:
                command = self._commands.get(timeout=idle)
            except queue.Empty:
                return True
            if command is None:
                return False
            command()
        return True

    def _deliver(self, event: TokenEvent) -> None:
        sink = self._sinks.get(event.request_id)
        if event.finish is not None:
            self._sinks.pop(event.request_id, None)
            self._started.discard(event.request_id)
        if sink is not None and not call_sink(sink, event):
            self._sinks.pop(event.request_id, None)
            self._started.discard(event.request_id)
            self.core.abort(event.request_id)

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
            if event is None:
                kind = None
                if error is not None:
                    kind = ENGINE_DIED if request_id in self._started else NOT_STARTED
                event = TokenEvent(request_id, finish=reason, error=error, error_kind=kind)
            call_sink(sink, event)
