"""F2: a step that raises or runs out of memory at every place of an answer, and a device lost for good."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

from benchmarks.reliability.faulty import Fault
from benchmarks.reliability.ledger import Ask
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import Server, settle
from benchmarks.reliability.witness import (
    Streams,
    Watch,
    asks_of,
    check_aftermath,
    server_of,
    stream_all,
    streaming,
)

KINDS = ("raise", "memory", "host memory")
BATCH, STREAMS, TOKENS = 4, 6, 60


def failing(size: Size) -> Row:
    """F2: an exception or out-of-memory at step k of a batch of 4 with 2 more waiting, for k up to 50."""
    row = Row("F2", "a step that fails")
    last = size.of(50, 3)
    with server_of(
        module="benchmarks.reliability.faulty", max_batch_size=BATCH, max_inflight_per_engine=STREAMS
    ) as (server, folder):
        server.wait_ready()
        asks = asks_of(STREAMS, TOKENS)
        quiet = asyncio.run(stream_all(server.port, asks, 0, TOKENS))
        bad: dict[str, list[str]] = {"word": [], "company": [], "leak": [], "canary": []}
        lost: list[int] = []
        for kind in KINDS:
            for k in range(1, last + 1):
                Fault(kind, k).put(folder / "fault")
                seen = asyncio.run(stream_all(server.port, asks, 0, TOKENS))
                where = f"{kind} at step {k}: "
                lost.append(seen.failed)
                bad["word"] += [where + one for one in seen.ill_ended()]
                bad["company"] += [where + one for one in seen.unlike(quiet)]
                # What did not fit the memory runs again in parts.
                expected = range(1, BATCH + 1) if kind == "raise" else range(1)
                bad["company"] += [f"{where}{seen.failed} lost"] * (seen.failed not in expected)
                server.wait_idle()
                bad["leak"] += [where + json.dumps(leaks)] if (leaks := server.leaks()) else []
                canary = _one(server.port, asks[0])
                bad["canary"] += [where + one for one in canary.unlike(Streams(quiet.entries[:1], []))]
                bad["canary"] += [f"{where}it failed"] * bool(canary.failed)
        for what, key in (
            (f"{len(lost)} faults: each stream of the batch has one error event", "word"),
            (
                "an exception costs at most its batch, want of memory nobody; all others have their ids",
                "company",
            ),
            ("every page is back", "leak"),
            ("a canary completes after each, with its ids", "canary"),
        ):
            row.check(what, bad[key][:3] or "yes", not bad[key])
        restarts = server.metrics()["restarts"]
        row.check("the engine goes on: no restart", restarts, restarts == 0)
        row.figures["lost"] = lost
        lost_device(row, server, folder / "fault", asks, quiet)
    return row


def lost_device(row: Row, server: Server, file: Path, asks: list[Ask], quiet: Streams) -> None:
    """Every step of the process fails from now on: another is started, and only that is ready again."""
    with Watch(server.port) as watch:
        Fault("broken", 5).put(file)
        with streaming(server.port, asks, 0, TOKENS) as found:
            pass
        settle(lambda: watch.states(0)[-2:] == ["starting", "ready"], "another engine", every=0.1)
    bad = found[0].ill_ended()
    row.check("a lost device: each stream there has one error event", bad[:3] or found[0].failed, not bad)
    row.check("a lost device: the engine is started again", watch.states(0), watch.states(0)[0] == "ready")
    row.check("a lost device: /ready tells the truth", watch.lies()[:3] or "it does", not watch.lies())
    check_aftermath(row, server, asks[0], quiet.entries[0])


def _one(port: int, ask: Ask) -> Streams:
    return asyncio.run(stream_all(port, [ask], 0, 0))
