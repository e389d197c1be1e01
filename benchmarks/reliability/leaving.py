"""F3: clients that leave at every moment of a request's life, after which nothing of them is left."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.reliability.client import BrokenOffError, Exchange
from benchmarks.reliability.client import ask as fetch
from benchmarks.reliability.endurance import check_held, settled
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import Server, held_json, serving, settle

TITLE = "clients that leave at any moment"
LEAVERS, AT_ONCE = 1000, 32
IDLE_SECONDS = 2.0
STAYING = 2
# Leaves a request that nobody ends running for far longer than it may.
LONG = 3000
PHASES = ("queued", "prefill", "decode", "last token", "not streaming")


class Leaver:
    """One that leaves, in a phase and a way of its own. ``left_in`` says what it had seen by then."""

    def __init__(self, phase: str, number: int) -> None:
        self.phase = phase
        self.rng = random.Random(number)
        self.api = ("generate", "completions", "chat")[number % 3]
        self.left_in = ""

    def ask(self) -> Ask:
        length = self.rng.randint(500, 1000) if self.phase == "prefill" else self.rng.randint(4, 60)
        prompt = "".join(self.rng.choices("abcdefghijklmnop ", k=length))
        new = self.rng.randint(1, 6) if self.phase == "last token" else LONG
        return Ask(self.api, (prompt,), new, temperature=0.9, seed=self.rng.randrange(1 << 30))

    async def run(self, port: int) -> None:
        """Ask and leave; half of them with a reset, half with an orderly close."""
        ask = self.ask()
        async with Exchange(port, ask.path, ask.body(stream=self.phase != "not streaming")) as one:
            try:
                await self._wait(one, ask)
            except BrokenOffError:
                self.left_in = "broken off"
            if self.rng.random() < 0.5:
                one.reset()

    async def _wait(self, one: Exchange, ask: Ask) -> None:
        if self.phase in ("queued", "not streaming", "prefill"):
            # From before the request is read to well into its answer.
            reading = asyncio.create_task(one.head())
            done, _ = await asyncio.wait([reading], timeout=self.rng.choice((0.0, 0.001, 0.01, 0.05, 0.2)))
            reading.cancel()
            self.left_in = "decode" if done else "before the first byte"
            return
        await one.head()
        wanted = self.rng.randint(1, 40) if self.phase == "decode" else ask.max_new
        events, rest = 0, b""
        async for piece in one.pieces():
            rest += piece
            events = rest.count(b"\n\n" if ask.api != "generate" else b"\n")
            ended = b"[DONE]" in rest or b'"done"' in rest or b'"finish_reason":"length"' in rest
            if ended or events >= wanted:
                self.left_in = "last token" if ended else "decode"
                return
        self.left_in = "the end"


def staying(place: int) -> Ask:
    return Ask("generate", (f"staying {place}",), 200, temperature=0.8, seed=place)


async def stay(server: Server, ask: Ask, over: asyncio.Event) -> list[Entry]:
    """One that stays and asks the same thing again and again; what it got."""
    entries = []
    while not over.is_set():
        entries.append(await keep(server.port, ask))
    return entries


async def leave(server: Server, phases: list[str], at_once: int, first: int) -> list[Leaver]:
    leavers = [Leaver(phase, first + number) for number, phase in enumerate(phases)]
    left = iter(leavers)

    async def client() -> None:
        for leaver in left:
            await leaver.run(server.port)

    await asyncio.gather(*(client() for _ in range(at_once)))
    return leavers


async def queued(server: Server, count: int, at_once: int) -> list[Leaver]:
    """Leavers behind requests that have every place there is; those leave too, when the others have."""
    body = Ask("generate", ("holding a place",), LONG).body(stream=True)
    async with contextlib.AsyncExitStack() as stack:
        places = server.settings["max_inflight_per_engine"]
        for _ in range(places):
            await stack.enter_async_context(Exchange(server.port, "/generate", body))
        await asyncio.to_thread(settle, lambda: server.metrics()["inflight"] == places, "a full engine")
        return await leave(server, ["queued"] * count, at_once, 0)


async def idle_again(server: Server, left: int) -> float:
    """Seconds from now until the server has only ``left`` requests."""
    return await asyncio.to_thread(lambda: server.wait_idle(left=left))


def settings(size: Size) -> dict[str, Any]:
    """Of the server: few places, so that there is a queue to leave."""
    return {
        "max_batch_size": 8, "max_inflight_per_engine": 8, "max_queue": 256, "queue_timeout": 600,
        "kv_token_budget": 1 << 14,
    }  # fmt: skip


@dataclass(slots=True)
class Seen:
    """What became of those that left and of those that stayed; ``idle`` is in seconds, after each part."""

    leavers: list[Leaver]
    idle: list[float]
    stayed: list[list[Entry]]
    whole: list[dict[str, Any]]


async def drive(server: Server, count: int, at_once: int) -> Seen:
    """A fifth leaves the queue of a full engine, the rest an engine that serves others too."""
    behind = count // 5
    phases = [PHASES[1 + number % 4] for number in range(count - behind)]
    random.Random(6).shuffle(phases)
    asks = [staying(place) for place in range(STAYING)]
    whole = [json.loads((await fetch(server.port, "/generate", one.reference(0)))[2]) for one in asks]
    leavers = await queued(server, behind, at_once)
    idle = [await idle_again(server, 0)]
    over = asyncio.Event()
    stayers = [asyncio.create_task(stay(server, one, over)) for one in asks]
    leavers += await leave(server, phases, at_once, behind)
    idle.append(await idle_again(server, STAYING))
    over.set()
    return Seen(leavers, idle, await asyncio.gather(*stayers), whole)


def measure(server: Server, size: Size) -> Row:
    """The row, on a server with a probe that may have other settings."""
    row = Row("F3", TITLE)
    count, at_once = size.of(LEAVERS, 60), size.of(AT_ONCE, 12)
    server.wait_idle()
    # What a first request brings, such as threads, is there to stay.
    asyncio.run(leave(server, list(PHASES) * 4, at_once, 10_000))
    server.wait_idle()
    before, inside, first = server.held(), server.inside(), server.metrics()
    seen = asyncio.run(drive(server, count, at_once))
    server.wait_idle()
    second, leaks = server.metrics(), server.leaks()
    after, inside_after = settled(server, before, inside)
    said = server.said
    aborted = second["requests"].get("abort", 0) - first["requests"].get("abort", 0)
    phases = {phase: Counter(one.left_in for one in seen.leavers if one.phase == phase) for phase in PHASES}
    row.figures = {
        "leavers": count, "seen": {phase: dict(counts) for phase, counts in phases.items()},
        "aborted": aborted, "idle_s": seen.idle, "stayed": sum(map(len, seen.stayed)),
        "held_before": held_json(before), "held_after": held_json(after),
        "inside_before": inside, "inside_after": inside_after,
    }  # fmt: skip
    row.check(
        f"{count} clients leave, in all phases",
        "; ".join(f"{phase}: {counts.total()}" for phase, counts in phases.items())
        + f"; {aborted} ended by it",
        len(seen.leavers) == count and all(phases.values()) and aborted > 0,
    )
    broken = sum(counts["broken off"] for counts in phases.values())
    row.check("no response breaks off before its client leaves", broken or "none", not broken)
    row.check(
        f"nothing of them runs {IDLE_SECONDS:g} s after the last has left",
        f"after {' and '.join(f'{one:.2f}' for one in seen.idle)} s",
        max(seen.idle) < IDLE_SECONDS,
        timed=True,
    )
    entries = [(place, entry) for place, group in enumerate(seen.stayed) for entry in group]
    bad = [
        fault for place, one in entries for fault in (*one.faults(), *one.differences(0, seen.whole[place]))
    ]
    row.check(
        f"{len(entries)} streams of clients that stay are whole, with the ids they have alone",
        "; ".join(bad[:3])[:300] or "all",
        not bad and all(entry.status == 200 for _, entry in entries),
    )
    row.check_leaks(leaks)
    check_held(row, before, after, inside, inside_after)
    row.check_log(said)
    return row


def run(size: Size) -> Row:
    """The row, on a server of its own."""
    with serving(probe=True, **settings(size)) as server:
        return measure(server, size)
