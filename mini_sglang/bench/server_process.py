"""A server of ours or of a peer, started on the loopback for as long as it is measured."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence

import psutil

from mini_sglang.bench.process import ROOT, PeerError
from mini_sglang.bench.usage import Usage

POLL_SECONDS = 0.1
END_SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class ServerProcess:
    """A server that takes requests once this is made; ``close`` ends it with all that it began.

    Args:
        name: in errors.
        command: its argument list.
        port: where it listens on 127.0.0.1.
        env: variables beside those of this process.
        ready: the path that answers 200 once requests are taken.
        seconds: how long the start may take.

    Raises:
        PeerError: it cannot be run, ends before it is ready, or is not ready in time.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        port: int,
        env: Mapping[str, str] | None = None,
        ready: str = "/health",
        seconds: float = 300.0,
    ) -> None:
        self.name = name
        self.url = f"http://127.0.0.1:{port}"
        environment = {**os.environ, **(env or {})}
        if command[0] == sys.executable:
            path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        else:
            # Another environment must find its own packages, never those beside this one.
            path = [*filter(None, [(env or {}).get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the process)
        begun = time.monotonic()
        try:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=self._said,
                env=environment,
                # Ctrl-C is for the benchmark, which ends its servers itself.
                start_new_session=True,
            )
        except OSError as error:
            self._said.close()
            raise PeerError(f"{name}: {command[0]!r} cannot be run: {error}") from None
        try:
            self._await(ready, begun + seconds, seconds)
        except BaseException:
            self.close()
            raise
        self.start_seconds = time.monotonic() - begun

    @property
    def usage(self) -> Usage:
        """What it takes together with what it has begun."""
        return Usage(self._process.pid)

    def _await(self, ready: str, deadline: float, seconds: float) -> None:
        while not self._answers(ready):
            status = self._process.poll()
            if status is not None:
                raise PeerError(f"{self.name}: its server ended with status {status}: {self.last_words()}")
            if time.monotonic() > deadline:
                raise PeerError(
                    f"{self.name}: its server was not ready within {seconds:g} s: {self.last_words()}"
                )
            time.sleep(POLL_SECONDS)

    def _answers(self, path: str) -> bool:
        # Never through a proxy of the environment: it is on this machine.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self.url + path, timeout=5) as reply:
                return bool(reply.status == 200)
        except (OSError, urllib.error.URLError, ValueError):
            return False

    def last_words(self) -> str:
        """The last line that it wrote."""
        self._said.seek(max(0, self._said.seek(0, os.SEEK_END) - 8192))
        lines = [line for line in self._said.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1].strip()[:500] if lines else "it said nothing"

    def close(self) -> None:
        """End it, first by asking, and whatever it has begun."""
        begun: list[psutil.Process] = []
        with contextlib.suppress(psutil.Error):
            begun = psutil.Process(self._process.pid).children(recursive=True)
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(END_SECONDS)
        for process in begun:
            # By object: psutil knows a number that the system gave to another process since.
            with contextlib.suppress(psutil.Error):
                process.kill()
        self._process.kill()
        self._process.wait()
        self._said.close()


def start_ours(options: Sequence[str] = ()) -> ServerProcess:
    """``mini-sglang serve`` with these options, on a free port.

    Raises:
        PeerError: it does not start.
    """
    port = free_port()
    command = [sys.executable, "-m", "mini_sglang", "serve", "--host", "127.0.0.1", "--port", str(port)]
    return ServerProcess("mini-sglang", [*command, *options], port, ready="/ready", seconds=900.0)
