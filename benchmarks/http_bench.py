"""What the HTTP floor costs: streams over HTTP against the same streams in process.

    python benchmarks/http_bench.py [--model FOLDER_OR_GGUF | --tiny] [--rounds 5] [--new 64] [--json FILE]

Both sides have the same engine settings, prompts and token counts, and take turns over rounds; figures are
medians, ratios and differences those of neighbours in time. Over HTTP a `mini-sglang serve` process on the
loopback answers `POST /generate` with `"stream": true`; in process `mini_sglang.Engine` does. No prompt of
the throughput rounds comes twice, so nothing of it is cached; the first-token rounds ask for one cached
prompt again and again, over a connection that is kept. Client, server and engine share the machine's cores:
the client only gathers bytes while the clock runs, and counts the ids afterwards.

Exit status 1 where an answer has not its number of tokens, the throughput ratio is under ``--least-ratio``,
or the first byte comes later than the first token in process by ``--most-ms`` or more.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mini_sglang import Engine, SamplingParams  # noqa: E402
from mini_sglang.backend.loading.source import resolve_model  # noqa: E402
from mini_sglang.bench.server_process import ServerProcess, free_port  # noqa: E402
from mini_sglang.config import Settings  # noqa: E402

TOPICS = "rivers bridges clocks bees glass salt maps tides bread stars trains books wool snow gold songs"
TEXT = (
    "Explain to a curious beginner how {topic} came to matter to people, what was hard about it at first, "
    "and what a careful observer would look for today. Use plain words."
)
CACHED = "You are a patient teacher who answers in plain words, with one small example for each idea. " * 4
START_SECONDS = 120.0
# OpenMP's threads spin for some milliseconds after a step: the other side must not pay for that.
PAUSE_SECONDS = 0.05


def start_server(settings: dict[str, Any]) -> ServerProcess:
    """``mini-sglang serve`` in a process of its own, with its engine in another by default."""
    port = free_port()
    variables = {name.upper(): str(value) for name, value in settings.items()}
    environment = {"LOG_LEVEL": "warning", **variables, "PORT": str(port)}
    command = [sys.executable, "-m", "mini_sglang", "serve"]
    return ServerProcess("mini-sglang", command, port, environment, ready="/ready", seconds=START_SECONDS)


def cpu_seconds(server: ServerProcess) -> tuple[float, float]:
    """CPU time so far of the server's process, and of its engine's."""
    process = psutil.Process(server.tree.pid)
    own = process.cpu_times()
    children = [child.cpu_times() for child in process.children(recursive=True)]
    return own.user + own.system, sum(times.user + times.system for times in children)


class Reader(asyncio.Protocol):
    """Sends one request and gathers what comes until the server closes: nothing else while the clock runs."""

    def __init__(self, data: bytes) -> None:
        self._request = data
        self.data = bytearray()
        self.reads = 0
        self.first = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self.first = self.first or time.perf_counter()
        self.reads += 1
        self.data += data

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_result(None)


def request(body: Any, *, keep: bool = False) -> bytes:
    data = json.dumps(body).encode()
    head = [
        "POST /generate HTTP/1.1",
        "Host: 127.0.0.1",
        f"Connection: {'keep-alive' if keep else 'close'}",
        "Content-Type: application/json",
        f"Content-Length: {len(data)}",
    ]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + data


class Connection:
    """A plain socket that is kept between requests, as clients keep theirs."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=60)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def ask(self, data: bytes) -> tuple[bytes, float]:
        """A whole chunked response, and the seconds to the first byte of its body."""
        start = time.perf_counter()
        first = 0.0
        self._socket.sendall(data)
        found = b""
        while not found.endswith(b"\r\n0\r\n\r\n"):
            part = self._socket.recv(1 << 16)
            if not part:
                raise SystemExit(f"the server broke off: {found[:500].decode(errors='replace')}")
            found += part
            if not first and found.partition(b"\r\n\r\n")[2]:
                first = time.perf_counter() - start
        return found, first

    def close(self) -> None:
        self._socket.close()


