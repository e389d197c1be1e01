"""The driver in a child process: through pipes, or on a pseudo-terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]
DRIVER = ("-m", "tests.cli.driver")
_LEFT_OUT = ("NO_COLOR", "PYTHONIOENCODING", "PYTHONUNBUFFERED")
# A child finds the package and the driver where they are in the repository, installed or not.
ENV = {name: value for name, value in os.environ.items() if name not in _LEFT_OUT} | {"PYTHONPATH": str(ROOT)}
LIMIT_S = 60


def piped(args: Sequence[str | bytes], stdin: bytes = b"", **env: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [sys.executable, *DRIVER, *args], input=stdin, capture_output=True, env=ENV | env, timeout=LIMIT_S
    )


class OnTerminal:
    """The driver with all three streams on a pseudo-terminal, which also gives it its Ctrl-C."""

    def __init__(self, args: Sequence[str], stdout: int | None = None) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [sys.executable, *DRIVER, *args],
            stdin=slave,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            start_new_session=True,
            env=ENV | {"CLI_TEST_PTY": "1", "TERM": "xterm"},
        )
        os.close(slave)
        self.shown = ""

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def expect(self, text: str) -> str:
        """Wait until ``text`` is shown; returns what was shown up to its end, and forgets that."""
        self._read_until(lambda: text in self.shown, repr(text))
        before, found, self.shown = self.shown.partition(text)
        return before + found

    def press_until(self, key: str, text: str) -> str:
        """Press ``key`` until ``text`` is shown: readline loses a signal just after it shows its prompt."""
        deadline = time.monotonic() + LIMIT_S
        while text not in self.shown and time.monotonic() < deadline:
            self.type(key)
            while text not in self.shown and select.select([self._master], [], [], 0.5)[0]:
                assert self._read(), f"ended before {text!r}, was shown {self.shown!r}"
        return self.expect(text)

    def expect_end(self) -> int:
        """Wait for the process to end; returns its exit status, ``shown`` has what it still said."""
        self._read_until(lambda: False, "its end")
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        self.process.kill()
        self.process.wait(LIMIT_S)
        os.close(self._master)

    def _read_until(self, done: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + LIMIT_S
        while not done():
            ready, _, _ = select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"waited for {what}, was shown {self.shown!r}"
            if not self._read():
                assert what == "its end", f"ended before {what}, was shown {self.shown!r}"
                return

    def _read(self) -> bool:
        """Take what is there; False where the other side is closed."""
        try:
            data = os.read(self._master, 65536)
        except OSError:  # Linux's way of saying that the other side is closed
            data = b""
        self.shown += data.decode("utf-8", "replace")
        return bool(data)
