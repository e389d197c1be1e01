"""The rounds of a comparison over HTTP: one server at a time, started for each round and ended after it.

So no server waits by spinning, or holds memory, while another is measured, and each round's order is that of
the last turned round. What a start costs is in the table.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from mini_sglang.bench.compare import WARM_NEW, rest
from mini_sglang.bench.machine import busy_seconds
from mini_sglang.bench.process import PeerError
from mini_sglang.bench.server_process import ServerProcess
from mini_sglang.bench.server_runs import Burst, HttpRun, burst_of, read_answer
from mini_sglang.bench.server_sides import ServerSide
from mini_sglang.bench.sides import Side
from mini_sglang.bench.usage import Usage
from mini_sglang.bench.wire.base import Ask, WireError
from mini_sglang.bench.wire.client import Answer, Client
from mini_sglang.bench.wire.detect import detect

WARM_BURST = 8
"""New tokens of each answer in the warm-up's burst."""
BURSTS = 1000
"""Openings of a round's burst are numbered from the round times this; rounds themselves are below."""


@dataclass
class Place:
    """A side and what came of it.

    Attributes:
        runs, bursts: of its rounds.
        reason: why its single stream does not count; it then has no burst either.
        burst_reason: why its burst does not.
    """

    side: Side
    runs: list[HttpRun] = field(default_factory=list)
    bursts: list[Burst] = field(default_factory=list)
    reason: str | None = None
    burst_reason: str | None = None
    starts: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class ServerComparison:
    """How servers are compared.

    Args:
        prompt: the ids of a turn (from 0) after an opening's number.
        text: of ids, with special tokens as text, for servers that take no ids.
        base: added to the numbers of openings; other than 0 where a server may have seen the others before.
        concurrency: answers of a burst; 0 for none.
        limit: seconds that an answer may take.
    """

    prompt: Callable[[int, int], list[int]]
    text: Callable[[Sequence[int]], str]
    turns: int
    new: int
    rounds: int
    concurrency: int
    limit: float
    base: int = 0
    wait: float = 0.0
    step: Callable[[str], None] = lambda line: None

    def run(self, sides: Sequence[Side]) -> list[Place]:
        """All rounds of a group; a side that fails does not take part any more, and the others go on."""
        places = [Place(side, reason=side.missing) for side in sides]
        for number in range(1, self.rounds + 1):
            for place in places if number % 2 else places[::-1]:
                if place.reason is None:
                    assert isinstance(place.side, ServerSide)
                    self._round(place, place.side, number)
        return places

    def _round(self, place: Place, side: ServerSide, number: int) -> None:
        try:
            with self._server(place, side) as (url, usage):
                asyncio.run(self._measure(place, side, url, usage, number))
        except (PeerError, WireError) as error:
            place.reason = str(error).removeprefix(f"{side.name}: ")

    @contextmanager
    def _server(self, place: Place, side: ServerSide) -> Iterator[tuple[str, Usage | None]]:
        if side.url is not None:
            yield side.url, None
            return
        self.step(f"{side.name}: starting")
        server: ServerProcess = side.serve()
        try:
            place.starts.append(server.start_seconds)
            yield server.url, server.usage
        finally:
            server.close()

    async def _measure(
        self, place: Place, side: ServerSide, url: str, usage: Usage | None, number: int
    ) -> None:
        # A server started here is asked for by its weights' path; some have no other name for them.
        model, base = str(side.path), url
        if usage is None:
            found = await detect(url, side.dialect.name)
            model, base = found.model or "", found.url
        client = Client(base, timeout=self.limit)
        asker = _Asker(self, side, client, model or None, usage)
        try:
            self.step(f"{side.name}: warm-up of round {number}")
            warm = await asker.one(0, 0, min(self.new, WARM_NEW), 0)
            if warm.reason:
                place.reason = warm.reason
                return
            for turn in range(self.turns):
                self.step(f"{side.name}: round {number}, turn {turn + 1}")
                rest(self.wait)
                run = await asker.one(number, turn, self.new, number)
                place.runs.append(run)
                place.reason = place.reason or run.reason
            if self.concurrency and place.reason is None and place.burst_reason is None:
                await asker.burst(0, min(self.new, WARM_BURST))
                self.step(f"{side.name}: round {number}, {self.concurrency} at once")
                rest(self.wait)
                burst = await asker.burst(number, self.new)
                place.bursts.append(burst)
                place.burst_reason = burst.reason
        finally:
            client.close()


@dataclass
class _Asker:
    """Asks one server, and notes what the machine did meanwhile."""

    comparison: ServerComparison
    side: ServerSide
    client: Client
    model: str | None
    usage: Usage | None

    async def one(self, number: int, turn: int, new: int, round: int) -> HttpRun:
        return (await self._runs([number], turn, new, round))[1][0]

    async def burst(self, round: int, new: int) -> Burst:
        numbers = [BURSTS * (round + 1) + place for place in range(self.comparison.concurrency)]
        answers, runs = await self._runs(numbers, 0, new, round)
        burst = burst_of(answers, runs)
        for name in ("cpu_seconds", "peak_bytes", "others"):
            setattr(burst, name, getattr(runs[0], name))
        return burst

    async def _runs(
        self, numbers: Sequence[int], turn: int, new: int, round: int
    ) -> tuple[list[Answer], list[HttpRun]]:
        compared, side = self.comparison, self.side
        prompts = [compared.prompt(compared.base + number, turn) for number in numbers]
        asks = [self._ask(prompt, new) for prompt in prompts]
        worked, own, busy, begun = self._worked(), time.process_time(), busy_seconds(), time.perf_counter()
        answers = await asyncio.gather(*(self.client.ask(side.dialect, ask) for ask in asks))
        wall = time.perf_counter() - begun
        busy, own = busy_seconds() - busy, time.process_time() - own
        worked = self._worked() - worked
        runs = [
            read_answer(
                answer,
                peer=side.name,
                group=side.group,
                round=round,
                turn=turn + 1,
                prompt=prompt,
                new=new,
                number=compared.base + number,
            )
            for answer, prompt, number in zip(answers, prompts, numbers, strict=True)
        ]
        for run in runs:
            run.cpu_seconds = worked
            run.peak_bytes = self.usage.peak_bytes() if self.usage else 0
            # What a server at a URL works is not known, so neither is what others do.
            run.others = max(0.0, busy - worked - own) / wall if self.usage else 0.0
        return list(answers), runs

    def _ask(self, prompt: list[int], new: int) -> Ask:
        if "ids" in self.side.dialect.takes:
            return Ask(new, ids=prompt, model=self.model)
        return Ask(new, text=self.comparison.text(prompt), model=self.model)

    def _worked(self) -> float:
        return self.usage.cpu_seconds() if self.usage else 0.0
