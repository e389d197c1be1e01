"""L1: many streams at once, of every API and length, with a ledger of every token."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import string
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from benchmarks.reliability.client import ask as fetch
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import Server, serving

TITLE = "many streams, every token accounted for"
CLIENTS, SECONDS = 256, 180.0
SHORTEST, LONGEST = 16, 4096
_SHOWN = 20
_LETTERS = string.ascii_letters + string.digits + "    .,"


def make_asks(count: int, longest: int, seed: int = 1) -> list[Ask]:
    """Requests of all kinds, with prompts of ``SHORTEST`` to ``longest`` tokens, half with a shared prefix.

    A text of n ASCII letters is n tokens of the tiny model. Lengths are uniform in their logarithm, so that
    there are as many from 16 to 64 as from 1,024 to 4,096.
    """
    rng = random.Random(seed)

    def text(length: int) -> str:
        return "".join(rng.choices(_LETTERS, k=length))

    shared = [text(longest) for _ in range(6)]
    asks = []
    for number in range(count):
        length = round(SHORTEST * (longest / SHORTEST) ** rng.random())
        prompt = text(length)
        if number % 2:
            prompt = (rng.choice(shared)[: max(1, length - SHORTEST)] + text(SHORTEST))[:length]
        api = ("generate", "completions", "chat")[number % 3]
        prompts: tuple[str | tuple[int, ...], ...] = (prompt,)
        if api != "chat" and rng.random() < 0.2:
            prompts = (tuple(rng.randrange(3, 259) for _ in range(length)),)
        if api != "chat" and rng.random() < 0.15:
            prompts = (prompts[0], text(SHORTEST)) if isinstance(prompts[0], str) else (*prompts, (7, 8, 9))
        sampled = rng.random() < 0.5
        ends = rng.random() < 0.3
        asks.append(
            Ask(
                api,
                prompts,
                rng.randint(8, 96),
                temperature=0.8 if sampled else 0.0,
                seed=number,
                ignore_eos=not ends,
                told=rng.random() < 0.7,
                sse=api == "generate" and rng.random() < 0.3,
                # So that a random model comes to its end of text now and then.
                extra=(("logit_bias", {"2": 6}),) if ends else (),
            )
        )
    return asks


@dataclass(slots=True)
class Books:
    """What all requests together came to."""

    entries: int = 0
    streamed: int = 0
    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    ids_compared: int = 0
    finishes: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    differences: list[str] = field(default_factory=list)

    def usage(self, prompt: int, completion: int, cached: int) -> None:
        self.prompt_tokens += prompt
        self.completion_tokens += completion
        self.cached_tokens += cached

    def add(self, number: int, entry: Entry, references: list[dict[str, Any]]) -> None:
        """Note a response, held against the whole answers of the same request."""
        self.entries += 1
        self.streamed += entry.streamed
        kind = f"request {number} ({entry.ask.api}, {'streamed' if entry.streamed else 'whole'})"
        found = [] if entry.status == 200 or entry.broken else [f"status {entry.status}: {entry.errors}"]
        self.faults += [f"{kind}: {fault}" for fault in found or entry.faults()]
        for usage in entry.usages:
            self.usage(*usage)
        for index, reference in enumerate(references):
            self.differences += [f"{kind}: {one}" for one in entry.differences(index, reference)]
            answer = entry.answers.get(index)
            if answer is not None:
                self.answers += 1
                self.finishes.update(answer.finishes)
                self.ids_compared += len(answer.ids or ())

    def add_reference(self, answer: dict[str, Any]) -> None:
        self.answers += 1
        self.finishes[answer["finish_reason"]] += 1
        self.usage(answer["prompt_tokens"], answer["completion_tokens"], answer["cached_tokens"])


async def drive(server: Server, asks: list[Ask], streams: int, seconds: float, rounds: int) -> Books:
    """Keep ``streams`` clients busy for ``seconds`` and until each request was made ``rounds`` times.

    One request in eight is not streamed. The whole answer that the others are held against is asked for
    under the same load.
    """
    books = Books()
    numbers = itertools.count()
    references: dict[int, asyncio.Task[list[dict[str, Any]]]] = {}
    until = time.perf_counter() + seconds

    async def reference(one: Ask) -> list[dict[str, Any]]:
        found = []
        for index in range(len(one.prompts)):
            status, _, body = await fetch(server.port, "/generate", one.reference(index))
            if status != 200:
                raise RuntimeError(f"a whole answer was refused: {status} {body[:300]!r}")
            found.append(json.loads(body))
            books.add_reference(found[-1])
        return found

    async def client() -> None:
        while True:
            number = next(numbers)
            if number >= rounds * len(asks) and time.perf_counter() >= until:
                return
            place = number % len(asks)
            first = place not in references
            # Before or after the stream: the prefix is cached by one or by the other.
            if first and number % 2:
                references[place] = asyncio.ensure_future(reference(asks[place]))
                await references[place]
            entry = await keep(server.port, asks[place], stream=number % 8 != 5)
            if place not in references:
                references[place] = asyncio.ensure_future(reference(asks[place]))
            books.add(number, entry, await references[place])

    await asyncio.gather(*(client() for _ in range(streams)))
    return books


def settings(size: Size) -> dict[str, Any]:
    """Of the server: two engines, whose pools are too small for all that is asked at once."""
    return {
        "num_engines": 2, "scheduler_mode": "cache_aware", "max_batch_size": 128, "max_queue": 4 * CLIENTS,
        "queue_timeout": 600, "kv_token_budget": 1 << 14,
    }  # fmt: skip


def measure(server: Server, size: Size) -> Row:
    """The row, on a server that may have other settings."""
    row = Row("L1", TITLE)
    streams = size.of(CLIENTS, 16)
    asks = make_asks(size.of(600, 24), LONGEST if size.fraction else 256)
    server.wait_idle()
    before = server.metrics()
    started = time.perf_counter()
    books = asyncio.run(drive(server, asks, streams, size.seconds(SECONDS, 0), 2))
    seconds = time.perf_counter() - started
    server.wait_idle()
    after, leaks, said = server.metrics(), server.leaks(), server.said
    row.figures = {
        "streams": streams, "seconds": seconds, "requests": books.entries, "streamed": books.streamed,
        "answers": books.answers, "prompt_tokens": books.prompt_tokens,
        "completion_tokens": books.completion_tokens, "cached_tokens": books.cached_tokens,
        "ids_compared": books.ids_compared, "finishes": dict(books.finishes),
        "retractions": _grown(before, after, "retractions"),
        "faults": books.faults[:_SHOWN], "differences": books.differences[:_SHOWN],
    }  # fmt: skip
    _checks(row, books, before, after)
    row.check_leaks(leaks)
    row.check_log(said)
    return row


def run(size: Size) -> Row:
    """The row, on a server of its own."""
    with serving(**settings(size)) as server:
        return measure(server, size)


def _checks(row: Row, books: Books, before: dict[str, Any], after: dict[str, Any]) -> None:
    row.check(
        f"{books.entries} requests by {row.figures['streams']} clients: one finish reason, one [DONE], "
        "usage = the ids that came, nothing after the end",
        _few(books.faults) or "all",
        not books.faults and books.entries > 0,
    )
    row.check(
        f"every answer = the whole answer of the same request ({books.ids_compared} ids, texts of all)",
        _few(books.differences) or "all",
        not books.differences and books.ids_compared > 0,
    )
    for name in ("prompt_tokens", "completion_tokens", "cached_tokens"):
        counted, kept = after[name] - before[name], getattr(books, name)
        row.check(f"the server's {name} = the sum of all usage", f"{counted} and {kept}", counted == kept)
    decoded = _grown(before, after, "decode_tokens")
    made = decoded + books.answers
    row.check(
        "tokens the engines decoded, and one of each answer's prefill = completion tokens",
        f"{made} and {books.completion_tokens}",
        made == books.completion_tokens,
    )
    outcomes = Counter(after["requests"])
    outcomes.subtract(before["requests"])
    ended = {name: count for name, count in outcomes.items() if count}
    row.check("the server's outcomes = the finish reasons", ended, ended == dict(books.finishes))
    row.check("shared prefixes were in the cache", f"{books.cached_tokens} tokens", books.cached_tokens > 0)


def _grown(before: dict[str, Any], after: dict[str, Any], name: str) -> int:
    new, old = (sum(int(one[name]) for one in found["engines"]) for found in (after, before))
    return new - old


def _few(faults: list[str]) -> str:
    shown = "; ".join(faults[:3])
    return f"{len(faults)}: {shown}"[:400] if faults else ""
