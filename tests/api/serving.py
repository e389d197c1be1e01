"""Servers over a tiny model: in this process for most tests, in one of their own for the life of a server."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from mini_sglang.api.server import Door
from mini_sglang.api.service import Service
from mini_sglang.config import Settings

ROOT = Path(__file__).parents[2]
LIMIT_S = 60.0
# Small enough to run out, large enough for an answer that a test can interrupt.
CONTEXT = 4096
KV_TOKENS = 16384


class Client(TestClient):
    """A client of an in-process server; ``service`` is what the server runs on."""

    service: Service

    def ask(self, path: str = "/generate", **body: Any) -> Any:
        """POST and expect 200; the JSON that came."""
        response = self.post(path, json=body)
        assert response.status_code == 200, response.text
        return response.json()

    def lines(self, **body: Any) -> list[dict[str, Any]]:
        """A streamed answer's lines."""
        response = self.post("/generate", json={"stream": True, **body})
        assert response.status_code == 200, response.text
        return [json.loads(line) for line in response.text.splitlines()]


def settings_for(model: Path, **overrides: object) -> Settings:
    plain = {"model": str(model), "engine_isolation": "thread", "kv_token_budget": KV_TOKENS}
    return Settings.resolve({**plain, **overrides}, {"NUM_THREADS": "1"})


@contextmanager
def serving(model: Path, **overrides: object) -> Iterator[Client]:
    """An in-process server and its client."""
    services: list[Service] = []
    door = Door(settings_for(model, **overrides), started=services.append)
    with Client(door) as client:
        client.service = services[0]
        yield client


def settle(condition: Callable[[], bool], what: str, limit: float = LIMIT_S) -> None:
    deadline = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


class Server:
    """``mini-sglang serve``, or another command, in a process of its own."""

    def __init__(self, model: Path, log: Path, *command: str, **variables: str) -> None:
        self.port = free_port()
        env = {name: value for name, value in os.environ.items() if name != "LOG_LEVEL"} | {
            "PYTHONPATH": str(ROOT),
            "MODEL_NAME": str(model),
            "ENGINE_ISOLATION": "thread",
            "KV_TOKEN_BUDGET": str(KV_TOKENS),
            "NUM_THREADS": "1",
            "PORT": str(self.port),
            **variables,
        }
        words = command or ("-m", "mini_sglang", "serve")
        self._log = log
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, *(word.format(port=self.port) for word in words)],
                env=env,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
            )

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_ready(self) -> Server:
        settle(lambda: self.process.poll() is not None or self.status("/ready") == 200, "the server")
        assert self.process.poll() is None, self.said
        return self

    def status(self, path: str) -> int:
        """The status of a GET, 0 where nobody answers."""
        try:
            return self.request("GET", path)[0]
        except OSError:
            return 0

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, dict[str, str], bytes]:
        with self.open(method, path, body, headers) as reading:
            return read_response(reading)

    @contextmanager
    def open(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        receive_buffer: int = 0,
    ) -> Iterator[socket.socket]:
        """A connection on which a request was sent."""
        data = b"" if body is None else json.dumps(body).encode()
        lines = {"Host": f"127.0.0.1:{self.port}", "Connection": "close", **(headers or {})}
        if body is not None:
            lines |= {"Content-Type": "application/json", "Content-Length": str(len(data))}
        head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
        with socket.socket() as connection:
            if receive_buffer:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            connection.settimeout(LIMIT_S)
            connection.connect(("127.0.0.1", self.port))
            connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data)
            yield connection

    def metrics(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.request("GET", "/metrics?format=json")[2])
        return found

    def running(self) -> int:
        metrics = self.metrics()
        engine = metrics["engines"][0]
        return int(metrics["inflight"] + metrics["queued"] + engine["running"] + engine["waiting"])

    def end(self, number: int = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit status."""
        self.process.send_signal(number)
        return self.process.wait(LIMIT_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait(LIMIT_S)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def read_response(connection: socket.socket) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of a response that ends with its connection."""
    data = b""
    while part := connection.recv(65536):
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    first, *rest = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in rest)}
    if headers.get("transfer-encoding") == "chunked":
        body = unchunk(body)
    return int(first.split()[1]), headers, body


def unchunk(data: bytes) -> bytes:
    """The chunks' contents; raises where the last chunk, which ends the response, is not there."""
    out = b""
    while True:
        size, found, data = data.partition(b"\r\n")
        if not found:
            raise EOFError("the response broke off")
        length = int(size, 16)
        if length == 0:
            return out
        out += data[:length]
        data = data[length + 2 :]
