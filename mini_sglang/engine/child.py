"""The process of an engine as its parent holds it: how it starts, the ways to it, and its end."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import zmq

_SERIAL_BYTES = 8
_READER_GRACE = 5.0  # seconds the journal's reader has to see the end of a process that was killed
_ENDED = b""  # from that reader: the process is gone


class ChildProcess:
    """A process that runs ``process_main``, with the sockets to it and its journal.

    Made and used by one thread, which outlives the process; Linux ends it when the thread that started it
    ends. ``connect`` and ``send`` are for any thread that holds the lock which the user keeps for them,
    ``kill`` for any at all.

    Args:
        index: the engine's number, for those who look at the list of processes.
        name: of the thread that reads the journal.
        unix_sockets: sockets in a private folder; False takes TCP on the loopback.
    """

    def __init__(self, index: int, name: str, *, unix_sockets: bool) -> None:
        self._index = index
        self._name = name
        self._folder = _private_folder() if unix_sockets else None
        self._context = zmq.Context()
        self._commands, self._messages = self._context.socket(zmq.PAIR), self._context.socket(zmq.PULL)
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None
        for socket in (self._commands, self._messages):
            socket.set_hwm(0)
            socket.linger = 0

    @property
    def pid(self) -> int | None:
        """None before ``start``."""
        return self._process.pid if self._process is not None else None

    def start(
        self, backend: str, environment: Mapping[str, str], on_started: Callable[[Sequence[int]], None]
    ) -> None:
        """Start the process.

        Args:
            backend: ``module:function``, a ``process_main.MakeCore``.
            environment: variables beside this process's own.
            on_started: called in a thread of its own with the serials that the journal names.
        """
        self._messages.bind(self._address("m"))
        messages = self._messages.getsockopt_string(zmq.LAST_ENDPOINT)
        self._messages.bind("inproc://ended")
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-P", "-m", "mini_sglang.engine.process_main"),
                *("--backend", backend, "--commands", self._address("c"), "--messages", messages),
                *("--engine", str(self._index)),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # It finds its modules where this process does, and nowhere else (-P).
            env={
                **os.environ,
                **environment,
                "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path),
            },
            start_new_session=True,
        )
        self._reader = threading.Thread(
            target=self._read_journal, args=(self._process, on_started), name=self._name, daemon=True
        )
        self._reader.start()

    def connect(self, address: str) -> None:
        """Take the address that the process named for its commands."""
        self._commands.connect(address)

    def send(self, data: bytes) -> None:
        """Send a command. Never waits: the socket has no high-water mark."""
        self._commands.send(data, zmq.NOBLOCK)

    def receive(self, seconds: float) -> bytes | None:
        """The next message, None where none came in time.

        Raises:
            EOFError: the process is gone; there may still be messages it sent before.
        """
        if not self._messages.poll(max(1, int(seconds * 1000))):
            return None
        data = self._messages.recv()
        if data == _ENDED:
            raise EOFError
        return data

    def forget_folder(self) -> None:
        """Remove what was only needed to find each other, where the child has not."""
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def how_it_ended(self) -> str:
        """Wait for the end; how it came about, as words for a sentence."""
        assert self._process is not None
        status = self._process.wait()
        return f"killed by signal {-status}" if status < 0 else f"exit status {status}"

    def end(self) -> None:
        """Kill the process if it still runs, and read its journal to the end."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            self._process.stdin.close()
        if self._reader is not None:
            self._reader.join(timeout=_READER_GRACE)
        self.forget_folder()

    def close(self) -> None:
        """Free the sockets, after ``end``."""
        self._commands.close()
        self._messages.close()
        if self._reader is None or not self._reader.is_alive():
            self._context.term()

    def _address(self, name: str) -> str:
        return f"ipc://{self._folder}/{name}" if self._folder is not None else "tcp://127.0.0.1:*"

    def _read_journal(
        self, process: subprocess.Popen[bytes], on_started: Callable[[Sequence[int]], None]
    ) -> None:
        assert process.stdout is not None
        with self._context.socket(zmq.PUSH) as socket, process.stdout as journal:
            socket.connect("inproc://ended")
            rest = b""
            while data := os.read(journal.fileno(), 1 << 16):
                rest += data
                whole = len(rest) - len(rest) % _SERIAL_BYTES
                on_started(
                    [
                        int.from_bytes(rest[at : at + _SERIAL_BYTES], "little")
                        for at in range(0, whole, _SERIAL_BYTES)
                    ]
                )
                rest = rest[whole:]
            process.wait()
            socket.send(_ENDED)


def _private_folder() -> Path:
    """A new folder only this user can enter, with a name short enough for a socket's address."""
    folder = Path(tempfile.mkdtemp(prefix="mini-sglang-"))
    if len(os.fsencode(folder)) > 90:
        folder.rmdir()
        folder = Path(tempfile.mkdtemp(prefix="mini-sglang-", dir="/tmp"))
    return folder
