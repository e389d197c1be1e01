"""The processes of the ranks that follow, as the one that leads holds them: their start, watch and end."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from mini_sglang.backend.children import module_command, module_environment
from mini_sglang.backend.parallel.wire import Codec, Command, Failed, Hello, Join, Ready, read_frame
from mini_sglang.errors import BackendLostError

SILENCE = 15.0
"""Seconds without a sign of life after which a rank that was ready counts as hung."""
_TICK = 0.5
_CLOSE_SECONDS = 5.0
# A rank whose neighbour died says that its connection closed: the death is to be heard of first.
_HEARSAY_SECONDS = 0.5


class _Follower:
    """One of the processes; what it said last."""

    def __init__(self, rank: int, process: subprocess.Popen[bytes]) -> None:
        self.rank = rank
        self.process = process
        self.stage = ""  # "hello", then "ready"
        self.failed: str | None = None
        self.heard = True
        self.silence = 0.0
        self.reader: threading.Thread | None = None


class Followers:
    """Ranks 1 to ``size - 1``, each a process that ends when this one does. When one is lost, all are ended.

    Args:
        joins: what each is told first, in order of rank.
        on_lost: called then, in a thread of its own.
        silence: seconds without a sign of life that a rank may have.
    """

    def __init__(self, joins: Sequence[Join], on_lost: Callable[[], None], silence: float = SILENCE) -> None:
        self._size = len(joins) + 1
        self._folder = Path(joins[0].folder)
        self._on_lost = on_lost
        self._silence = silence
        self._codec = Codec()
        self._changed = threading.Condition()
        self._failure: str | None = None
        self._ending = False
        self._all: list[_Follower] = []
        try:
            for join in joins:
                self._all.append(_Follower(join.rank, _start(join)))
            for follower, join in zip(self._all, joins, strict=True):
                self._write(follower, self._codec.frame(join))
        except BaseException:
            self.close()
            raise
        for follower in self._all:
            follower.reader = threading.Thread(
                target=self._read, args=(follower,), name=f"mini-sglang-rank-{follower.rank}", daemon=True
            )
            follower.reader.start()
        self._watch = threading.Thread(target=self._look, name="mini-sglang-ranks", daemon=True)
        self._watch.start()

    @property
    def pids(self) -> list[int]:
        return [follower.process.pid for follower in self._all]

    @property
    def failure(self) -> str | None:
        """Which rank was lost, and how; ``None`` while all are there."""
        return self._failure

    def wait_for(self, stage: str) -> None:
        """Wait until all have come as far: "hello" or "ready".

        Raises:
            BackendLostError: one is lost.
        """
        passed = ("ready",) if stage == "ready" else ("hello", "ready")
        with self._changed:
            self._changed.wait_for(lambda: self._failure or all(one.stage in passed for one in self._all))
        if self._failure is not None:
            raise BackendLostError(self._failure)

    def send(self, command: Command) -> None:
        """Tell all of them.

        Raises:
            BackendLostError: one is lost.
        """
        if self._failure is not None:
            raise BackendLostError(self._failure)
        frame = self._codec.frame(command)
        for follower in self._all:
            self._write(follower, frame)

    def why(self, seconds: float) -> str | None:
        """``failure``, for which it waits so long."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None, seconds)
        return self._failure

    def forget_folder(self) -> None:
        """Remove what was only needed to find each other."""
        shutil.rmtree(self._folder, ignore_errors=True)

    def close(self) -> None:
        """End them. Safe to call twice."""
        self._ending = True
        for follower in self._all:
            with contextlib.suppress(OSError):
                assert follower.process.stdin is not None
                follower.process.stdin.close()
        deadline = time.monotonic() + _CLOSE_SECONDS
        for follower in self._all:
            with contextlib.suppress(subprocess.TimeoutExpired):
                follower.process.wait(max(0.0, deadline - time.monotonic()))
            follower.process.kill()
            follower.process.wait()
            if follower.reader is not None and follower.reader is not threading.current_thread():
                follower.reader.join(_CLOSE_SECONDS)
        self.forget_folder()

    def _write(self, follower: _Follower, frame: bytes) -> None:
        assert follower.process.stdin is not None
        try:
            follower.process.stdin.write(frame)
            follower.process.stdin.flush()
        except (OSError, ValueError):
            said = self.why(2 * _HEARSAY_SECONDS) or f"rank {follower.rank} takes no commands"
            raise BackendLostError(said) from None

    def _read(self, follower: _Follower) -> None:
        codec, stream = Codec(), follower.process.stdout
        assert stream is not None
        with stream:
            while (body := read_frame(stream)) is not None:
                message = codec.message(body)
                follower.heard = True
                if isinstance(message, Failed):
                    follower.failed = message.message
                elif isinstance(message, Hello | Ready):
                    with self._changed:
                        follower.stage = "ready" if isinstance(message, Ready) else "hello"
                        self._changed.notify_all()
        status = follower.process.wait()
        if follower.failed is not None:
            time.sleep(_HEARSAY_SECONDS)
            self._lose(follower.failed)
        else:
            how = f"killed by signal {-status}" if status < 0 else f"exit status {status}"
            self._lose(f"rank {follower.rank} of {self._size} died ({how})")

    def _look(self) -> None:
        """Count how long each has been silent: in looks, since this process may have been stopped itself."""
        while not self._ending and self._failure is None:
            time.sleep(_TICK)
            for follower in self._all:
                quiet = not follower.heard and follower.stage == "ready"
                follower.silence = follower.silence + _TICK if quiet else 0.0
                follower.heard = False
                if follower.silence >= self._silence:
                    self._lose(
                        f"rank {follower.rank} of {self._size} gave no sign of life for {self._silence:g} s"
                    )

    def _lose(self, failure: str) -> None:
        with self._changed:
            if self._ending or self._failure is not None:
                return
            self._failure = failure
            self._changed.notify_all()
        # What waits for one of them in a collective fails now.
        for follower in self._all:
            follower.process.kill()
        self._on_lost()


def _start(join: Join) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        module_command("mini_sglang.backend.parallel.follower_main", "--rank", f"{join.rank}/{join.size}"),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=module_environment(),
        start_new_session=True,
    )
