"""This end of a worker: starts an engine's process and asks it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_sglang.errors import MiniSglangError

WORKERS = Path(__file__).parent / "workers"
ROOT = Path(__file__).parents[2]


class PeerError(MiniSglangError):
    """A peer that cannot be started or that failed, in one sentence."""


class Process:
    """An engine in a process of its own; it waits in a read while it is not asked.

    Args:
        worker: ``openvino`` for ``workers/run_openvino.py``, or the path of a script.
        python: the interpreter that runs it.
        options: what the worker's engine is made with.
        env: variables beside those of this process.

    Raises:
        PeerError: the interpreter is missing, or the engine did not load.
    """

    def __init__(
        self,
        worker: str | Path,
        python: str,
        options: Mapping[str, Any],
        env: Mapping[str, str] | None = None,
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
            )
        except OSError as error:
            raise PeerError(
                f"{self.name}: {python!r} cannot be run as a Python interpreter: {error}"
            ) from None
        self.about: dict[str, Any] = self._hear()["about"]

    def ask(self, **request: Any) -> dict[str, Any]:
        """The answer to one request.

        Raises:
            PeerError: the engine failed under it, or its process ended.
        """
        assert self._process.stdin is not None
        # An engine that died leaves a broken pipe, and what it said is worth more.
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
        return self._hear()

    def _hear(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._said.seek(0)
            words = [said.strip() for said in self._said if said.strip()]
            last = (words or ["it said nothing"])[-1]
            raise PeerError(f"{self.name}: its process ({self._python}) ended with status {status}: {last}")
        reply: dict[str, Any] = json.loads(line)
        if "error" in reply:
            raise PeerError(f"{self.name}: {reply['error']}")
        return reply

    def close(self) -> None:
        """End the process, with what it has begun."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._said.close()
