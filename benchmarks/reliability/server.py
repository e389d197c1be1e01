"""A real ``mini-sglang serve`` in a process of its own, over a tiny random model, and what is seen of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 120.0
ENGINE, HELPER = "mini_sglang.engine.process_main", "mini_sglang.backend.grammar_check"
# A guard against a hang and no measure of anything.
LIMIT_SECONDS = 120.0

DEFAULTS = {
    "engine_isolation": "process",
    "num_threads": 1,
    "kv_token_budget": 1 << 15,
    "dtype": "fp32",
    "log_level": "warning",
}


class HangError(AssertionError):
    """Something that was waited for did not come."""


def settle(
    condition: Callable[[], bool], what: str, limit: float = LIMIT_SECONDS, every: float = 0.02
) -> float:
    """Wait for ``condition``; the seconds it took.

    Raises:
        HangError: it did not come within ``limit`` seconds.
    """
    started = time.monotonic()
    while not condition():
        if time.monotonic() - started > limit:
            raise HangError(f"waited {limit:g} s for {what}")
        time.sleep(every)
    return time.monotonic() - started


@dataclass(frozen=True, slots=True)
class Held:
    """What one process holds of the system. ``sockets`` are connections to the server's port."""

    fds: int
    threads: int
    rss: int
    sockets: int

    @classmethod
    def of(cls, process: psutil.Process, port: int) -> Held:
        sockets = sum(
            1
            for one in process.net_connections("tcp")
            if one.laddr and one.laddr.port == port and one.status != psutil.CONN_LISTEN
        )
        with process.oneshot():
            return cls(process.num_fds(), process.num_threads(), process.memory_info().rss, sockets)


