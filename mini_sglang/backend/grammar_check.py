"""Grammars from strangers, first compiled in a process that can be killed.

The helper is ``python -m mini_sglang.backend.grammar_check``: the vocabulary comes in on standard input,
then grammars, one at a time; for each a sentence goes out, empty where the grammar is good. Frames are a
length and bytes; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from mini_sglang.backend.grammar_matcher import make_ll_tokenizer, make_matcher, try_matcher
from mini_sglang.errors import EngineError

CHECK_SECONDS = 0.8
# A helper's clock runs while others have the cores: what may pass for one second of its own CPU time.
_WALL_FACTOR = 5.0
_START_SECONDS = 60.0
_MEMORY_BYTES = 2 << 30
_HELPERS = 2
_LENGTH = struct.Struct("<I")
_READY = b"ready"


class Checker:
    """Up to two helpers, started when they are needed and after one was killed. Thread-safe.

    Args:
        tokens: bytes of each id.
        seconds: CPU time that a grammar may take.
    """

    def __init__(self, tokens: Sequence[bytes], seconds: float = CHECK_SECONDS) -> None:
        self._tokens = tokens
        self._seconds = seconds
        self._turns = threading.BoundedSemaphore(_HELPERS)
        self._lock = threading.Lock()
        self._idle: list[_Helper] = []
        self._starting: set[_Helper] = set()
        self._closed = False

    def check(self, kind: str, text: str) -> str | None:
        """Why a grammar of ``SamplingParams.grammar`` cannot be used; None where it can.

        Raises:
            EngineError: no helper can be started.
        """
        with self._turns:
            helper = self._take()
            answer = helper.ask(kind, text, self._seconds)
            if answer is None and not helper.too_slow:
                # It may have been killed by somebody else: the grammar has another try, in a new one.
                helper.kill()
                helper = self._start()
                answer = helper.ask(kind, text, self._seconds)
            if answer is not None:
                self._give_back(helper)
                return answer or None
            helper.kill()
            self._start_spare()
            return f"it takes more than {self._seconds:g} seconds, or {_MEMORY_BYTES >> 30} GiB, to compile"

    def prepare(self) -> None:
        """Start a helper where there is none yet.

        Raises:
            EngineError: none can be started.
        """
        with self._turns:
            self._give_back(self._take())

    def close(self) -> None:
        """End the helpers, and those to come after one check. Safe to call twice."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
            for helper in self._starting:
                helper.interrupt()
        for helper in idle:
            helper.kill()

    def _take(self) -> _Helper:
        while True:
            with self._lock:
                helper = self._idle.pop() if self._idle else None
            if helper is None:
                helper = self._start()
                self._start_spare()
                return helper
            if helper.alive:
                return helper
            helper.kill()

    def _start(self) -> _Helper:
        helper = _Helper()
        with self._lock:
            self._starting.add(helper)
            if self._closed:
                helper.interrupt()
        try:
            helper.start(self._tokens)
        finally:
            with self._lock:
                self._starting.discard(helper)
        return helper

    def _give_back(self, helper: _Helper) -> None:
        with self._lock:
            if not self._closed and len(self._idle) < _HELPERS:
                self._idle.append(helper)
                return
        helper.kill()

    def _start_spare(self) -> None:
        """Have another helper ready: a start takes about as long as a grammar may."""

        def start() -> None:
            with contextlib.suppress(EngineError):
                self._give_back(self._start())

        with self._lock:
            if self._idle or self._closed:
                return
        threading.Thread(target=start, name="mini-sglang-grammar-helper", daemon=True).start()


class _Helper:
    """One helper process, of use after ``start``."""

    def __init__(self) -> None:
        self._timed_out = False
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "mini_sglang.backend.grammar_check"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,  # a terminal's Ctrl-C is not for it
            )
        except OSError as error:
            raise EngineError(f"The helper that checks grammars cannot be started: {error}.") from None

    def start(self, tokens: Sequence[bytes]) -> None:
        """Raises EngineError, and ends it, where it cannot be started."""
        lengths = json.dumps([len(token) for token in tokens]).encode()
        if self._exchange([lengths, b"".join(tokens)], _START_SECONDS) != _READY:
            self.kill()
            raise EngineError("The helper that checks grammars did not start.")

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def too_slow(self) -> bool:
        """It ended because its last grammar took too long, and not of anything else."""
        return self._timed_out or self._process.wait() == -getattr(signal, "SIGPROF", 0)

    def ask(self, kind: str, text: str, seconds: float) -> str | None:
        """The helper's sentence, empty for a good grammar; None where none came in time or it died."""
        frames = [kind.encode(), text.encode(), str(seconds).encode()]
        answer = self._exchange(frames, seconds * _WALL_FACTOR)
        return None if answer is None else answer.decode("utf-8", "replace")

    def interrupt(self) -> None:
        """End it while another thread waits for it: that thread's wait ends too."""
        self._process.kill()

    def kill(self) -> None:
        self._process.kill()
        for pipe in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError):
                if pipe is not None:
                    pipe.close()
        self._process.wait()

    def _exchange(self, frames: Sequence[bytes], seconds: float) -> bytes | None:
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(seconds, self._time_out)
        timer.daemon = True
        timer.start()
        try:
            for frame in frames:
                _write(self._process.stdin, frame)
            return _read(self._process.stdout)
        except OSError:
            return None
        finally:
            timer.cancel()

    def _time_out(self) -> None:
        self._timed_out = True
        self._process.kill()


def _write(pipe: IO[bytes], frame: bytes) -> None:
    pipe.write(_LENGTH.pack(len(frame)))
    pipe.write(frame)
    pipe.flush()


def _read(pipe: IO[bytes]) -> bytes | None:
    """The next frame; None at the end of the pipe."""
    head = pipe.read(_LENGTH.size)
    if len(head) < _LENGTH.size:
        return None
    (length,) = _LENGTH.unpack(head)
    frame = pipe.read(length)
    return frame if len(frame) == length else None


def main() -> None:
    """The helper: ends with its standard input, and so with its parent."""
    source, out = sys.stdin.buffer, os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    _limit_memory()
    lengths, joined = _read(source), _read(source)
    if lengths is None or joined is None:
        return
    tokens: list[bytes] = []
    start = 0
    for length in json.loads(lengths):
        tokens.append(joined[start : start + length])
        start += length
    tokenizer = make_ll_tokenizer(tokens)
    _write(out, _READY)
    while (kind := _read(source)) is not None and (text := _read(source)) is not None:
        seconds = float(_read(source) or CHECK_SECONDS)
        # Of CPU time; where the parent is gone, nobody else ends a helper that is deep in a compile.
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, seconds)
        matcher, reason = make_matcher(kind.decode(), text.decode(), tokenizer)
        if matcher is not None:
            reason = try_matcher(matcher, tokenizer.vocab_size)
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0.0)
        _write(out, (reason or "").encode("utf-8", "replace")[:4096])


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        return  # no such limit on this system


if __name__ == "__main__":
    main()
