"""The three standard streams of the command: answers on stdout, everything else on stderr."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
import threading
from types import FrameType
from typing import IO, Any, TextIO

from mini_sglang.errors import MiniSglangError

MAX_INPUT_BYTES = 64 << 20

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
# What a model writes must not move the cursor or set the title of the terminal it is shown in.
_CONTROLS = {code: "\ufffd" for code in (*range(32), *range(127, 160)) if chr(code) not in "\n\t"}


class OutputClosedError(Exception):
    """Nobody reads standard output any more (``| head -1``): a reason to stop, not a fault."""


class LeaveNow(KeyboardInterrupt):
    """Ctrl-C was pressed again and again: the command ends, whatever the engine is doing."""


class Terminal:
    """Reads prompts and writes answers and notices, in UTF-8 whatever the locale says.

    Args:
        quiet: leave out notices (progress and figures); errors are still said.
    """

    def __init__(self, quiet: bool = False) -> None:
        # A process may be started with any of the three closed, which Python shows as None.
        self._in: TextIO | None = sys.stdin
        self._out: TextIO = sys.stdout or io.StringIO()
        self._err: TextIO = sys.stderr or io.StringIO()
        self.quiet = quiet
        self.input_is_terminal = self._in is not None and self._in.isatty()
        self.output_is_terminal = self._out.isatty()
        self.errors_are_terminal = self._err.isatty()
        _reconfigure(self._in, "strict")
        _reconfigure(self._out, "replace")
        _reconfigure(self._err, "backslashreplace")
        self._dim = self.errors_are_terminal and not os.environ.get("NO_COLOR")
        self._dim = self._dim and os.environ.get("TERM") != "dumb"
        if self.input_is_terminal and self.output_is_terminal:
            # Importing it is what gives input() line editing and history.
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401

    def write(self, text: str) -> None:
        """Put a piece of an answer on standard output, at once.

        Raises:
            OutputClosedError: the reader has gone away.
            MiniSglangError: it cannot be written for another reason, such as a full disk.
        """
        try:
            self._out.write(text.translate(_CONTROLS) if self.output_is_terminal else text)
            self._out.flush()
        except BrokenPipeError:
            point_at_nothing(self._out)
            raise OutputClosedError from None
        except OSError as error:
            point_at_nothing(self._out)
            raise MiniSglangError(f"Standard output cannot be written to: {error.strerror}.") from None

    def notice(self, text: str) -> None:
        """Say something in passing on standard error, in dim text on a terminal."""
        if not self.quiet:
            self.say(f"{_DIM}{text}{_PLAIN}" if self._dim else text)

    def figures(self, text: str, asked_for: bool) -> None:
        """Say what an answer took: to a person who watches, or where it was asked for."""
        if asked_for or (self.errors_are_terminal and not self.quiet):
            self.say(f"{_DIM}{text}{_PLAIN}" if self._dim else text)

    def say(self, text: str) -> None:
        """Say something that was asked for, or an error, on standard error."""
        try:
            self._err.write(text + "\n")
            self._err.flush()
        except OSError:
            point_at_nothing(self._err)

    def error(self, text: object) -> None:
        self.say(f"mini-sglang: {text}")

    def read_all(self) -> str:
        """All of standard input.

        Raises:
            MiniSglangError: it is not UTF-8, or longer than 64 MiB.
        """
        return "" if self._in is None else _decode(_binary(self._in).read(MAX_INPUT_BYTES + 1))

    def read_line(self, prompt: str) -> str | None:
        """The next line without its end, or None at the end of the input.

        ``prompt`` is shown only where a person types.

        Raises:
            MiniSglangError: the line is not UTF-8, or longer than 64 MiB.
        """
        if self._in is None:
            return None
        if not self.input_is_terminal:
            line = _binary(self._in).readline(MAX_INPUT_BYTES + 1)
            return _decode(line).rstrip("\r\n") if line else None
        try:
            if self.output_is_terminal:
                return input(prompt)
            self._err.write(prompt)
            self._err.flush()
            line_typed = self._in.readline()
            return line_typed.rstrip("\n") if line_typed else None
        except EOFError:
            return None
        except UnicodeDecodeError:
            raise MiniSglangError("What was typed is not UTF-8 text.") from None


class Interrupt:
    """Within it, the first Ctrl-C asks for a stop and the program goes on.

    It is counted in ``presses``, and raises ``KeyboardInterrupt`` only while ``may_raise`` is set: where
    nothing can be left half done. The third one raises ``LeaveNow`` wherever it is.
    """

    def __init__(self) -> None:
        self.presses = 0
        self.may_raise = False
        self._previous: Any = None

    def __enter__(self) -> Interrupt:
        if threading.current_thread() is threading.main_thread():
            previous = signal.getsignal(signal.SIGINT)
            # None and "ignored" were somebody's choice: a background job must not react to Ctrl-C.
            if previous not in (None, signal.SIG_IGN):
                self._previous = previous
                signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)

    def _press(self, _signal: int, _frame: FrameType | None) -> None:
        self.presses += 1
        if self.presses == 1 and self.may_raise:
            raise KeyboardInterrupt
        if self.presses == 2:
            # Not through sys.stderr: the interrupted code may be inside its buffer.
            with contextlib.suppress(OSError):
                os.write(2, b"\nStopping; Ctrl-C once more leaves at once.\n")
        if self.presses > 2:
            raise LeaveNow


def _binary(stream: TextIO) -> IO[bytes]:
    return stream.buffer


def _decode(data: bytes) -> str:
    if len(data) > MAX_INPUT_BYTES:
        raise MiniSglangError(f"The text on standard input is longer than {MAX_INPUT_BYTES >> 20} MiB.")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise MiniSglangError(
            f"The text on standard input is not UTF-8: byte 0x{data[error.start]:02x} at {error.start}."
        ) from None


def _reconfigure(stream: TextIO | None, errors: str) -> None:
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(encoding="utf-8", errors=errors)


def point_at_nothing(stream: TextIO) -> None:
    """Let whatever is still written to a stream whose reader is gone disappear."""
    # What is still buffered would fail again when the interpreter flushes at its exit.
    with contextlib.suppress(OSError, ValueError):
        nothing = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nothing, stream.fileno())
        os.close(nothing)
