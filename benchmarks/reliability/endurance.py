"""L4: ten thousand requests of every kind, after which the server holds what it held before them."""

from __future__ import annotations

import asyncio
import contextlib
import random
import statistics
from collections import Counter
from typing import Any

from benchmarks.reliability.client import ask as fetch
from benchmarks.reliability.ledger import Ask, keep
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import HangError, Held, Server, held_json, serving, settle

TITLE = "what is held before and after many requests"
REQUESTS, CLIENTS = 10_000, 32
SAMPLES = 40
# A request that left 1 KiB behind would show as 5 MB over the second half of 10,000; allocators move by less.
LEAK_BYTES = 1024
SLACK_BYTES = 4 << 20
# A dict or a task left behind by one request in ten.
LEAK_OBJECTS = 0.1
SLACK_OBJECTS = 2000
_SHOWN = 20
# For what has just been given back to show.
_SETTLE_SECONDS = 20.0

# What is refused, each before and after work was done for it.
BAD: tuple[tuple[str, Any, int], ...] = (
    ("/generate", {"prompt": "x", "temperature": 9}, 400),
    ("/generate", {"prompt": [100_000]}, 400),
    ("/generate", {"prompt": "x", "regex": "("}, 400),
    ("/v1/chat/completions", {"messages": []}, 400),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "another"}, 404),
    ("/v1/completions", {"prompt": "x" * 10_000}, 400),
    ("/nowhere", {}, 404),
    ("/metrics", {}, 405),
)
GOOD: tuple[tuple[str, Any], ...] = (
    ("/tokenize", {"prompt": "some text"}),
    ("/detokenize", {"tokens": [40, 41, 42]}),
    ("/v1/responses", {"input": "hello", "max_output_tokens": 8, "ignore_eos": True}),
    ("/generate", {"prompt": "x", "regex": "[ab]{4,8}", "max_new_tokens": 12}),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "n": 2, "max_tokens": 6}),
)


