"""Clients that leave or do not read, signals, what a server leaves behind: real sockets, real processes."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from mini_sglang.backend.device import choose_dtype
from tests.api.serving import LIMIT_S, Server, read_response, settle

LONG: dict[str, Any] = {"prompt": "long", "max_new_tokens": 3800, "ignore_eos": True, "stream": True}
SHORT: dict[str, Any] = {"prompt": "short", "max_new_tokens": 300, "ignore_eos": True, "stream": True}
LEDGER: dict[str, Any] = {"ignore_eos": True, "return_token_ids": True}
UVICORN = ("-m", "uvicorn", "api.server:app", "--port", "{port}")


@pytest.fixture(scope="module")
def shared(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server for tests that leave it as it was."""
    log = tmp_path_factory.mktemp("log") / "log"
    server = Server(
        tiny_model, log, WRITE_TIMEOUT="1", READ_TIMEOUT="1", MAX_BATCH_SIZE="2", MAX_INFLIGHT_PER_ENGINE="2"
    )
    yield server.wait_ready()
    server.close()
    assert "Traceback" not in server.said


@pytest.fixture
def own(tiny_model: Path, tmp_path: Path) -> Iterator[Any]:
    """Makes servers that a test may end."""
    made: list[Server] = []

    def make(*command: str, **variables: str) -> Server:
        made.append(Server(tiny_model, tmp_path / f"log{len(made)}", *command, **variables))
        return made[-1]

    yield make
    for server in made:
        server.close()


def tokens_done(server: Server) -> int:
    return int(server.metrics()["engines"][0]["decode_tokens"])


def lines_of(body: bytes) -> list[dict[str, Any]]:
    return [json.loads(line) for line in body.splitlines()]


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_request_at_once(shared: Server, stream: bool) -> None:
    free = shared.metrics()["engines"][0]["kv_tokens_private"]
    with shared.open("POST", "/generate", LONG | {"stream": stream}):
        settle(lambda: shared.running() > 0, "the request to run")
    left = tokens_done(shared)
    settle(lambda: shared.running() == 0, "an idle engine", 2)
    assert tokens_done(shared) - left < 500
    assert shared.metrics()["engines"][0]["kv_tokens_private"] == free


def test_clients_that_leave_while_they_wait_in_the_queue(shared: Server) -> None:
    with shared.open("POST", "/generate", LONG), shared.open("POST", "/generate", LONG):
        settle(lambda: shared.metrics()["inflight"] == 2, "two requests to run")
        for _ in range(5):
            with shared.open("POST", "/generate", SHORT):
                settle(lambda: shared.metrics()["queued"] == 1, "one to wait")
            settle(lambda: shared.metrics()["queued"] == 0, "none to wait", 2)
    settle(lambda: shared.running() == 0, "an idle engine", 2)


def test_leaving_at_any_moment_leaks_nothing(shared: Server) -> None:
    process = psutil.Process(shared.process.pid)
    settle(lambda: len(process.children()) == 2, "the grammars' helpers, each with its pipes")
    settle(lambda: shared.running() == 0, "an idle engine")
    before = process.num_fds()
    for number in range(40):
        body = SHORT | {"stream": number % 2 == 0, "max_new_tokens": 30}
        with shared.open("POST", "/generate", body):
            time.sleep(number * 0.001)
    settle(lambda: shared.running() == 0, "an idle engine", 5)
    settle(lambda: process.num_fds() <= before + 1, "closed sockets", 5)
    metrics = shared.metrics()
    assert metrics["reserved"] == 0 and metrics["engines"][0]["kv_tokens_private"] == 0


def test_a_reader_that_stops_is_given_up_and_others_go_on(shared: Server) -> None:
    """More than the sockets hold, to one who reads nothing."""
    body = LONG | {"prompt": ["a"] * 128, "logprobs": True, "top_logprobs": 20, "max_new_tokens": 100}
    process = psutil.Process(shared.process.pid)
    with shared.open("POST", "/generate", body, receive_buffer=4096) as connection:
        settle(lambda: shared.running() > 0, "the request to run")
        status, _, other = shared.request("POST", "/generate", SHORT | {"max_new_tokens": 5})
        assert status == 200 and lines_of(other)[-1]["event"] == "done"
        settle(lambda: shared.running() == 0, "the reader to be given up", 30)
        settle(
            lambda: all(
                c.raddr.port != connection.getsockname()[1] for c in process.net_connections() if c.raddr
            ),
            "its socket to be closed",
            10,
        )
        with pytest.raises((EOFError, ConnectionError)):
            read_response(connection)


