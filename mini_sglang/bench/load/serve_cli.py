"""``mini-sglang bench serve``: one load on a server."""

from __future__ import annotations

import asyncio
import math
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_sglang.bench.load.generator import Generator
from mini_sglang.bench.load.options import MOST_REQUESTS, Work, add_options, checked, rate
from mini_sglang.bench.load.running import Measured, Pace, measure, stopped_by_ctrl_c, warnings
from mini_sglang.bench.load.table import as_sentence, lines
from mini_sglang.bench.machine import Limits, machine_line, measure_limits, usable_cores
from mini_sglang.bench.record import Record
from mini_sglang.bench.server_process import start_ours
from mini_sglang.bench.wire.client import Client
from mini_sglang.bench.wire.detect import Found, detect
from mini_sglang.cli.args import Parser
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError

REQUESTS = 100
INTERRUPTED = 130


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0, 1 where no request was answered, 130 after Ctrl-C.

    Raises:
        MiniSglangError: what is refused, or a server that does not start or answer.
    """
    parser = Parser(
        prog="mini-sglang bench serve",
        usage="mini-sglang bench serve [--url URL] [--request-rate R | --concurrency N] [options]",
        description="Send requests to a server as users would and measure how it does: at a rate, whether or "
        "not it keeps up (Poisson arrivals, planned in advance), or so many at a time.",
    )
    parser.add_argument("--request-rate", metavar="R", help="requests a second, or inf, all at once; 1")
    parser.add_argument("--concurrency", type=int, metavar="N", help="instead: so many requests at a time")
    parser.add_argument("--requests", type=int, metavar="N", help=f"how many in all; {REQUESTS}")
    parser.add_argument("--duration", type=float, metavar="S", help="seconds in which requests are sent")
    parser.add_argument("--warmup", type=int, default=1, metavar="N", help="requests before, not measured; 1")
    add_options(parser)
    options = parser.parse(argv)
    work, pace = checked(options), _pace(options)
    with target_of(options) as target:
        return asyncio.run(_run(options, work, pace, target))


async def _run(options: Namespace, work: Work, pace: Pace, target: Target) -> int:
    server = await find(options, target.url)
    client = client_of(options, server)
    try:
        if options.warmup:
            await warm(server, client, work, options.warmup)
        with stopper() as attach:
            measured = await measure(server, client, work, pace, on_generator=attach)
    finally:
        client.close()
    notes = warnings(server, work, measured)
    print(f"{server.url} ({server.dialect.name}): {work.dataset}, seed {work.seed}")
    for line in lines(measured.row):
        print(line)
    for note in notes + failures(measured):
        print(as_sentence(note))
    if target.limits is not None:
        print(machine_line(target.limits))
    if options.json is not None:
        settings = settings_json(options, server, work) | {"notes": notes}
        row = {**measured.row, "dialect": server.dialect.name, "dataset": work.dataset}
        runs = [request.as_json() for request in measured.load.requests]
        Record("serve", settings, [row], runs, limits=target.limits).write(options.json)
    if measured.load.interrupted:
        return INTERRUPTED
    return 0 if measured.row["completed"] else 1


def _pace(options: Namespace) -> Pace:
    """Raises: InvalidValueError."""
    count, duration, places = options.requests, options.duration, options.concurrency
    if options.request_rate is not None and places is not None:
        raise InvalidValueError("--concurrency", places, "left out where --request-rate is given")
    for name, value, high in (
        ("--requests", count, MOST_REQUESTS),
        ("--concurrency", places, 65536),
    ):
        if value is not None and not 1 <= value <= high:
            raise InvalidValueError(name, value, f"from 1 to {high}")
    if not 0 <= options.warmup <= 10_000:
        raise InvalidValueError("--warmup", options.warmup, "from 0 to 10000")
    if duration is not None and not 0 < duration <= 604_800:
        raise InvalidValueError("--duration", duration, "above 0 and at most 604800")
    if count is None and duration is None:
        count = REQUESTS
    if places is not None:
        return Pace(None, places, count, duration)
    speed = rate("--request-rate", options.request_rate or "1")
    if duration is not None and count is None and math.isinf(speed):
        raise InvalidValueError("--request-rate", "inf", "a number, or come with --requests, to end")
    return Pace(speed, None, count, duration)


@dataclass(frozen=True)
class Target:
    """Who is asked; ``limits`` are of its machine, known where that is this one."""

    url: str
    limits: Limits | None = None


@contextmanager
def target_of(options: Namespace) -> Iterator[Target]:
    """The URL given, or a server of ours that is there until the end, on a machine measured before.

    Raises:
        PeerError: it does not start, or the machine cannot be measured.
    """
    if options.url is not None:
        yield Target(options.url)
        return
    print("Measuring the machine …", file=sys.stderr)
    limits = measure_limits(Settings.resolve({}, os.environ).num_threads or usable_cores())
    print("Starting mini-sglang serve …", file=sys.stderr)
    words = []
    if options.model is not None:
        words = ["--model", options.model]
    server = start_ours(words)
    try:
        yield Target(server.url, limits)
    finally:
        server.close()


async def find(options: Namespace, url: str) -> Found:
    """Raises: WireError, where nobody answers or the dialect cannot be told."""
    found = await detect(url, options.dialect, options.api_key)
    if options.model is None or options.url is None:
        return found
    return Found(found.url, found.dialect, options.model)


def client_of(options: Namespace, server: Found) -> Client:
    return Client(
        server.url,
        api_key=options.api_key,
        keep_alive=not options.no_keep_alive,
        timeout=options.timeout,
    )


async def warm(server: Found, client: Client, work: Work, count: int) -> Measured:
    """Requests one after another, other ones than those that are measured.

    Raises:
        MiniSglangError: the first was not answered, so that there is no use going on.
    """
    pace = Pace(None, 1, count, None)
    # A seed of its own: what is measured must not be in the server's cache.
    with stopper() as attach:
        measured = await measure(
            server, client, work, pace, seed=work.seed + (1 << 32), title="warm-up", on_generator=attach
        )
    if measured.load.interrupted:
        raise KeyboardInterrupt
    if not measured.row["completed"]:
        why = measured.load.requests[0]
        raise MiniSglangError(f"{server.url} did not answer the warm-up: {why.error}: {why.detail}")
    return measured


@contextmanager
def stopper() -> Iterator[Callable[[Generator], None]]:
    """Gives what takes a generator, which the first Ctrl-C stops."""
    generators: list[Generator] = []

    def stop() -> None:
        for generator in generators:
            generator.stop()

    with stopped_by_ctrl_c(stop):
        yield generators.append


def failures(measured: Measured) -> list[str]:
    """One example of each kind of failure."""
    seen: dict[str, str] = {}
    for request in measured.load.requests:
        if request.error is not None:
            seen.setdefault(request.error, request.detail)
    return [f"{kind}: {detail}" for kind, detail in seen.items()]


def settings_json(options: Namespace, server: Found, work: Work) -> dict[str, Any]:
    """What was asked for, without the key."""
    given = {name: value for name, value in vars(options).items() if name not in ("api_key", "json", "prog")}
    given = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return {
        **given,
        "url": server.url if options.url is not None else None,
        "dialect": server.dialect.name,
        "model": server.model,
        "target": server.dialect.path,
        "goals": dict(work.goals) if work.goals else None,
    }
