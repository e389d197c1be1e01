"""L3: four times the requests that a server can take, sent without waiting for answers."""

from __future__ import annotations

import asyncio
import json
import random
import statistics
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from benchmarks.reliability.client import ask as fetch
from benchmarks.reliability.client import lag
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row, Size, percentile
from benchmarks.reliability.server import Server, serving, tiny_folder

TITLE = "four times the load it can take"
TIMES = 4
REFUSAL_SECONDS, RECOVERY_SECONDS = 0.1, 5.0
# Of one request on the idle server, before and after.
SLOWER = 1.5
Sent = list[tuple[int, Entry]]


def make_asks(count: int, longest: int) -> list[Ask]:
    rng = random.Random(3)
    return [
        Ask(
            ("generate", "completions", "chat")[number % 3],
            ("".join(rng.choices("abcdefgh ", k=rng.randint(16, 128))),),
            rng.randint(longest // 3, longest),
            temperature=0.7,
            seed=number,
        )
        for number in range(count)
    ]


class Watch:
    """Looks at the queue now and then, from a thread of its own."""

    def __init__(self) -> None:
        self.most: Counter[str] = Counter()
        self.looks = 0

    @asynccontextmanager
    async def over(self, server: Server, every: float = 0.1) -> AsyncIterator[None]:
        over = threading.Event()

        def look() -> None:
            while not over.wait(every):
                found = server.metrics()
                seen = {name: found[name] for name in ("reserved", "queued", "inflight")}
                seen["together"] = sum(seen.values())
                self.looks += 1
                for name, value in seen.items():
                    self.most[name] = max(self.most[name], value)

        thread = threading.Thread(target=look)
        thread.start()
        try:
            yield
        finally:
            over.set()
            await asyncio.to_thread(thread.join)


async def references(server: Server, asks: list[Ask]) -> list[dict[str, Any]]:
    bodies = [(await fetch(server.port, "/generate", one.reference(0)))[2] for one in asks]
    return [json.loads(body) for body in bodies]


async def capacity(server: Server, asks: list[Ask], clients: int, count: int) -> float:
    """Requests a second that it serves when there is always one more, from so many clients."""
    left = iter(range(count))

    async def client() -> None:
        for number in left:
            entry = await keep(server.port, asks[number % len(asks)])
            if entry.faults() or entry.status != 200:
                raise RuntimeError(f"a request failed before the overload: {entry.status} {entry.faults()}")

    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    return count / (time.perf_counter() - started)


async def one_at_a_time(server: Server, ask: Ask, count: int) -> list[float]:
    """Seconds that each of ``count`` requests took, alone on the server."""
    return [(await keep(server.port, ask)).seconds for _ in range(count)]


async def open_loop(
    server: Server, asks: list[Ask], rate: float, seconds: float
) -> tuple[Sent, float, float]:
    """Send ``rate`` requests a second at random moments, whatever becomes of them.

    Returns what came of each, the seconds it took to send them, and the time of the last one.
    """
    rng = random.Random(4)
    running: list[asyncio.Task[tuple[int, Entry]]] = []

    async def send(place: int) -> tuple[int, Entry]:
        return place, await keep(server.port, asks[place], stream=place % 4 != 3)

    started = due = time.perf_counter()
    while due - started < seconds:
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
        running.append(asyncio.create_task(send(rng.randrange(len(asks)))))
        due += rng.expovariate(rate)
    last = time.perf_counter()
    return await asyncio.gather(*running), last - started, last


def settings(size: Size) -> dict[str, Any]:
    """Of the server: few places, a short queue."""
    # The queue is to be served well within the time for recovery.
    return {"max_batch_size": 16, "max_inflight_per_engine": 16, "max_queue": 16}


async def drive(server: Server, asks: list[Ask], size: Size, watch: Watch) -> tuple[Sent, dict[str, Any]]:
    """The load: what can be taken, one request alone, the overload, and one alone again."""
    clients = server.settings["max_batch_size"]
    await capacity(server, asks, clients, clients)
    rate = await capacity(server, asks, clients, size.of(600, clients))
    alone = await one_at_a_time(server, asks[0], size.of(40, 3))
    first, cpu = server.metrics(), server.cpu_seconds()
    async with lag() as late, watch.over(server):
        if size.fraction:
            sent, took, last = await open_loop(server, asks, TIMES * rate, size.seconds(30, 4))
        else:
            # However fast the machine is at the moment, three times what there are places for.
            sent, took, last = await open_loop(
                server, asks, 3 * (clients + server.settings["max_queue"]), 1.0
            )
    drained, cpu = time.perf_counter() - last, server.cpu_seconds() - cpu
    second = server.metrics()
    if size.fraction:
        await asyncio.sleep(max(0.0, last + RECOVERY_SECONDS - time.perf_counter()))
    after = await one_at_a_time(server, asks[0], size.of(40, 3))
    return sent, {
        "capacity_rps": rate, "sent": len(sent), "sent_rps": len(sent) / took, "drained_s": drained,
        "refused_by_metrics": second["refused"] - first["refused"], "alone_s": alone, "after_s": after,
        "http_cpu_share": cpu / (took + drained), "client_late_p99_s": percentile(late, 99),
        "most": dict(watch.most), "looks": watch.looks,
    }  # fmt: skip


def measure(server: Server, size: Size) -> Row:
    """The row, on a server that may have other settings."""
    row = Row("L3", TITLE)
    # The tiniest model's short answers would be served faster than a busy machine sends requests.
    asks = make_asks(size.of(12, 4), 64 if size.fraction else 600)
    server.wait_idle()
    whole = asyncio.run(references(server, asks))
    sent, row.figures = asyncio.run(drive(server, asks, size, Watch()))
    server.wait_idle()
    leaks, said = server.leaks(), server.said
    row.figures |= {name: server.settings[name] for name in ("max_inflight_per_engine", "max_queue")}
    _checks(row, sent, whole)
    row.check_leaks(leaks)
    row.check_log(said)
    return row


def run(size: Size) -> Row:
    """The row, on a server of its own."""
    # A model so small that HTTP is most of the work would be no overload of the engine.
    model = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 6, "num_attention_heads": 8}
    with tiny_folder(**model) as folder, serving(folder, **settings(size)) as server:
        return measure(server, size)


