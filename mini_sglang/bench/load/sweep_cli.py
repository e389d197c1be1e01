"""``mini-sglang bench sweep``: the same load at rising rates, until the server is full."""

from __future__ import annotations

import asyncio
import statistics
from argparse import Namespace
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from mini_sglang.bench.load.generator import Load
from mini_sglang.bench.load.options import Work, add_options, checked, rate
from mini_sglang.bench.load.running import Measured, Pace, measure, warnings
from mini_sglang.bench.load.serve_cli import (
    INTERRUPTED,
    Target,
    client_of,
    failures,
    find,
    settings_json,
    stopper,
    target_of,
    warm,
)
from mini_sglang.bench.load.table import as_sentence, sweep_lines
from mini_sglang.bench.machine import machine_line
from mini_sglang.bench.record import Record
from mini_sglang.cli.args import Parser
from mini_sglang.errors import InvalidValueError

FOLLOWS = 0.9
"""Of the offered output a server that keeps up gives at least so much."""


def main(argv: Sequence[str] | None = None) -> int:
    """Returns: 0, 1 where no request was answered, 130 after Ctrl-C.

    Raises:
        MiniSglangError: what is refused, or a server that does not start or answer.
    """
    parser = Parser(
        prog="mini-sglang bench sweep",
        usage="mini-sglang bench sweep [--url URL] [--rates 1,2,4 | --start R --factor F] [options]",
        description="`mini-sglang bench serve` at one rate after another, until the server does not follow "
        "any more: its output falls behind what is offered, or the first token comes too late.",
    )
    parser.add_argument("--rates", metavar="A,B", help="requests a second, rising; each is tried in turn")
    parser.add_argument("--start", type=float, default=0.5, metavar="R", help="else: the first rate; 0.5")
    parser.add_argument("--factor", type=float, default=2.0, metavar="F", help="from each to the next; 2")
    parser.add_argument("--most-rates", type=int, default=10, metavar="N", help="at most so many rates; 10")
    parser.add_argument(
        "--seconds", type=float, default=30.0, metavar="S", help="of sending at each rate; 30"
    )
    parser.add_argument(
        "--least", type=int, default=16, metavar="N", help="requests at each rate at least; 16"
    )
    parser.add_argument(
        "--max-ttft", type=float, metavar="MS", help="p99 of the first token that is too late"
    )
    parser.add_argument(
        "--warmup", type=int, default=3, metavar="N", help="requests before, one at a time; 3"
    )
    add_options(parser)
    options = parser.parse(argv)
    work, speeds = checked(options), list(_rates(options))
    with target_of(options) as target:
        return asyncio.run(_run(options, work, speeds, target))


async def _run(options: Namespace, work: Work, speeds: Sequence[float], target: Target) -> int:
    server = await find(options, target.url)
    client = client_of(options, server)
    rows: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    notes: list[str] = []
    end = f"it followed every rate up to {speeds[-1]:g}"
    interrupted = False
    try:
        alone = unloaded(await warm(server, client, work, options.warmup))
        for number, speed in enumerate(speeds):
            pace = Pace(speed, None, max(options.least, round(speed * options.seconds)), None)
            with stopper() as attach:
                measured = await measure(
                    server,
                    client,
                    work,
                    pace,
                    # Other prompts at each rate, or the cache of the last would serve them.
                    seed=work.seed + number,
                    title=f"{speed:g}/s",
                    on_generator=attach,
                )
            row = {**measured.row, "followed": followed(measured.load, alone, work.shape.think)}
            rows.append(row)
            runs += [{"rate": speed, **request.as_json()} for request in measured.load.requests]
            told = [*warnings(server, work, measured), *failures(measured)]
            notes += [note for note in told if note not in notes]
            interrupted = measured.load.interrupted
            why = saturated(row, options.max_ttft)
            if interrupted or why:
                end = "stopped by Ctrl-C" if interrupted else f"full at {speed:g} requests/s: {why}"
                break
    finally:
        client.close()
    print(f"{server.url} ({server.dialect.name}): {work.dataset}, seed {work.seed}; latency in ms")
    for line in sweep_lines(rows):
        print(line)
    for note in [end, *notes]:
        print(as_sentence(note))
    if target.limits is not None:
        print(machine_line(target.limits))
    if options.json is not None:
        settings = {**settings_json(options, server, work), "notes": notes, "end": end, "unloaded_e2e": alone}
        Record("sweep", settings, rows, runs, limits=target.limits).write(options.json)
    if interrupted:
        return INTERRUPTED
    return 0 if any(row["completed"] for row in rows) else 1


def unloaded(measured: Measured) -> float:
    """Seconds that an answer takes where it has the server for itself."""
    return statistics.median(r.end - r.sent for r in measured.load.requests if r.error is None)


def followed(load: Load, alone: float, think: float = 0.0) -> float | None:
    """The output per second, of what it would be if every answer took ``alone`` seconds; None of nothing.

    Then all output would be there ``alone`` seconds after the last request was due; in sessions of several
    turns, that time and ``think`` seconds later for each turn.
    """
    if not load.requests:
        return None
    starts = {request.session: request.planned for request in reversed(load.requests) if request.turn == 0}
    turns = Counter(request.session for request in load.requests)
    ideal = max(at + turns[one] * alone + (turns[one] - 1) * think for one, at in starts.items())
    got = sum(request.output_tokens or 0 for request in load.requests if request.error is None)
    lost = sum(request.asked_tokens for request in load.requests if request.error is not None)
    return got / max(load.duration, ideal) / ((got + lost) / ideal)


def saturated(row: dict[str, Any], max_ttft: float | None) -> str | None:
    """Why the server is full, or None where it is not.

    Args:
        row: with ``followed``.
        max_ttft: milliseconds.
    """
    if row["followed"] is not None and row["followed"] < FOLLOWS:
        return f"its output is {row['followed']:.0%} of what was offered, under {FOLLOWS:.0%}" + (
            f" ({row['errors']} of {row['requests']} failed)" if row["errors"] else ""
        )
    late = row["ttft_planned"]
    if max_ttft is not None and late is not None and late["p99"] * 1e3 > max_ttft:
        return f"its p99 time to first token is {late['p99'] * 1e3:.0f} ms, over {max_ttft:g}"
    return None


def _rates(options: Namespace) -> Iterator[float]:
    """Raises: InvalidValueError."""
    if not 1 <= options.warmup <= 10_000:
        raise InvalidValueError("--warmup", options.warmup, "from 1 to 10000")
    if not 1 <= options.least <= 1_000_000:
        raise InvalidValueError("--least", options.least, "from 1 to 1000000")
    if not 0 < options.seconds <= 86400:
        raise InvalidValueError("--seconds", options.seconds, "above 0 and at most 86400")
    if options.max_ttft is not None and not options.max_ttft > 0:
        raise InvalidValueError("--max-ttft", options.max_ttft, "above 0, in milliseconds")
    if options.rates is not None:
        speeds = [rate("--rates", part) for part in options.rates.split(",")]
        if speeds != sorted(set(speeds)) or speeds[-1] == float("inf"):
            raise InvalidValueError("--rates", options.rates, "rising numbers with commas between")
        yield from speeds
        return
    if not 0 < options.start < 1e6:
        raise InvalidValueError("--start", options.start, "above 0 and below 1000000")
    if not 1 < options.factor <= 100:
        raise InvalidValueError("--factor", options.factor, "above 1 and at most 100")
    if not 1 <= options.most_rates <= 100:
        raise InvalidValueError("--most-rates", options.most_rates, "from 1 to 100")
    for number in range(options.most_rates):
        yield options.start * options.factor**number
