"""F4: clients that hardly read or write, beside others that must not notice."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import socket
import statistics
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reliability.client import Exchange
from benchmarks.reliability.client import ask as fetch
from benchmarks.reliability.endurance import check_held, settled
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row, Size, percentile
from benchmarks.reliability.server import LIMIT_SECONDS, Server, held_json, serving, settle

TITLE = "readers at a byte a second, and others beside them"
READERS, OTHERS = 64, 8
SLOWER = 1.10
LONG = 7000
# What a reader that does not read may cost: the server's buffer for its connection, and its tokens until
# WRITE_TIMEOUT gives it up. A token has twenty alternatives, each a tuple, an id and a float: 130 bytes.
BUFFER_BYTES, TOKEN_BYTES = 256 << 10, 3 << 10
SLACK_BYTES = 24 << 20
# Beyond the timeout, for a machine that is busy with something else.
LATE_SECONDS = 5.0


class Reader:
    """A reader of a long answer with large lines: ``full`` speed, ``drip`` (a byte a second) or ``stopped``.

    Attributes:
        hurry: set it, and a slow one reads what there still is as fast as it can.
        tail: the last bytes it read.
        ended: whether its connection came to an end.
    """

    def __init__(self, server: Server, number: int, width: int, pace: str) -> None:
        prompts = tuple(f"reader {number}.{place}" for place in range(width))
        extra = (("logprobs", True), ("top_logprobs", 20))
        body = Ask("generate", prompts, LONG, temperature=0.9, seed=number, extra=extra).body(stream=True)
        self._exchange = Exchange(server.port, "/generate", body)
        self._port = server.port
        self._pace = pace
        self.hurry = asyncio.Event()
        self.tail = b""
        self.ended = False

    async def run(self) -> None:
        """Read until the server ends it, or this is cancelled."""
        loop = asyncio.get_running_loop()
        with socket.socket() as raw:
            if self._pace != "full":
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            raw.setblocking(False)
            await loop.sock_connect(raw, ("127.0.0.1", self._port))
            await loop.sock_sendall(raw, self._exchange.request)
            if self._pace == "stopped":
                await self.hurry.wait()
            with contextlib.suppress(ConnectionError):
                while data := await loop.sock_recv(raw, 1 if self._slow else 1 << 16):
                    self.tail = (self.tail + data)[-16:]
                    if self._slow:
                        with contextlib.suppress(TimeoutError):
                            await asyncio.wait_for(self.hurry.wait(), 1.0)
        self.ended = True

    @property
    def _slow(self) -> bool:
        return self._pace != "full" and not self.hurry.is_set()

    @property
    def given_up(self) -> bool:
        """Whether its connection ended and its response did not."""
        return self.ended and not self.tail.endswith(b"0\r\n\r\n")


class Crowd:
    """Readers that run while the block does."""

    def __init__(self, server: Server, count: int, width: int, paces: tuple[str, ...]) -> None:
        self.readers = [Reader(server, n, width, paces[n % len(paces)]) for n in range(count)]
        self._server = server
        self._requests = count * width

    async def __aenter__(self) -> Crowd:
        self._tasks = [asyncio.create_task(reader.run()) for reader in self.readers]
        await asyncio.to_thread(settle, self._all_run, "all readers' requests to run")
        return self

    async def given_up(self) -> int:
        """How many of them were, once all have read what there was."""
        for reader in self.readers:
            reader.hurry.set()
        await asyncio.wait(self._tasks, timeout=LIMIT_SECONDS)
        return sum(reader.given_up for reader in self.readers)

    def _all_run(self) -> bool:
        return bool(self._server.metrics()["inflight"] >= self._requests)

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def other(place: int) -> Ask:
    return Ask("generate", (f"another {place}",), 150, temperature=0.8, seed=place)


async def others(server: Server, count: int, seconds: float) -> list[tuple[int, Entry]]:
    """Streams of clients that read as fast as they can: for ``seconds``, each of them at least one."""
    until = time.perf_counter() + seconds

    async def client(place: int) -> list[tuple[int, Entry]]:
        entries = [(place, await keep(server.port, other(place)))]
        while time.perf_counter() < until:
            entries.append((place, await keep(server.port, other(place))))
        return entries

    return [one for group in await asyncio.gather(*map(client, range(count))) for one in group]


def gaps(entries: list[tuple[int, Entry]]) -> list[float]:
    """Seconds from each piece of a stream to its next."""
    return [b - a for _, entry in entries for a, b in itertools.pairwise(entry.arrivals)]


async def idle_writers(server: Server, each: int) -> tuple[list[float], int]:
    """Clients that send nothing, half a head, a head byte by byte, or half a body.

    Returns the seconds until each was given up, and how many never were.
    """
    half = b"POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    kinds = (b"", half, None, half + b"Content-Length: 100\r\n\r\n{")

    async def write(data: bytes | None) -> float | None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        started = time.perf_counter()
        drip = None
        if data is None:
            drip = asyncio.create_task(_drip(writer, half * 20))
        else:
            writer.write(data)
        try:
            async with asyncio.timeout(server.settings["read_timeout"] + 6 * LATE_SECONDS):
                while await reader.read(1 << 16):
                    pass
        except TimeoutError:
            return None
        except ConnectionError:
            pass  # cut, which is as good as closed
        finally:
            if drip is not None:
                drip.cancel()
            writer.close()
        return time.perf_counter() - started

    found = await asyncio.gather(*(write(kind) for kind in kinds for _ in range(each)))
    times = [one for one in found if one is not None]
    return times, len(found) - len(times)


async def _drip(writer: asyncio.StreamWriter, data: bytes) -> None:
    for byte in data:
        writer.write(bytes([byte]))
        await asyncio.sleep(0.2)


@dataclass(slots=True)
class Seen:
    """What was measured. ``looks``: time, RSS of the HTTP process, tokens decoded, with slow readers."""

    p99: dict[str, list[float]] = field(default_factory=lambda: {"full": [], "slow": []})
    entries: list[tuple[int, Entry]] = field(default_factory=list)
    looks: list[tuple[float, int, int]] = field(default_factory=list)
    whole: list[dict[str, Any]] = field(default_factory=list)
    given_up_s: float = 0.0
    given_up: int = 0
    writer_s: list[float] = field(default_factory=list)
    writers_left: int = 0

    async def look(self, server: Server) -> None:
        """Sample until cancelled."""
        while True:
            decoded = (await asyncio.to_thread(server.metrics))["engines"][0]["decode_tokens"]
            self.looks.append((time.perf_counter(), server.rss(), decoded))
            await asyncio.sleep(0.5)

    def most_decoded(self, seconds: float) -> int:
        """Tokens decoded in any span of about so many seconds, at most."""
        return max(
            (b[2] - a[2] for a in self.looks for b in self.looks if 0 <= b[0] - a[0] <= seconds), default=0
        )


async def drive(server: Server, size: Size, readers: int, width: int) -> Seen:
    """Rounds of others beside readers at full speed and beside slow ones, with idle writers all along."""
    seen, count = Seen(), size.of(OTHERS, 2)
    # Nobody is given up before this time is over.
    patience = server.settings["write_timeout"]
    writing = asyncio.create_task(idle_writers(server, size.of(8, 1)))
    bodies = [(await fetch(server.port, "/generate", other(n).reference(0)))[2] for n in range(count)]
    seen.whole = [json.loads(body) for body in bodies]
    await others(server, count, 0)
    rounds = size.of(3, 1)
    for number in range(rounds):
        for kind, paces in (("full", ("full",)), ("slow", ("drip", "stopped"))):
            async with Crowd(server, readers, width, paces) as crowd:
                started = time.perf_counter()
                looking = asyncio.create_task(seen.look(server)) if kind == "slow" else None
                # One stream each where nothing is measured.
                found = await others(server, count, patience if size.fraction else 0)
                seen.p99[kind].append(percentile(gaps(found), 99))
                seen.entries += found
                if kind == "slow" and number == rounds - 1:
                    await asyncio.to_thread(server.wait_idle)
                    seen.given_up_s = time.perf_counter() - started
                    seen.given_up = await crowd.given_up()
                if looking is not None:
                    looking.cancel()
            await asyncio.to_thread(server.wait_idle)
    seen.writer_s, seen.writers_left = await writing
    return seen


def settings(size: Size) -> dict[str, Any]:
    """Of the server: room for all of them, and little patience."""
    return {
        "max_batch_size": 128, "max_inflight_per_engine": 128, "max_queue": 128, "kv_token_budget": 1 << 18,
        "write_timeout": round(size.seconds(20, 2), 1), "read_timeout": 2.0,
    }  # fmt: skip


def measure(server: Server, size: Size) -> Row:
    """The row, on a server with a probe that may have other settings."""
    row = Row("F4", TITLE)
    readers = size.of(READERS, 4)
    # Few readers fill their buffers with several answers each.
    width = max(1, (48 if size.fraction else 12) // readers)
    server.wait_idle()
    asyncio.run(others(server, 2, 0))
    server.wait_idle()
    before, inside, first = server.held(), server.inside(), server.metrics()
    seen = asyncio.run(drive(server, size, readers, width))
    server.wait_idle()
    second, leaks = server.metrics(), server.leaks()
    after, inside_after = settled(server, before, inside)
    said = server.said
    outcomes = Counter(second["requests"])
    outcomes.subtract(first["requests"])
    start = min(one[0] for one in seen.looks)
    row.figures = {
        "readers": readers, "width": width, "others": len(seen.whole),
        "write_timeout_s": server.settings["write_timeout"],
        "read_timeout_s": server.settings["read_timeout"],
        "p99_itl_s": seen.p99, "outcomes": dict(+outcomes), "given_up_s": seen.given_up_s,
        "writers_s": seen.writer_s, "looks": [[round(t - start, 1), rss, n] for t, rss, n in seen.looks],
        "held_before": held_json(before), "held_after": held_json(after),
        "inside_before": inside, "inside_after": inside_after,
    }  # fmt: skip
    _checks(row, seen, before[0].rss, outcomes)
    row.check_leaks(leaks)
    check_held(row, before, after, inside, inside_after)
    row.check_log(said)
    return row


def run(size: Size) -> Row:
    """The row, on a server of its own."""
    with serving(probe=True, **settings(size)) as server:
        return measure(server, size)


def _checks(row: Row, seen: Seen, rss: int, outcomes: Counter[str]) -> None:
    readers, width = row.figures["readers"], row.figures["width"]
    patience, read = row.figures["write_timeout_s"], row.figures["read_timeout_s"]
    fast, slow = (statistics.median(seen.p99[kind]) for kind in ("full", "slow"))
    row.check(
        f"p99 ITL of {row.figures['others']} others beside {readers} slow readers at most {SLOWER:g} × that "
        "beside as many that read (medians of rounds)",
        f"{slow * 1e3:.1f} and {fast * 1e3:.1f} ms: {slow / fast:.2f} ×",
        slow <= SLOWER * fast,
        timed=True,
    )
    bad = [
        fault
        for place, one in seen.entries
        for fault in (*one.faults(), *one.differences(0, seen.whole[place]))
    ]
    row.check(
        f"{len(seen.entries)} streams of the others are whole, with the ids they have alone",
        "; ".join(bad[:3])[:300] or "all",
        not bad and all(entry.status == 200 for _, entry in seen.entries),
    )
    rounds = len(seen.p99["slow"])
    row.check(
        f"every slow reader is given up (WRITE_TIMEOUT {patience:g} s) before its answer ends",
        f"{dict(outcomes)}; the last after {seen.given_up_s:.1f} s; "
        f"{seen.given_up} of {readers} saw their response break off",
        outcomes["abort"] == 2 * rounds * readers * width and seen.given_up == readers,
    )
    most = seen.most_decoded(patience + 1.5)
    grown = max(one[1] for one in seen.looks) - rss
    allowed = readers * BUFFER_BYTES + most * TOKEN_BYTES + SLACK_BYTES
    row.check(
        f"memory of the HTTP process grows by at most {BUFFER_BYTES >> 10} KiB a reader, "
        f"{TOKEN_BYTES >> 10} KiB a token that WRITE_TIMEOUT allows ({most}), and {SLACK_BYTES >> 20} MiB",
        f"{grown / 1e6:.1f} of {allowed / 1e6:.1f} MB",
        grown <= allowed,
    )
    writers = len(seen.writer_s)
    row.check(
        "clients that send nothing, half a head, a head byte by byte or half a body are given up",
        f"{writers} after at most {max(seen.writer_s, default=0):.1f} s, {seen.writers_left} never",
        writers > 0 and not seen.writers_left,
    )
    row.check(
        f"they are within {read + LATE_SECONDS:g} s (READ_TIMEOUT {read:g})",
        f"{max(seen.writer_s, default=0):.1f} s",
        max(seen.writer_s, default=0.0) <= read + LATE_SECONDS,
        timed=True,
    )