class Server:
    """A server that was started; ``wait_ready`` before it is asked anything.

    Args:
        model: a model's folder.
        log: where its output goes.
        settings: by field name or lower-case variable, over ``DEFAULTS``.
        probe: run it with ``benchmarks.reliability.inside``, so that ``inside`` can ask for its tasks.
        module: run in place of ``mini_sglang``; it takes the same arguments.

    Attributes:
        port: on 127.0.0.1.
        settings: what it was started with.
        process: the ``Popen``; its ``pid`` is the HTTP process.
    """

    def __init__(
        self, model: Path, log: Path, *, probe: bool = False, module: str = "mini_sglang", **settings: Any
    ) -> None:
        from mini_sglang.config import setting_fields

        self.port = free_port()
        self.log = log
        self.settings: dict[str, Any] = {**DEFAULTS, **settings}
        self._probe = log.with_suffix(".inside.json") if probe else None
        variables = {spec.name: spec.metadata["env"][0] for spec in setting_fields()}
        known = {name for spec in setting_fields() for name in spec.metadata["env"]}
        environment = {name: value for name, value in os.environ.items() if name not in known}
        values = {"model_local_dir": model, "port": self.port, **self.settings}
        for name, value in values.items():
            environment[variables.get(name, name.upper())] = str(
                int(value) if value in (True, False) else value
            )
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), environment.get("PYTHONPATH", "")])
        words = ["-m", module, "serve"]
        if self._probe is not None:
            words = ["-m", "benchmarks.reliability.inside", str(self._probe), "serve"]
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *words],
                env=environment,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    # Life and death.

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def said(self) -> str:
        """Its output so far."""
        return self.log.read_text(errors="replace")

    def wait_ready(self) -> Server:
        """Wait until it serves, with all its engines.

        Raises:
            HangError: it ended, or is not ready in time; with what it said.
        """
        try:
            settle(lambda: self.process.poll() is not None or self._serves(), "it", START_SECONDS, 0.1)
        except HangError:
            raise HangError(f"the server was not ready:\n{self.said}") from None
        if self.process.poll() is not None:
            raise HangError(f"the server ended with {self.process.returncode}:\n{self.said}")
        return self

    def children(self) -> list[psutil.Process]:
        """Its engines' processes, and whatever else it has started."""
        return psutil.Process(self.pid).children(recursive=True)

    def end(self, number: int = signal.SIGTERM, limit: float = LIMIT_SECONDS) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(limit)

    def close(self) -> None:
        """End it if it still runs, and its children if they outlive it."""
        if self.process.poll() is None:
            children = self.children()
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(20)
            for child in psutil.wait_procs(children, timeout=5)[1]:
                child.kill()

    # What it says.

    def status(self, path: str) -> int:
        """The status of a GET, 0 where nobody answers."""
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            error.close()
            return error.code
        except OSError:
            return 0

    def metrics(self) -> dict[str, Any]:
        """``/metrics`` as JSON."""
        url = f"http://127.0.0.1:{self.port}/metrics?format=json"
        with urllib.request.urlopen(url, timeout=LIMIT_SECONDS) as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _serves(self) -> bool:
        """Whether every engine is there; ``/ready`` asks for one only."""
        if self.status("/ready") != 200:
            return False
        engines = self.metrics()["engines"]
        # An engine's counters come a moment after it is ready.
        return all(one["state"] == "ready" and "kv_tokens_total" in one for one in engines)

    def busy(self) -> int:
        """Requests that it has: in the pool or reserved there, or in the engines' batches and queues.

        The greater of the two counts, since an engine tells of its own a moment later.
        """
        found = self.metrics()
        inside = sum(one.get("running", 0) + one.get("waiting", 0) for one in found["engines"])
        return max(int(found["reserved"] + found["queued"] + found["inflight"]), int(inside))

    def wait_idle(self, limit: float = LIMIT_SECONDS, left: int = 0) -> float:
        """Wait until it has no more than ``left`` requests; the seconds it took."""
        return settle(lambda: self.busy() <= left, "an idle server", limit)

    def leaks(self) -> dict[str, int]:
        """What an idle server must have none of, where it is not 0: requests, places, pages."""
        found = self.metrics()
        left = {name: found[name] for name in ("reserved", "queued", "inflight")}
        for one in found["engines"]:
            index = one["engine"]
            left |= {f"engine {index} {name}": one.get(name, 0) for name in ("running", "waiting")}
            left[f"engine {index} places"] = one["inflight"]
            left[f"engine {index} private tokens"] = one.get("kv_tokens_private", 0)
            known = (one.get(f"kv_tokens_{kind}", 0) for kind in ("free", "cached", "private"))
            left[f"engine {index} lost tokens"] = one.get("kv_tokens_total", 0) - sum(known)
        return {name: value for name, value in left.items() if value}

    # What the system says.

    def cpu_seconds(self) -> float:
        """What the HTTP process has used of a core so far."""
        times = psutil.Process(self.pid).cpu_times()
        return float(times.user + times.system)

    def engines(self) -> list[psutil.Process]:
        """The engines' processes, the oldest first."""
        return sorted(self._children(ENGINE), key=lambda one: (one.create_time(), one.pid))

    def rss(self) -> int:
        """Bytes in memory of the HTTP process; quick, so that a client that measures may ask."""
        return int(psutil.Process(self.pid).memory_info().rss)

    def held(self) -> list[Held]:
        """What the HTTP process holds, then each engine's.

        The helpers that try grammars come and go with the time those take, so the two pipes to each are not
        counted.
        """
        helpers = len(self._children(HELPER))
        own, *engines = (Held.of(one, self.port) for one in (psutil.Process(self.pid), *self.engines()))
        return [replace(own, fds=own.fds - 2 * helpers), *engines]

    def _children(self, module: str) -> list[psutil.Process]:
        found = []
        for one in self.children():
            with contextlib.suppress(psutil.NoSuchProcess):
                if module in one.cmdline():
                    found.append(one)
        return found

    def inside(self, limit: float = LIMIT_SECONDS) -> dict[str, int]:
        """What the probe counts in the HTTP process: tasks, streams, open connections."""
        assert self._probe is not None, "the server was started without its probe"
        self._probe.unlink(missing_ok=True)
        self.process.send_signal(signal.SIGUSR2)
        settle(self._probe.exists, "the probe's answer", limit)
        found: dict[str, int] = json.loads(self._probe.read_text())
        return found


@contextmanager
def tiny_folder(context: int = 8192, **overrides: Any) -> Iterator[Path]:
    """A random llama with a byte-level tokenizer (ids 3 to 258 are bytes), gone afterwards."""
    from transformers.utils import logging

    from tests.tiny_folders import tiny_folder as make

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    with tempfile.TemporaryDirectory(prefix="mini-sglang-reliability-") as folder:
        yield make(Path(folder) / "tiny", max_position_embeddings=context, **overrides)


@contextmanager
def serving(model: Path | None = None, *, probe: bool = False, **settings: Any) -> Iterator[Server]:
    """A server that is ready, over ``model`` or a tiny one; ended afterwards."""
    with tempfile.TemporaryDirectory(prefix="mini-sglang-reliability-") as folder:
        if model is None:
            with tiny_folder() as tiny, serving(tiny, probe=probe, **settings) as server:
                yield server
            return
        server = Server(model, Path(folder) / "server.log", probe=probe, **settings)
        try:
            yield server.wait_ready()
        finally:
            server.close()


def held_json(held: list[Held]) -> list[dict[str, int]]:
    return [asdict(one) for one in held]


def free_port() -> int:
    """A port of 127.0.0.1 that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