def test_a_slow_upload_is_given_up(shared: Server) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=LIMIT_S) as connection:
        head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        status, headers, _ = read_response(connection)
    assert status == 408 and headers["connection"] == "close"


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: local"], ids=["nothing", "half"])
def test_a_client_that_sends_no_whole_head_is_given_up(shared: Server, sent: bytes) -> None:
    with socket.create_connection(("127.0.0.1", shared.port), timeout=LIMIT_S) as connection:
        connection.sendall(sent)
        started = time.monotonic()
        with contextlib.suppress(ConnectionError):
            assert connection.recv(100) == b""
    assert time.monotonic() - started > 0.5


def test_a_kept_connection_may_rest_between_requests_and_not_within_one(shared: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", shared.port, timeout=LIMIT_S)
    with contextlib.closing(connection):
        connection.connect()
        first = connection.sock
        for _ in range(2):
            connection.request("GET", "/health")
            response = connection.getresponse()
            assert response.status == 200 and response.read() and connection.sock is first
            time.sleep(1.3)  # longer than READ_TIMEOUT
        first.sendall(b"GET /health HTTP/1.1\r\n")
        with contextlib.suppress(ConnectionError):
            assert first.recv(100) == b""


def test_a_foreign_host_on_the_loopback_is_refused(shared: Server) -> None:
    assert shared.request("GET", "/health", headers={"Host": "evil.example"})[0] == 400


def test_sigterm_lets_what_runs_finish_and_refuses_the_rest(own: Any) -> None:
    server = own().wait_ready()
    with server.open("POST", "/generate", LONG) as running:
        settle(lambda: server.running() > 0, "the request to run")
        server.process.send_signal(signal.SIGTERM)
        settle(lambda: server.status("/ready") == 503, "the drain")
        status, headers, body = server.request("POST", "/generate", SHORT)
        assert status == 503 and int(headers["retry-after"]) >= 1 and b"ending" in body
        status, _, body = read_response(running)
    assert status == 200 and lines_of(body)[-1]["completion_tokens"] == 3800
    assert server.process.wait(10) == 0
    assert "Traceback" not in server.said


@pytest.mark.parametrize("command", [(), UVICORN], ids=["serve", "uvicorn"])
def test_what_outlives_the_drain_ends_with_an_error(own: Any, command: tuple[str, ...]) -> None:
    server = own(*command, DRAIN_TIMEOUT="0.1").wait_ready()
    with (
        server.open("POST", "/generate", LONG) as streamed,
        server.open("POST", "/generate", LONG | {"stream": False}) as whole,
        server.open("POST", "/generate", LONG, receive_buffer=4096),
    ):
        settle(lambda: server.metrics()["inflight"] == 3, "the requests to run")
        server.process.send_signal(signal.SIGTERM)
        body = read_response(streamed)[2]
        assert lines_of(body)[-1]["event"] == "error" and "ending" in lines_of(body)[-1]["message"]
        assert read_response(whole)[0] == 503
        assert server.process.wait(10) == 0
    assert "Traceback" not in server.said


def test_a_second_sigterm_ends_at_once(own: Any) -> None:
    server = own().wait_ready()
    with server.open("POST", "/generate", LONG) as running:
        settle(lambda: server.running() > 0, "the request to run")
        server.process.send_signal(signal.SIGTERM)
        settle(lambda: "draining" in server.said, "the drain")
        assert server.process.poll() is None
        assert server.end() == 0
        assert lines_of(read_response(running)[2])[-1]["event"] == "error"
    assert "Traceback" not in server.said


def test_engines_in_processes_leave_nothing_behind(own: Any, tmp_path: Path) -> None:
    server = own(ENGINE_ISOLATION="process", TMPDIR=str(tmp_path), NUM_ENGINES="2").wait_ready()
    status, _, body = server.request("POST", "/generate", SHORT | {"max_new_tokens": 5, "regex": "[ab]+"})
    assert status == 200 and lines_of(body)[-1]["completion_tokens"] == 5
    # Two engines, and the helpers that try grammars.
    children = psutil.Process(server.process.pid).children(recursive=True)
    assert sum("mini_sglang.engine.process_main" in child.cmdline() for child in children) == 2
    assert len(children) > 2
    assert server.end(signal.SIGINT) == 0
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith("log")]
    assert "Traceback" not in server.said


