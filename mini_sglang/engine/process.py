"""An engine in a process of its own, as the server sees it.

Commands go out and events come in over the sockets of ``child``, as the typed messages of ``wire``. The
other end is ``process_main``.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass

from mini_sglang.config import Settings, plain_settings
from mini_sglang.engine.child import ChildProcess
from mini_sglang.engine.handle import (
    ENGINE_DIED,
    NOT_STARTED,
    EngineInfo,
    Sink,
    Work,
    call_sink,
    call_watchers,
)
from mini_sglang.engine.wire import (
    Abort,
    AdapterLoaded,
    Close,
    Codec,
    Hello,
    LoadAdapter,
    Message,
    Notice,
    Ready,
    Report,
    Setup,
    UnloadAdapter,
)
from mini_sglang.errors import EngineError, InvalidValueError, ModelLoadError
from mini_sglang.types import Adapter, FinishReason, TokenEvent

logger = logging.getLogger(__name__)

CLOSE_GRACE = 5.0  # seconds a child has to end its requests and itself
SAVE_GRACE = 120.0  # from then on where it says that it saves its prefix cache
_TICK = 1.0  # seconds between two looks of the watchdog, at most


@dataclass(slots=True)
class _Entry:
    serial: int
    sink: Sink
    started: bool = False


class ProcessEngine:
    """An ``EngineHandle`` over a child process, which is started at once and loads in its own time.

    The child is ended when it gives no sign of life for ``STEP_TIMEOUT`` seconds; it ends by itself when
    this process is gone. A child that died stays dead: whoever holds it makes another.

    Args:
        index: names the engine in messages and logs.
        backend: ``module:function`` in the child, a ``process_main.MakeCore``.
        num_engines: how many engines share this machine.
        description: goes before the backend's own in ``info.description``.
        notify: called with the child's lines for the user while it loads, in the engine's thread.
        environment: variables for the child beside this process's own.
        unix_sockets: False takes TCP.
    """

    def __init__(
        self,
        index: int,
        settings: Settings,
        backend: str,
        *,
        num_engines: int = 1,
        description: Mapping[str, str | int] | None = None,
        notify: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        unix_sockets: bool = hasattr(os, "getuid"),
    ) -> None:
        self.index = index
        self._backend = backend
        self._step_timeout = settings.step_timeout
        self._setup = Setup(index, num_engines, plain_settings(settings), dict(description or {}))
        self._notify = notify
        self._environment = environment or {}
        self._unix_sockets = unix_sockets
        self._lock = threading.Lock()  # state, entries, serials and what is sent
        self._state = "starting"
        self._failure: str | None = None
        self._info: EngineInfo | None = None
        self._stats: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._by_serial: dict[int, _Entry] = {}
        self._next_serial = 0
        self._loads: dict[int, Future[None]] = {}
        self._codec = Codec()
        self._kill_at: float | None = None
        self._watchers: list[Callable[[], None]] = []
        self._child: ChildProcess | None = None
        # Linux ends the child when the thread that started it ends: this one outlives the child.
        self._thread = threading.Thread(target=self._run, name=f"mini-sglang-engine-{index}", daemon=True)
        self._thread.start()

    @property
    def info(self) -> EngineInfo:
        if self._info is None:
            raise EngineError(self._failure or f"engine {self.index} is still starting")
        return self._info

    @property
    def state(self) -> str:
        return self._state

    @property
    def failure(self) -> str | None:
        return self._failure

    @property
    def pid(self) -> int | None:
        """The child's process id, None before it has one."""
        return self._child.pid if self._child is not None else None

    def watch(self, callback: Callable[[], None]) -> None:
        self._watchers.append(callback)

    def stats(self) -> dict[str, int]:
        return self._stats

    def submit(self, work: Work, sink: Sink) -> None:
        """Send a request to the child.

        Raises:
            EngineError: the engine is not ready, or no longer.
            InvalidValueError: a request of this id runs here.
        """
        with self._lock:
            if self._state != "ready":
                raise EngineError(self._failure or f"engine {self.index} is {self._state}")
            if work.request_id in self._entries:
                raise InvalidValueError("request_id", work.request_id, "unique among running requests")
            serial, self._next_serial = self._next_serial, self._next_serial + 1
            self._send(self._codec.submit(serial, work))
            self._entries[work.request_id] = self._by_serial[serial] = _Entry(serial, sink)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        with self._lock:
            if request_id in self._entries and self._state == "ready":
                self._send(self._codec.encode(Abort(request_id, reason)))

    def load_adapter(self, adapter: Adapter, *, at_once: bool = False) -> Future[None]:
        """See ``EngineHandle``; where the child refuses it, the future has a ``ModelLoadError``."""
        future: Future[None] = Future()
        with self._lock:
            if self._state != "ready":
                future.set_exception(EngineError(self._failure or f"engine {self.index} is {self._state}"))
                return future
            serial, self._next_serial = self._next_serial, self._next_serial + 1
            self._loads[serial] = future
            self._send(self._codec.encode(LoadAdapter(serial, adapter, at_once)))
        return future

    def unload_adapter(self, key: str) -> None:
        with self._lock:
            if self._state == "ready":
                self._send(self._codec.encode(UnloadAdapter(key)))

    def kill(self, why: str) -> None:
        """Kill the child; each of its requests is told ``why``."""
        with self._lock:
            if self._state in ("starting", "ready"):
                self._failure = why
            self._kill_at = time.monotonic()
            if self._child is not None:
                self._child.kill()

    def close(self) -> None:
        """Abort what runs, deliver the terminal events and end the child, by force after 5 s."""
        with self._lock:
            if self._state == "ready":
                self._send(self._codec.encode(Close()))
                self._kill_at = time.monotonic() + CLOSE_GRACE
            elif self._state == "starting":
                self._kill_at = time.monotonic()
                if self._child is not None:
                    self._child.kill()
            if self._state in ("ready", "starting"):
                self._state = "closed"
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, data: bytes) -> None:
        """The lock is held."""
        assert self._child is not None
        self._child.send(data)

    def _run(self) -> None:
        reason = "the server could not start it"
        try:
            name = f"{self._thread.name}-journal"
            child = ChildProcess(self.index, name, unix_sockets=self._unix_sockets)
            with self._lock:
                self._child = child
                if self._state != "starting":
                    raise EngineError("closed while it was being started")
                child.start(self._backend, self._environment, self._mark_started)
            logger.info("engine %d is process %d", self.index, child.pid)
            self._receive(child)
            reason = child.how_it_ended()
        except Exception as error:
            logger.exception("engine %d is given up", self.index)
            reason = f"{type(error).__name__}: {error}"
        finally:
            if self._child is not None:
                self._child.end()
            with self._lock:
                if self._state != "closed":
                    self._state = "dead"
                    self._failure = self._failure or f"engine {self.index} died ({reason})"
            self._end_all()
            if self._child is not None:
                self._child.close()
            call_watchers(self._watchers, f"engine {self.index}")

    def _mark_started(self, serials: Sequence[int]) -> None:
        with self._lock:
            for serial in serials:
                entry = self._by_serial.get(serial)
                if entry is not None:
                    entry.started = True

    def _receive(self, child: ChildProcess) -> None:
        """Take the child's messages until it is gone."""
        timeout = self._step_timeout
        tick = min(_TICK, timeout / 8) if timeout else _TICK
        codec, silence = Codec(), 0.0
        while True:
            try:
                data = child.receive(tick)
            except EOFError:
                break
            if data is not None:
                silence = 0.0
                self._take(codec.message(data), child)
            else:
                # Counted in looks, not by the clock: this process may have been stopped itself.
                silence += tick
                if timeout and silence >= timeout and self._state == "ready":
                    self._give_up(
                        f"engine {self.index} gave no sign of life for {timeout:g} s (STEP_TIMEOUT)"
                    )
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                child.kill()
        # What the child had sent before it went.
        while (data := child.receive(0.02)) is not None:
            self._take(codec.message(data), child)

    def _take(self, message: Message, child: ChildProcess) -> None:
        if isinstance(message, Report):
            if message.stats is not None:
                self._stats = message.stats
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, Hello):
            with self._lock:
                child.connect(message.address)
                child.send(self._codec.encode(self._setup))
        elif isinstance(message, AdapterLoaded):
            with self._lock:
                future = self._loads.pop(message.serial)
            if message.failure is None:
                future.set_result(None)
            else:
                future.set_exception(ModelLoadError(message.failure))
        elif isinstance(message, Notice):
            if self._state == "closed" and self._kill_at is not None:
                self._kill_at = max(self._kill_at, time.monotonic() + SAVE_GRACE)
            if self._notify is not None:
                self._notify(message.line)
        elif isinstance(message, Ready):
            with self._lock:
                self._info = message.info
                if self._state == "starting":
                    self._state = "ready"
            logger.info("engine %d is ready", self.index)
            call_watchers(self._watchers, f"engine {self.index}")
        else:
            self._give_up(message.message, CLOSE_GRACE)

    def _give_up(self, failure: str, grace: float = 0.0) -> None:
        """End the child after ``grace`` seconds, which it may use to end by itself."""
        with self._lock:
            self._failure = failure
            self._kill_at = time.monotonic() + grace

    def _deliver(self, event: TokenEvent) -> None:
        with self._lock:
            entry = self._entries.get(event.request_id)
            if entry is not None and event.finish is not None:
                del self._entries[event.request_id], self._by_serial[entry.serial]
        if entry is not None and not call_sink(entry.sink, event) and event.finish is None:
            self.abort(event.request_id)
            with self._lock:
                if self._entries.pop(event.request_id, None) is not None:
                    del self._by_serial[entry.serial]

    def _end_all(self) -> None:
        """One terminal event for each request the child left without."""
        with self._lock:
            entries, self._entries, self._by_serial = self._entries, {}, {}
            loads, self._loads = self._loads, {}
            closed, failure = self._state == "closed", self._failure
        for future in loads.values():
            future.set_exception(EngineError(failure or f"engine {self.index} is closed"))
        for request_id, entry in entries.items():
            if closed:
                event = TokenEvent(request_id, finish=FinishReason.ABORT)
            else:
                kind = ENGINE_DIED if entry.started else NOT_STARTED
                event = TokenEvent(request_id, finish=FinishReason.ERROR, error=failure, error_kind=kind)
            call_sink(entry.sink, event)