def events_of(response: bytes) -> list[dict[str, Any]]:
    """The JSON lines of a chunked response."""
    head, _, rest = response.partition(b"\r\n\r\n")
    if b" 200 " not in head[:16]:
        raise SystemExit(f"the server refused: {response[:500].decode(errors='replace')}")
    body = b""
    while True:
        size, _, rest = rest.partition(b"\r\n")
        length = int(size, 16)
        if length == 0:
            return [json.loads(line) for line in body.splitlines()]
        body += rest[:length]
        rest = rest[length + 2 :]


def ids_of(response: bytes) -> list[int]:
    """The token ids of a whole answer; none where it has no ``done`` line."""
    events = events_of(response)
    if events[-1].get("event") != "done":
        return []
    return [token for event in events for token in event.get("token_ids", ())]


def prompts_of(round_: int, count: int) -> list[str]:
    topics = TOPICS.split()
    return [f"Letter {round_}-{i}: " + TEXT.format(topic=topics[i % len(topics)]) for i in range(count)]


def over_http(port: int, prompts: list[str], new: int) -> tuple[list[list[int]], float, int]:
    """Answers, seconds, and in how many reads they came."""
    bodies = [
        {
            "prompt": prompt,
            "stream": True,
            "return_token_ids": True,
            "max_new_tokens": new,
            "temperature": 0,
            "ignore_eos": True,
        }
        for prompt in prompts
    ]
    data = [request(body) for body in bodies]

    async def run() -> tuple[list[Reader], float]:
        loop = asyncio.get_running_loop()
        start = time.perf_counter()
        readers = [
            (await loop.create_connection(lambda one=one: Reader(one), "127.0.0.1", port))[1]  # type: ignore[misc]
            for one in data
        ]
        await asyncio.gather(*(reader.done for reader in readers))
        return readers, time.perf_counter() - start

    readers, seconds = asyncio.run(run())
    return [ids_of(bytes(reader.data)) for reader in readers], seconds, sum(r.reads for r in readers)


def in_process(engine: Engine, prompts: list[str], new: int) -> tuple[list[list[int]], float]:
    params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
    start = time.perf_counter()
    outputs = engine.generate(prompts, params)
    seconds = time.perf_counter() - start
    return [list(output.token_ids) for output in outputs], seconds


def bench_throughput(
    engine: Engine, server: ServerProcess, rounds: int, streams: int, new: int
) -> tuple[dict[str, Any], bool]:
    times: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    total, good, same, reads = streams * new, True, 0, 0
    cpu = (0.0, 0.0)
    for index in range(rounds + 1):
        prompts = prompts_of(index, streams)
        answers: dict[str, list[list[int]]] = {}
        for name in list(times) if index % 2 else list(reversed(times)):
            time.sleep(PAUSE_SECONDS)
            if name == "in process":
                answers[name], seconds = in_process(engine, prompts, new)
            else:
                before = cpu_seconds(server)
                answers[name], seconds, count = over_http(server.port, prompts, new)
                after = cpu_seconds(server)
                if index:
                    reads += count
                    cpu = cpu[0] + after[0] - before[0], cpu[1] + after[1] - before[1]
            good = good and all(len(ids) == new for ids in answers[name])
            if index:  # the first round is a warm-up
                times[name].append(seconds)
        same += sum(a == b for a, b in zip(*answers.values(), strict=True)) if index else 0
    print(f"\n{streams} streams, {new} new tokens each, {rounds} rounds")
    for name, seconds_ in times.items():
        print(f"  {name:12} {total / statistics.median(seconds_):9.1f} tokens/s")
    ratio = statistics.median(times["in process"]) / statistics.median(times["over HTTP"])
    paired = statistics.median(
        mine / theirs for mine, theirs in zip(times["in process"], times["over HTTP"], strict=True)
    )
    per_token = [1e6 * seconds_ / (rounds * total) for seconds_ in cpu]
    print(f"  median of the rounds' ratios {paired:.3f}, ratio of medians {ratio:.3f}")
    print(f"  CPU per token: server {per_token[0]:.0f} µs, engine's process {per_token[1]:.0f} µs")
    print(f"  {rounds * total / max(1, reads):.2f} tokens a read; {same} of {rounds * streams} answers equal")
    if not good:
        print("  WRONG: an answer has not its number of tokens")
    figures = {
        "streams": streams, "new": new, "seconds": times, "ratio": paired, "ratio_of_medians": ratio,
        "server_cpu_us": per_token[0], "engine_cpu_us": per_token[1], "complete": good,
    }  # fmt: skip
    return figures, good