def _checks(row: Row, sent: Sent, whole: list[dict[str, Any]]) -> None:
    figures = row.figures
    refused = [entry for _, entry in sent if entry.status == 429]
    served = [(place, entry) for place, entry in sent if entry.status == 200]
    waits = [entry.seconds for entry in refused]
    figures |= {"served": len(served), "refused": len(refused)}
    times = figures["sent_rps"] / figures["capacity_rps"]
    row.check(
        f"{TIMES} times the load is sent, and some of it refused",
        f"{figures['sent']} at {figures['sent_rps']:.0f}/s, {times:.1f} × {figures['capacity_rps']:.0f}/s; "
        f"{len(refused)} refused",
        bool(refused),
    )
    row.check(
        "the load that was sent is at least 3.5 times what it can take",
        f"{times:.2f}",
        times >= 3.5,
        timed=True,
    )
    other = Counter(entry.status for _, entry in sent if entry.status not in (200, 429))
    row.check("every request is served or gets 429", dict(other) or "all", not other)
    told = [
        entry for entry in refused if (entry.retry_after or "").isdigit() and int(entry.retry_after or 0) >= 1
    ]
    row.check(
        "each 429 has a Retry-After of whole seconds", f"{len(told)} of {len(refused)}", told == refused
    )
    if waits:
        p99 = figures["refusal_p99_s"] = percentile(waits, 99)
        figures["refusal_p50_s"], figures["refusal_max_s"] = statistics.median(waits), max(waits)
        row.check(
            f"p99 of a refusal, connecting included, under {REFUSAL_SECONDS * 1e3:.0f} ms",
            f"{p99 * 1e3:.1f} ms (median {statistics.median(waits) * 1e3:.1f}, most {max(waits) * 1e3:.1f}; "
            f"the client's own lateness {figures['client_late_p99_s'] * 1e3:.1f}; "
            f"the HTTP process had {figures['http_cpu_share']:.0%} of a core)",
            p99 < REFUSAL_SECONDS,
            timed=True,
        )
    row.check(
        "the server counts as many refusals",
        f"{figures['refused_by_metrics']} and {len(refused)}",
        figures["refused_by_metrics"] == len(refused),
    )
    most, batch, queue = figures["most"], figures["max_inflight_per_engine"], figures["max_queue"]
    row.check(
        f"never more than {batch} + {queue} requests in the server ({figures['looks']} looks)",
        most,
        0 < most.get("together", 0) <= batch + queue,
    )
    bad = [
        fault for place, entry in served for fault in (*entry.faults(), *entry.differences(0, whole[place]))
    ]
    row.check(
        f"all {len(served)} accepted requests complete, with the ids they have alone",
        "; ".join(bad[:3])[:300] or "all",
        not bad and bool(served),
    )
    before, after = statistics.median(figures["alone_s"]), statistics.median(figures["after_s"])
    row.check(
        f"{RECOVERY_SECONDS:g} s after the last request, one alone takes at most {SLOWER:g} × what it did",
        f"{after * 1e3:.0f} ms, before {before * 1e3:.0f} ms; all served after {figures['drained_s']:.1f} s",
        after <= SLOWER * before,
        timed=True,
    )