def test_the_banner_says_what_is_served_and_its_line_works(own: Any) -> None:
    server = own("-m", "mini_sglang", "serve", API_KEY="secret-key").wait_ready()
    said = server.said
    for part in (
        "tiny (local)",
        "cpu",
        str(choose_dtype("auto", torch.device("cpu"))).removeprefix("torch."),
        "1, each in a thread",
        "16384 KV tokens",
        f":{server.port}",
    ):
        assert part in said
    line = next(line for line in said.splitlines() if "curl" in line)
    assert "secret-key" not in said
    command = f"{line.split('try')[1].strip()} -s"
    environment = {**os.environ, "API_KEY": "secret-key"}
    done = subprocess.run(command, shell=True, env=environment, stdout=subprocess.PIPE, check=True)
    assert lines_of(done.stdout)[-1]["event"] == "done"
    assert server.end() == 0


def test_a_port_that_is_taken_is_told_before_the_model_is_loaded(own: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = own("-m", "mini_sglang", "serve", "--port", str(port), "--model", "/nowhere")
        assert server.process.wait(LIMIT_S) == 2
    assert f"port {port}" in server.said and "Traceback" not in server.said


@pytest.mark.parametrize(
    "words", [["--model", "/nowhere"], ["--host", "nowhere.invalid"], ["--max-queue", "x"]]
)
def test_a_bad_start_is_one_sentence(own: Any, words: list[str]) -> None:
    server = own("-m", "mini_sglang", "serve", *words)
    assert server.process.wait(LIMIT_S) == 2
    assert "Traceback" not in server.said and len(server.said.strip().splitlines()) <= 2


@pytest.mark.parametrize("command", [(), UVICORN], ids=["serve", "uvicorn"])
def test_a_model_that_breaks_ends_the_start_with_a_sentence(
    own: Any, tmp_path: Path, tiny_model: Path, command: tuple[str, ...]
) -> None:
    import shutil

    broken = tmp_path / "broken"
    shutil.copytree(tiny_model, broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    server = own(*command, MODEL_LOCAL_DIR=str(broken))
    assert server.process.wait(LIMIT_S) != 0
    assert "model.safetensors" in server.said and "Traceback" not in server.said


def test_a_signal_ends_a_server_that_is_still_starting(own: Any) -> None:
    server = own(ENGINE_ISOLATION="process")
    settle(lambda: bool(psutil.Process(server.process.pid).children()), "an engine to start")
    children = psutil.Process(server.process.pid).children()
    server.process.send_signal(signal.SIGTERM)
    server.process.wait(10)
    assert not any(child.is_running() and child.status() != psutil.STATUS_ZOMBIE for child in children)
    assert "Traceback" not in server.said


def test_many_streams_at_once_each_keep_their_own(shared: Server) -> None:
    """A ledger of every token of 24 streams against the same requests alone."""
    bodies = [
        {"prompt": f"ledger {n % 6}", "max_new_tokens": 20 + n, "seed": n, "temperature": 0.9} | LEDGER
        for n in range(24)
    ]
    found: dict[int, list[int]] = {}

    def ask(number: int) -> None:
        status, _, body = shared.request("POST", "/generate", bodies[number] | {"stream": True})
        assert status == 200
        *deltas, done = lines_of(body)
        ids = [token_id for delta in deltas for token_id in delta["token_ids"]]
        assert done["event"] == "done" and done["completion_tokens"] == len(ids)
        found[number] = ids

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    for number in range(0, 24, 4):
        alone = json.loads(shared.request("POST", "/generate", bodies[number])[2])
        assert found[number] == alone["token_ids"]