def bench_first_token(engine: Engine, server: ServerProcess, asks: int) -> dict[str, Any]:
    prompt = CACHED + "What is a prefix cache?"
    params = SamplingParams(max_new_tokens=1, temperature=0)
    body = {"prompt": prompt, "stream": True, "max_new_tokens": 1, "temperature": 0}
    data = request(body, keep=True)
    connection = Connection(server.port)
    times: dict[str, list[float]] = {"in process": [], "over HTTP": []}
    cached: dict[str, int] = {}
    for index in range(asks + 1):
        for name in list(times) if index % 2 else list(reversed(times)):
            time.sleep(PAUSE_SECONDS)
            if name == "in process":
                start = time.perf_counter()
                deltas = iter(engine.stream(prompt, params))
                last = next(deltas)
                seconds = time.perf_counter() - start
                assert last.usage is not None
                cached[name] = last.usage.cached_tokens
            else:
                response, seconds = connection.ask(data)
                cached[name] = int(events_of(response)[-1]["cached_tokens"])
            if index:  # the first one fills the caches
                times[name].append(seconds)
    connection.close()
    middle = {name: statistics.median(seconds_) for name, seconds_ in times.items()}
    above = statistics.median(
        theirs - mine for mine, theirs in zip(times["in process"], times["over HTTP"], strict=True)
    )
    print(f"\nfirst token of a cache hit, {asks} times, cached tokens {cached}")
    for name, seconds in middle.items():
        print(f"  {name:12} {seconds * 1e3:8.2f} ms   (fastest {min(times[name]) * 1e3:.2f})")
    apart = middle["over HTTP"] - middle["in process"]
    print(f"  over HTTP {above * 1e3:.2f} ms later (median of pairs; {apart * 1e3:.2f} between the medians)")
    return {"seconds": times, "cached": cached, "above_ms": above * 1e3}


@contextmanager
def model_path(args: argparse.Namespace) -> Iterator[str]:
    if args.tiny:
        from tests.tiny_folders import tiny_folder

        with tempfile.TemporaryDirectory() as folder:
            yield str(tiny_folder(Path(folder) / "tiny", max_position_embeddings=4096))
    else:
        settings = Settings.resolve({"model": args.model})
        yield str(resolve_model(settings, notify=lambda line: print(line, file=sys.stderr)).path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a local folder or .gguf file; by default what the engine would take")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model, where overhead shows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--asks", type=int, default=30, help="first tokens to take the median of")
    parser.add_argument("--threads", type=int, default=0, help="of the model, on both sides; 0 is every core")
    parser.add_argument("--isolation", choices=("process", "thread"), default="process")
    parser.add_argument("--least-ratio", type=float, default=0.90)
    parser.add_argument("--most-ms", type=float, default=3.0)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    with model_path(args) as path:
        settings = {"num_threads": args.threads, "kv_token_budget": 1 << 15, "prefix_cache": 1}
        server = start_server({**settings, "model_local_dir": path, "engine_isolation": args.isolation})
        try:
            with Engine(path, **settings) as engine:
                print(" ".join(f"{name}={value}" for name, value in engine.description.items()))
                print(f"isolation={args.isolation} cpus={len(os.sched_getaffinity(0))}")
                first = bench_first_token(engine, server, args.asks)
                rounds = bench_throughput(engine, server, args.rounds, args.streams, args.new)
                throughput, complete = rounds
                described = {name: str(value) for name, value in engine.description.items()}
        finally:
            server.close()
    fast = throughput["ratio"] >= args.least_ratio
    prompt = first["above_ms"] < args.most_ms
    print(
        f"\nthroughput {throughput['ratio']:.3f} (at least {args.least_ratio:g}): {'yes' if fast else 'NO'}; "
        f"first byte {first['above_ms']:.2f} ms above (under {args.most_ms:g}): {'yes' if prompt else 'NO'}"
    )
    if args.json:
        report = {
            "argv": sys.argv[1:], "cpus": len(os.sched_getaffinity(0)), "engine": described,
            "first_token": first, "throughput": throughput,
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1))
    return 0 if complete and fast and prompt else 1


if __name__ == "__main__":
    raise SystemExit(main())
