"""This end of a worker: starts an engine's process and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import psutil

from mini_sglang.bench.usage import Usage
from mini_sglang.errors import MiniSglangError, shorten

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]


class PeerError(MiniSglangError):
    """A peer that cannot be started or that failed, in one sentence."""


class Process:
    """An engine in a process of its own; it waits in a read while it is not asked.

    It ends with the thread that makes it.

    Args:
        worker: ``openvino`` for ``workers/run_openvino.py``, or the path of a script.
        python: the interpreter that runs it.
        options: what the worker's engine is made with.
        env: variables beside those of this process.
        seconds: how long the start may take; without it there is no limit.

    Raises:
        PeerError: the interpreter is missing, or the engine did not load, or not in time.
    """

    def __init__(
        self,
        worker: str | Path,
        python: str,
        options: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
        seconds: float | None = None,
    ) -> None:
        script = worker if isinstance(worker, Path) else WORKERS / f"run_{worker}.py"
        self.name = script.stem.removeprefix("run_")
        self._python = python
        command = [python, str(script), json.dumps(options)]
        path = [str(WORKERS)]
        if python == sys.executable:
            # Another environment must find its own packages, never those beside this one.
            path += [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115 (closed with the process)
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._said,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **(env or {})},
                # A group of its own, so that what the engine has begun can be ended with it.
                start_new_session=True,
            )
        except OSError as error:
            raise PeerError(
                f"{self.name}: {python!r} cannot be run as a Python interpreter: {error}"
            ) from None
        try:
            about = self._hear(seconds).get("about")
            if not isinstance(about, dict):
                raise PeerError(f"{self.name}: its process did not say what it runs")
        except BaseException:
            self.kill()
            raise
        self.about: dict[str, Any] = about

    @property
    def usage(self) -> Usage:
        """What it takes together with what it has begun."""
        return Usage(self._process.pid)

    def ask(self, within: float | None = None, /, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Args:
            within: seconds after which the process is ended, as one that hangs; without it there is no limit.
            request: what the worker's method is given; ``do`` names it.

        Raises:
            PeerError: the engine failed under it, or its process ended, or gave no answer in time.
        """
        assert self._process.stdin is not None
        # An engine that died leaves a broken pipe, and what it said is worth more.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._hear(within)

    def _hear(self, seconds: float | None = None) -> dict[str, Any]:
        assert self._process.stdout is not None
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._end_all()

        timer = threading.Timer(seconds, give_up) if seconds is not None else None
        if timer:
            timer.daemon = True
            timer.start()
        try:
            line = self._process.stdout.readline()
        finally:
            if timer:
                timer.cancel()
        if late.is_set():
            raise PeerError(f"{self.name}: it gave no answer within {seconds:g} s")
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            words = [said.strip() for said in self._said if said.strip()]
            last = (words or ["it said nothing"])[-1]
            raise PeerError(f"{self.name}: its process ({self._python}) ended with status {status}: {last}")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise PeerError(f"{self.name}: its process wrote what is no answer: {shorten(line.strip())}")
        if "error" in reply:
            raise PeerError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process, with what it has begun."""
        assert self._process.stdin is not None
        # Held still, it would not see that its input ends.
        self.usage.resume()
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=20)
        self.kill()

    def kill(self) -> None:
        """End the process at once, with what it has begun."""
        self._end_all()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._said):
            if file is not None:
                # Standard input may hold what the process did not read any more.
                with contextlib.suppress(OSError):
                    file.close()

    def _end_all(self) -> None:
        begun: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            begun = psutil.Process(self._process.pid).children(recursive=True)
        if hasattr(os, "killpg"):
            # What outlived its parent is in the group still.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
        if self._process.returncode is None:
            self._process.kill()
        for process in begun:
            with contextlib.suppress(psutil.Error):
                process.kill()