class Mix:
    """Requests of every kind, one after the other, and what was wrong with their answers."""

    def __init__(self, server: Server, seed: int) -> None:
        self._server = server
        self._rng = random.Random(seed)
        self.kinds: Counter[str] = Counter()
        self.faults: list[str] = []

    async def one(self, number: int) -> None:
        rng, port = self._rng, self._server.port
        if number % 10 == 3:
            path, body, expected = BAD[number // 10 % len(BAD)]
            status = (await fetch(port, path, body))[0]
            self._note(f"{path} {expected}", status == expected, status)
        elif number % 10 == 7:
            path, body = GOOD[number // 10 % len(GOOD)]
            status, _, found = await fetch(port, path, body)
            # Whether a grammar is compiled in time depends on how busy the machine is.
            ok = status == 200 or (status == 400 and b"to compile" in found)
            self._note(path, ok, (status, found[:100]))
        else:
            api = ("generate", "completions", "chat")[number % 3]
            prompt = "".join(rng.choices("abcdefghijklm ", k=rng.randint(8, 100)))
            prompts = (prompt, "and another") if api != "chat" and number % 16 == 0 else (prompt,)
            ask = Ask(api, prompts, rng.randint(1, 12), temperature=0.9, seed=number, told=number % 4 == 0)
            entry = await keep(port, ask, stream=number % 5 != 0)
            self._note(api, entry.status == 200 and not entry.faults(), (entry.status, entry.faults()))

    async def many(self, numbers: range) -> None:
        """Those of these numbers, by ``CLIENTS`` clients."""
        left = iter(numbers)

        async def client() -> None:
            for number in left:
                await self.one(number)

        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    def _note(self, kind: str, ok: bool, seen: object) -> None:
        self.kinds[kind] += 1
        if not ok:
            self.faults.append(f"{kind}: {seen}")


def settings(size: Size) -> dict[str, Any]:
    """Of the server: a KV pool and stores so small that the warm-up fills them."""
    return {
        "kv_token_budget": 1 << 12,
        "max_batch_size": 16,
        "queue_timeout": 600,
        "responses_store_size": 16,
    }


def measure(server: Server, size: Size) -> Row:
    """The row, on a server with a probe that may have other settings."""
    row = Row("L4", TITLE)
    total = size.of(REQUESTS, 160)
    warm = max(80, total // 5)
    mix = Mix(server, 5)
    server.wait_idle()
    asyncio.run(mix.many(range(warm)))
    server.wait_idle()
    before, inside = server.held(), server.inside()
    samples: list[list[int]] = []
    part = max(CLIENTS, (total - warm) // SAMPLES)
    for start in range(warm, total, part):
        asyncio.run(mix.many(range(start, min(total, start + part))))
        samples.append([one.rss for one in server.held()])
    server.wait_idle()
    leaks = server.leaks()
    after, inside_after = settled(server, before, inside)
    said = server.said
    row.figures = {
        "requests": total, "warm_up": warm, "kinds": dict(mix.kinds), "faults": mix.faults[:_SHOWN],
        "held_before": held_json(before), "held_after": held_json(after), "rss_samples": samples,
        "inside_before": inside, "inside_after": inside_after,
    }  # fmt: skip
    row.check(
        f"{total} requests of {len(mix.kinds)} kinds are answered as they should be",
        f"{len(mix.faults)}: {mix.faults[:2]}"[:300] if mix.faults else "all",
        not mix.faults and mix.kinds.total() == total,
    )
    row.check_leaks(leaks)
    check_held(row, before, after, inside, inside_after)
    if size.fraction:
        # Of a few requests it says nothing.
        _check_rss(row, samples, total - warm)
    grown = inside_after["objects"] - inside["objects"]
    row.check(
        f"Python objects of the HTTP process: at most {LEAK_OBJECTS:g} more a request, and {SLACK_OBJECTS}",
        f"{grown:+d} after {total - warm} requests",
        grown <= LEAK_OBJECTS * (total - warm) + SLACK_OBJECTS,
    )
    row.check_log(said)
    return row


def run(size: Size) -> Row:
    """The row, on a server of its own."""
    with serving(probe=True, **settings(size)) as server:
        return measure(server, size)


def check_held(
    row: Row, was: list[Held], now: list[Held], inside: dict[str, int], after: dict[str, int]
) -> None:
    """Descriptors, connections, threads, tasks, streams and flights, exactly.

    The HTTP process's threads are counted inside it, where those of its bounded pools can be told apart.
    """
    for index, (old, new) in enumerate(zip(was, now, strict=True)):
        who = f"engine {index - 1}" if index else "the HTTP process"
        for name in ("fds", "sockets", "threads")[: 3 if index else 2]:
            a, b = getattr(old, name), getattr(new, name)
            row.check(f"{name} of {who} exactly back", f"{b}, before {a}", a == b)
    names = ("threads", "tasks", "streams", "flights", "in_flight", "connections")
    old_counts, new_counts = ({name: found[name] for name in names} for found in (inside, after))
    row.check("no timer and no starter of a helper is left", after["passing"], not after["passing"])
    row.check(
        "threads, asyncio tasks, streams, flights and connections in a request exactly back",
        new_counts if new_counts == old_counts else f"{new_counts}, before {old_counts}",
        new_counts == old_counts,
    )


def settled(server: Server, was: list[Held], inside: dict[str, int]) -> tuple[list[Held], dict[str, int]]:
    """What is held once it is what it was, or after a while that should have been enough."""
    found: list[Any] = []

    def back() -> bool:
        found[:] = [server.held(), server.inside()]
        row = Row("", "")
        check_held(row, was, found[0], inside, found[1])
        return not row.failures()

    with contextlib.suppress(HangError):
        settle(back, "what was held", _SETTLE_SECONDS, 0.5)
    return found[0], found[1]


def _check_rss(row: Row, samples: list[list[int]], requests: int) -> None:
    """Memory from the middle of the run to its end."""
    quarter = max(1, len(samples) // 4)
    allowed = LEAK_BYTES * requests / 2 + SLACK_BYTES
    for index, name in enumerate(("the HTTP process", "the engine")):
        series = [sample[index] for sample in samples]
        middle = statistics.median(series[len(series) // 2 - quarter // 2 :][:quarter])
        end = statistics.median(series[-quarter:])
        row.check(
            f"memory of {name} flat: over the second half it grows by less than {LEAK_BYTES} bytes a request "
            f"and {SLACK_BYTES >> 20} MiB",
            f"{middle / 1e6:.1f} to {end / 1e6:.1f} MB",
            end - middle <= allowed,
        )
