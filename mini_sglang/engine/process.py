"""An engine in a process of its own, as the server sees it.

Commands go out and events come in over sockets in a private folder (TCP on the loopback where there are no
Unix sockets), as the typed messages of ``wire``. The other end is ``process_main``.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mini_sglang.config import Settings, setting_fields
from mini_sglang.engine.handle import ENGINE_DIED, NOT_STARTED, EngineInfo, Sink, Work
from mini_sglang.engine.wire import Abort, Close, Codec, Hello, Message, Notice, Ready, Report, Scalar, Setup
from mini_sglang.errors import EngineError, InvalidValueError
from mini_sglang.types import FinishReason, TokenEvent

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger(__name__)

CLOSE_GRACE = 5.0  # seconds a child has to end its requests and itself
_TICK = 1.0  # seconds between two looks of the watchdog, at most
_SERIAL_BYTES = 8
_ENDED = b""  # from the reader of the journal: the child is gone


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
        eos_ids: ids that end an answer, beside the model's own.
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
        eos_ids: Sequence[int] = (),
        description: Mapping[str, str | int] | None = None,
        notify: Callable[[str], None] | None = None,
        environment: Mapping[str, str] | None = None,
        unix_sockets: bool = hasattr(os, "getuid"),
    ) -> None:
        self.index = index
        self._backend = backend
        self._step_timeout = settings.step_timeout
        self._setup = Setup(
            index, num_engines, plain_settings(settings), tuple(eos_ids), dict(description or {})
        )
        self._notify = notify
        self._environment = environment or {}
        self._unix_sockets = unix_sockets
        self._lock = threading.Lock()  # state, entries, serials and the command socket
        self._state = "starting"
        self._failure: str | None = None
        self._info: EngineInfo | None = None
        self._stats: dict[str, int] = {}
        self._entries: dict[str, _Entry] = {}
        self._by_serial: dict[int, _Entry] = {}
        self._next_serial = 0
        self._commands: zmq.Socket[bytes] | None = None
        self._codec = Codec()
        self._kill_at: float | None = None
        self._watchers: list[Callable[[], None]] = []
        self._process: subprocess.Popen[bytes] | None = None
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
        return self._process.pid if self._process is not None else None

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

    def close(self) -> None:
        """Abort what runs, deliver the terminal events and end the child, by force after 5 s."""
        with self._lock:
            if self._state == "ready":
                self._send(self._codec.encode(Close()))
                self._kill_at = time.monotonic() + CLOSE_GRACE
            elif self._state == "starting":
                self._kill_at = time.monotonic()
                if self._process is not None:
                    self._process.kill()
            if self._state in ("ready", "starting"):
                self._state = "closed"
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _send(self, data: bytes) -> None:
        """Never waits: the socket has no high-water mark. The lock is held."""
        import zmq

        assert self._commands is not None
        self._commands.send(data, zmq.NOBLOCK)

    def _run(self) -> None:
        import zmq

        context = zmq.Context()
        folder = _private_folder()
        commands, messages = context.socket(zmq.PAIR), context.socket(zmq.PULL)
        reader: threading.Thread | None = None
        reason = "the server could not start it"
        try:
            for socket in (commands, messages):
                socket.set_hwm(0)
                socket.linger = 0
            self._commands = commands
            messages.bind(f"ipc://{folder}/m" if self._unix_sockets else "tcp://127.0.0.1:*")
            address = messages.getsockopt_string(zmq.LAST_ENDPOINT)
            messages.bind("inproc://ended")
            process = self._spawn(f"ipc://{folder}/c" if self._unix_sockets else "tcp://127.0.0.1:*", address)
            reader = threading.Thread(
                target=self._read_journal,
                args=(process, context),
                name=f"{self._thread.name}-journal",
                daemon=True,
            )
            reader.start()
            self._receive(messages, folder)
            reason = _how_it_ended(process)
        except Exception as error:
            logger.exception("engine %d is given up", self.index)
            reason = f"{type(error).__name__}: {error}"
        finally:
            if self._process is not None:
                self._process.kill()
                self._process.wait()
                assert self._process.stdin is not None
                self._process.stdin.close()
            if reader is not None:
                reader.join(timeout=CLOSE_GRACE)
            with self._lock:
                if self._state != "closed":
                    self._state = "dead"
                    self._failure = self._failure or f"engine {self.index} died ({reason})"
                self._commands = None
            shutil.rmtree(folder, ignore_errors=True)
            self._end_all()
            commands.close()
            messages.close()
            if reader is None or not reader.is_alive():
                context.term()
            self._tell_watchers()

    def _spawn(self, commands: str, messages: str) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._environment}
        # The child finds its modules where this process does, and nowhere else (-P).
        environment["PYTHONPATH"] = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)
        with self._lock:
            if self._state != "starting":
                raise EngineError("closed while it was being started")
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-P", "-m", "mini_sglang.engine.process_main"),
                    *("--backend", self._backend, "--commands", commands, "--messages", messages),
                ],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                start_new_session=True,
            )
        logger.info("engine %d is process %d", self.index, self._process.pid)
        return self._process

    def _read_journal(
        self, process: subprocess.Popen[bytes], context: zmq.Context[zmq.Socket[bytes]]
    ) -> None:
        """Note the serials of what the child starts, until the child is gone."""
        import zmq

        assert process.stdout is not None
        with context.socket(zmq.PUSH) as socket, process.stdout as journal:
            socket.connect("inproc://ended")
            rest = b""
            while data := os.read(journal.fileno(), 1 << 16):
                rest += data
                whole = len(rest) - len(rest) % _SERIAL_BYTES
                with self._lock:
                    for at in range(0, whole, _SERIAL_BYTES):
                        entry = self._by_serial.get(int.from_bytes(rest[at : at + _SERIAL_BYTES], "little"))
                        if entry is not None:
                            entry.started = True
                rest = rest[whole:]
            process.wait()
            socket.send(_ENDED)

    def _receive(self, messages: zmq.Socket[bytes], folder: Path) -> None:
        """Take the child's messages until it is gone."""
        timeout = self._step_timeout
        tick = min(_TICK, timeout / 8) if timeout else _TICK
        codec, silence = Codec(), 0.0
        while True:
            if messages.poll(max(1, int(tick * 1000))):
                silence = 0.0
                data = messages.recv()
                if data == _ENDED:
                    break
                self._take(codec.message(data), folder)
            else:
                # Counted in looks, not by the clock: this process may have been stopped itself.
                silence += tick
                if timeout and silence >= timeout and self._state == "ready":
                    self._give_up(
                        f"engine {self.index} gave no sign of life for {timeout:g} s (STEP_TIMEOUT)"
                    )
            if self._kill_at is not None and time.monotonic() >= self._kill_at:
                assert self._process is not None
                self._process.kill()
        # What the child had sent before it went.
        while messages.poll(20):
            data = messages.recv()
            if data != _ENDED:
                self._take(codec.message(data), folder)

    def _take(self, message: Message, folder: Path) -> None:
        if isinstance(message, Report):
            if message.stats is not None:
                self._stats = message.stats
            for event in message.events:
                self._deliver(event)
        elif isinstance(message, Hello):
            with self._lock:
                if self._commands is not None:
                    self._commands.connect(message.address)
                    self._send(self._codec.encode(self._setup))
        elif isinstance(message, Notice):
            if self._notify is not None:
                self._notify(message.line)
        elif isinstance(message, Ready):
            # Both sockets are connected: nothing is left on disk to clean up later.
            shutil.rmtree(folder, ignore_errors=True)
            with self._lock:
                self._info = message.info
                if self._state == "starting":
                    self._state = "ready"
            logger.info("engine %d is ready", self.index)
            self._tell_watchers()
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
        if entry is not None and not self._call_sink(entry.sink, event) and event.finish is None:
            self.abort(event.request_id)
            with self._lock:
                if self._entries.pop(event.request_id, None) is not None:
                    del self._by_serial[entry.serial]

    @staticmethod
    def _call_sink(sink: Sink, event: TokenEvent) -> bool:
        try:
            sink(event)
        except Exception:
            logger.exception("the receiver of request %s failed; the request is dropped", event.request_id)
            return False
        return True

    def _end_all(self) -> None:
        """One terminal event for each request the child left without."""
        with self._lock:
            entries, self._entries, self._by_serial = self._entries, {}, {}
            closed, failure = self._state == "closed", self._failure
        for request_id, entry in entries.items():
            if closed:
                event = TokenEvent(request_id, finish=FinishReason.ABORT)
            else:
                kind = ENGINE_DIED if entry.started else NOT_STARTED
                event = TokenEvent(request_id, finish=FinishReason.ERROR, error=failure, error_kind=kind)
            self._call_sink(entry.sink, event)

    def _tell_watchers(self) -> None:
        for callback in list(self._watchers):
            try:
                callback()
            except Exception:
                logger.exception("a watcher of engine %d failed", self.index)


def plain_settings(settings: Settings) -> dict[str, Scalar]:
    """What ``Settings.resolve`` needs to make these settings again; secrets stay here."""
    plain: dict[str, Scalar] = {}
    for spec in setting_fields():
        value = getattr(settings, spec.name)
        secret = spec.name.startswith("api_key")
        if value is not None and not secret and (spec.name in settings.chosen or value != spec.default):
            plain[spec.name] = str(value) if isinstance(value, Path) else value
    return plain


def _private_folder() -> Path:
    """A new folder only this user can enter, with a name short enough for a socket's address."""
    folder = Path(tempfile.mkdtemp(prefix="mini-sglang-"))
    if len(os.fsencode(folder)) > 90:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="mini-sglang-", dir="/tmp"))
    return folder


def _how_it_ended(process: subprocess.Popen[bytes]) -> str:
    status = process.wait()
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"
