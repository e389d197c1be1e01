"""An engine's own process: ``python -m mini_sglang.engine.process_main``.

``process.ProcessEngine`` starts it. One thread does everything between two steps: it reads commands, runs
the step and sends its events, so that silence means a step that hangs. Standard input ends when the
parent does; standard output is the journal of what was started.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import importlib
import logging
import os
import queue
import signal
import struct
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang.config import Settings
from mini_sglang.engine.adapters import NoAdapterError
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.handle import NOT_STARTED
from mini_sglang.engine.wire import (
    Abort,
    AdapterLoaded,
    Close,
    Codec,
    Command,
    Failed,
    Hello,
    LoadAdapter,
    Message,
    Notice,
    Ready,
    Report,
    Setup,
    Submit,
    UnloadAdapter,
)
from mini_sglang.errors import BackendLostError, MiniSglangError, shorten
from mini_sglang.types import FinishReason, TokenEvent

if TYPE_CHECKING:
    import zmq

logger = logging.getLogger("mini_sglang.engine.process")

# Seconds between signs of life while there is nothing to do, and between counters while there is.
HEARTBEAT = 0.5
STATS_EVERY = 0.2
ADAPTER_LOOK = 0.01  # between looks for an adapter that is being read
SERIAL = struct.Struct("<Q")

MakeCore = Callable[[Settings, Setup, Callable[[str], None]], EngineCore]
"""What ``--backend module:function`` names: loads the model; the last argument takes lines for the user."""


class Child:
    """The loop of an engine's process.

    The journal gets the serial of a request before its first step runs. A write to a pipe is in the
    kernel's hands at once, so that it outlives a step that kills this process; a message may not.

    Args:
        forget_sockets: called once both sockets are connected.
    """

    def __init__(
        self,
        commands: zmq.Socket[bytes],
        messages: zmq.Socket[bytes],
        journal: int,
        forget_sockets: Callable[[], None],
    ) -> None:
        self._commands = commands
        self._messages = messages
        self._journal = journal
        self._forget_sockets = forget_sockets
        self._codec = Codec()
        self._serials: dict[str, int] = {}
        self._told_stats = 0.0
        self._heartbeat = HEARTBEAT
        self._loads = 0  # adapters being read by threads of their own
        self._read: queue.SimpleQueue[tuple[LoadAdapter, object]] = queue.SimpleQueue()

    def run(self, make_core: MakeCore) -> int:
        """Load and serve until told to close; the exit status."""
        import zmq

        try:
            self._send(Hello(self._commands.getsockopt_string(zmq.LAST_ENDPOINT)))
            setup = self._codec.command(self._commands.recv())
            assert isinstance(setup, Setup)
            # Both sockets are connected: nothing is left on disk to clean up later.
            self._forget_sockets()
            _die_with_parent()
            _log_to_stderr(setup)
            settings = Settings.resolve(dict(setup.settings), {})
            if settings.step_timeout:
                self._heartbeat = min(HEARTBEAT, settings.step_timeout / 4)
            # What is made here stays: no use looking for garbage in it, now or later in the middle of a step.
            gc.disable()
            self._core = make_core(settings, setup, lambda line: self._send(Notice(line)))
            gc.freeze()
            gc.enable()
            self._core.on_start = self._write_started
            self._send(Ready(self._core.info))
        except MiniSglangError as error:
            self._send(Failed(str(error)))
            return 1
        except Exception as error:
            logger.exception("the engine did not start")
            self._send(Failed(f"the engine did not start: {error!r:.200}"))
            return 1
        try:
            while self._turn():
                pass
            if self._core.saved_cache is not None:
                self._send(Notice(f"Saving the prefix cache to {self._core.saved_cache} …"))
            self._core.close()
        except BackendLostError as error:
            self._send(Failed(f"the engine died: {error}"))
            return 1
        except BaseException as error:
            logger.exception("the engine died")
            self._send(Failed(f"the engine died: {error!r:.200}"))
            return 1
        return 0

    def _turn(self) -> bool:
        """Commands, one step, events; False after ``Close``."""
        import zmq

        core, going_on = self._core, True
        events: list[TokenEvent] = []
        busy = core.has_work
        if not busy:
            wait = ADAPTER_LOOK if self._loads else self._heartbeat
            self._commands.poll(max(1, int(wait * 1000)))
        self._attach_read()
        while going_on:
            try:
                data = self._commands.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            going_on = self._obey(self._codec.command(data), events)
        if going_on:
            events += core.step()
        else:
            ended = (core.abort(request_id) for request_id in list(self._serials))
            events += [event for event in ended if event is not None]
        for event in events:
            if event.finish is not None:
                self._serials.pop(event.request_id, None)
        now = time.monotonic()
        fresh = now - self._told_stats < STATS_EVERY and core.has_work and going_on
        if events or not fresh:
            self._told_stats = self._told_stats if fresh else now
            self._send(Report(events, None if fresh else core.stats()))
        return going_on

    def _obey(self, command: Command, events: list[TokenEvent]) -> bool:
        if isinstance(command, Submit):
            try:
                work = self._codec.work(command)
                if work.params.grammar is not None:
                    # Its compiler begins at once, and is as able to end this process as a step is.
                    self._write(SERIAL.pack(command.serial))
                self._core.add(self._core.request_of(work))
                self._serials[command.request_id] = command.serial
            except Exception as error:
                logger.warning("refused request=%s: %s", command.request_id, error)
                kind = NOT_STARTED if isinstance(error, NoAdapterError) else None
                event = TokenEvent(
                    command.request_id, finish=FinishReason.ERROR, error=shorten(str(error)), error_kind=kind
                )
                events.append(event)
        elif isinstance(command, Abort):
            ended = self._core.abort(command.request_id, command.reason)
            if ended is not None:
                events.append(ended)
        elif isinstance(command, LoadAdapter):
            self._load(command)
        elif isinstance(command, UnloadAdapter):
            self._core.adapters.unload(command.key)
        return not isinstance(command, Close)

    def _load(self, command: LoadAdapter) -> None:
        def read() -> None:
            try:
                prepared: object = self._core.adapters.read(command.adapter)
            except Exception as error:
                prepared = error
            self._read.put((command, prepared))

        self._loads += 1
        if command.at_once:
            read()
            self._attach_read()
        else:
            threading.Thread(target=read, name="mini-sglang-adapter", daemon=True).start()

    def _attach_read(self) -> None:
        """Take in the adapters that were read, between two steps."""
        while self._loads:
            try:
                command, prepared = self._read.get_nowait()
            except queue.Empty:
                return
            self._loads -= 1
            failure = None
            try:
                if isinstance(prepared, Exception):
                    raise prepared
                self._core.adapters.attach(command.adapter, prepared)
            except MiniSglangError as error:
                failure = str(error)
            except Exception as error:
                logger.exception("adapter %s was not loaded", command.adapter.name)
                failure = f"the adapter was not loaded: {error!r:.200}"
            self._send(AdapterLoaded(command.serial, failure))

    def _write_started(self, request_ids: list[str]) -> None:
        self._write(b"".join(SERIAL.pack(self._serials[request_id]) for request_id in request_ids))

    def _write(self, data: bytes) -> None:
        while data:
            data = data[os.write(self._journal, data) :]

    def _send(self, message: Message) -> None:
        self._messages.send(self._codec.encode(message))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mini_sglang.engine.process_main")
    parser.add_argument("--backend", required=True, metavar="MODULE:FUNCTION")
    parser.add_argument("--commands", required=True, metavar="ADDRESS")
    parser.add_argument("--messages", required=True, metavar="ADDRESS")
    parser.add_argument("--engine", metavar="N", help="its number, which only the list of processes shows")
    options = parser.parse_args(arguments)
    journal = _take_stdout()
    forget_sockets = partial(_remove_sockets, options.commands, options.messages)
    _end_with_parent(forget_sockets)
    import zmq

    context = zmq.Context()
    commands, messages = context.socket(zmq.PAIR), context.socket(zmq.PUSH)
    try:
        for socket in (commands, messages):
            # No high-water mark: a step never waits for the server to read.
            socket.set_hwm(0)
        commands.bind(options.commands)
        messages.connect(options.messages)
        module, _, function = options.backend.partition(":")

        def make_core(*given: Any) -> EngineCore:
            # Imported late: a missing module is a failure to report, not a traceback.
            core: EngineCore = getattr(importlib.import_module(module), function)(*given)
            return core

        return Child(commands, messages, journal, forget_sockets).run(make_core)
    finally:
        messages.close(linger=2000)
        commands.close(linger=0)
        context.term()


def _take_stdout() -> int:
    """Keep standard output for the journal; what others print goes to standard error."""
    journal = os.dup(1)
    os.dup2(2, 1)
    return journal


def _remove_sockets(*addresses: str) -> None:
    """Remove Unix sockets and their folder, which is private to them."""
    paths = [Path(address.removeprefix("ipc://")) for address in addresses if address.startswith("ipc://")]
    with contextlib.suppress(OSError):
        for path in paths:
            path.unlink(missing_ok=True)
        for folder in {path.parent for path in paths}:
            folder.rmdir()


def _end_with_parent(clean_up: Callable[[], None]) -> None:
    """End when the parent is gone, whatever it died of; its signals are not ours.

    A terminal's Ctrl-C and a service manager's SIGTERM reach every process; the parent decides then.
    """
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_IGN)

    def wait_for_the_end() -> None:
        while os.read(0, 1):
            pass
        clean_up()
        os._exit(0)

    threading.Thread(target=wait_for_the_end, name="mini-sglang-parent", daemon=True).start()


def _die_with_parent() -> None:
    """Die at once when the parent is gone, also where a step holds the interpreter's lock.

    Only once there is nothing to clean up: it leaves no time for that.
    """
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG


def _log_to_stderr(setup: Setup) -> None:
    handler = logging.StreamHandler(sys.stderr)
    form = f"%(asctime)s %(levelname)s [engine {setup.index}] %(message)s"
    handler.setFormatter(logging.Formatter(form, "%H:%M:%S"))
    package = logging.getLogger("mini_sglang")
    package.addHandler(handler)
    package.setLevel(str(setup.settings.get("log_level", "warning")).upper())
    package.propagate = False


if __name__ == "__main__":
    sys.exit(main())
