"""F5: a server that is told to end, told twice, or killed, under streams. Nothing of it may be left."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability.client import ask as http
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import Server, settle
from benchmarks.reliability.witness import Streams, asks_of, server_of, stream_all, streaming

TOLD = 2
ORPHAN_SECONDS = 5.0


def ended(size: Size) -> Row:
    """F5: every way for a server to end."""
    row = Row("F5", "SIGTERM, twice, kill -9 of the parent")
    streams = size.of(64, 16)
    with _loaded(drain_timeout=120) as (server, folder):
        _finishes(row, server, folder, streams, size.of(400, 50))
    with _loaded(drain_timeout=2) as (server, folder):
        drained(row, server, folder, streams)
    for hang in (False, True):
        with _loaded(drain_timeout=60) as (server, folder):
            with streaming(server.port, asks_of(streams, 4000), TOLD, 4000) as found:
                _wait_running(server)
                second_sigterm(row, server, hang=hang)
            _cut_off(row, found[0], "after a second SIGTERM")
            _left(row, folder)
    with _loaded() as (server, folder):
        orphaned(row, server, folder, streams)
    for number in range(size.of(8, 2)):
        with server_of(num_engines=2) as (server, folder):
            _killed_at_start(row, server, folder, number * 0.25)
    return row


def drained(row: Row, server: Server, folder: Path, streams: int) -> None:
    """SIGTERM under streams that outlive DRAIN_TIMEOUT: the short ones finish, the others get an event."""
    # All of them have a place in the two batches: one that waits behind the long ones cannot finish.
    long, short = asks_of(min(streams, 24), 4000), asks_of(4, 10)
    quiet = asyncio.run(stream_all(server.port, short, 0, 10))
    children = server.children()
    with streaming(server.port, [*short, *long], TOLD, 4000) as found:
        _wait_running(server)
        server.process.send_signal(signal.SIGTERM)
        settle(lambda: server.status("/ready") == 503, "the drain", every=0.005)
        refused: list[tuple[int, str | None]] = []
        for path, body in ((short[0].path, short[0].body(stream=True)), ("/v1/models", None)):
            status, headers, _ = asyncio.run(http(server.port, path, body))
            refused.append((status, headers.get("retry-after")))
        status = server.process.wait(60)
    (seen,) = found
    row.check(
        "while it drains: a request gets 503, Retry-After", refused[0], refused[0][0] == 503 and refused[0][1]
    )
    row.check("while it drains: other routes still answer", refused[1], refused[1][0] == 200)
    row.check("past DRAIN_TIMEOUT it ends with status 0", status, status == 0)
    first = Streams(seen.entries[: len(short)], [])
    bad = first.unlike(quiet) or [f"{first.failed} were lost"] * bool(first.failed)
    row.check("what can finish does, with its ids", bad or "it does", not bad)
    _cut_off(row, Streams(seen.entries[len(short) :], seen.told), "past DRAIN_TIMEOUT", all_of_them=True)
    _all_gone(row, children)
    _left(row, folder)
    row.check_log(server.said)


def second_sigterm(row: Row, server: Server, *, hang: bool) -> None:
    """With ``hang`` the engines do not answer, so that draining and closing would wait for them."""
    children = server.children()
    if hang:
        for child in children:
            child.suspend()
    server.process.send_signal(signal.SIGTERM)
    settle(lambda: "draining" in server.said, "the drain")
    started = time.perf_counter()
    status = server.end(limit=60)
    seconds = time.perf_counter() - started
    state = "with engines that hang" if hang else "under streams"
    row.check(f"a second SIGTERM {state}: status 0", status, status == 0)
    row.check(f"a second SIGTERM {state}: at once, within 3 s", f"{seconds:.2f} s", seconds < 3, timed=True)
    _all_gone(row, children)


def orphaned(row: Row, server: Server, folder: Path, streams: int) -> None:
    """The server's own process is killed under streams, with a helper for grammars beside the engines."""
    grammar = Ask("generate", ("x",), 8, extra=(("regex", "[ab]+"),))
    entry: Entry = asyncio.run(keep(server.port, grammar))
    row.check("an answer with a grammar", entry.faults() or "fine", not entry.faults())
    children = server.children()
    with streaming(server.port, asks_of(streams, 4000), TOLD, 4000):
        _wait_running(server)
        server.process.kill()
        server.process.wait()
        seconds = _until_gone(children)
    row.check(
        f"the parent killed: its {len(children)} children are gone within {ORPHAN_SECONDS:g} s",
        f"{seconds:.2f} s" if seconds is not None else [one.pid for one in children if not _gone(one)],
        seconds is not None,
    )
    _left(row, folder)


def _finishes(row: Row, server: Server, folder: Path, streams: int, tokens: int) -> None:
    """A drain that everything outlives."""
    asks = asks_of(streams, tokens)
    quiet = asyncio.run(stream_all(server.port, asks, TOLD, tokens))
    children = server.children()
    with streaming(server.port, asks, TOLD, tokens) as found:
        _wait_running(server)
        status = server.end()
    bad = found[0].unlike(quiet) + [f"{found[0].failed} were lost"] * bool(found[0].failed)
    row.check(
        "SIGTERM with time to drain: every stream is whole, with its ids", bad[:3] or "they are", not bad
    )
    row.check("SIGTERM with time to drain: status 0", status, status == 0)
    _all_gone(row, children)
    _left(row, folder)


def _killed_at_start(row: Row, server: Server, folder: Path, delay: float) -> None:
    """The parent is killed while its engines load."""
    process = psutil.Process(server.pid)
    settle(lambda: len(process.children()) >= 2, "engines to start", every=0.005)
    time.sleep(delay)
    children = process.children(recursive=True)
    server.process.kill()
    server.process.wait()
    seconds = _until_gone(children)
    row.check(f"killed {delay:g} s into the engines' start: they are gone", seconds, seconds is not None)
    _left(row, folder)


@contextmanager
def _loaded(**settings: Any) -> Iterator[tuple[Server, Path]]:
    with server_of(num_engines=2, max_batch_size=16, **settings) as (server, folder):
        server.wait_ready()
        yield server, folder


def _wait_running(server: Server) -> None:
    settle(lambda: all(one["running"] for one in server.metrics()["engines"]), "streams to run", every=0.005)


def _cut_off(row: Row, seen: Streams, when: str, *, all_of_them: bool = False) -> None:
    bad = seen.ill_ended()
    row.check(f"what is ended {when} gets one error event", bad[:3] or seen.messages(), not bad)
    total = len(seen.entries) + len(seen.told)
    row.check(
        f"so are {'all' if all_of_them else 'some'} of {total}",
        seen.failed,
        seen.failed > total * all_of_them - 1,
    )


def _all_gone(row: Row, children: list[psutil.Process]) -> None:
    left = [one.pid for one in children if not _gone(one)]
    row.check("no process is left", left or "none", not left)


def _left(row: Row, folder: Path) -> None:
    left = [path.name for path in (folder / "tmp").iterdir()]
    row.check("no file is left in the temporary folder", left or "none", not left)


def _until_gone(children: list[psutil.Process]) -> float | None:
    """How long it took; None where it took too long."""
    started = time.monotonic()
    while not all(map(_gone, children)):
        if time.monotonic() - started > ORPHAN_SECONDS:
            return None
        time.sleep(0.01)
    return round(time.monotonic() - started, 2)


def _gone(process: psutil.Process) -> bool:
    """Whether it has ended; one that nobody has waited for yet has."""
    try:
        return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
