"""Sends sessions at their planned times, or as many at once as there are places, and keeps what came."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mini_sglang.bench.load.datasets import Dialogue, Session, Turn
from mini_sglang.bench.wire.base import Ask
from mini_sglang.bench.wire.client import Answer

Send = Callable[[Ask], Awaitable[Answer]]


@dataclass(frozen=True)
class Request:
    """One request and what came of it; all times in seconds from the start of the load."""

    id: int
    session: int
    turn: int
    planned: float
    sent: float
    first_byte: float | None
    times: tuple[float, ...]
    counted: bool
    asked_tokens: int
    prompt_tokens: int | None
    output_tokens: int | None
    cached_tokens: int | None
    end: float
    finish: str | None
    error: str | None
    detail: str

    @property
    def first(self) -> float | None:
        return self.times[0] if self.times else None

    def as_json(self) -> dict[str, Any]:
        found = {name: getattr(self, name) for name in self.__dataclass_fields__}
        found["times"] = [round(time, 6) for time in self.times]
        return {**found, "first": self.first}


@dataclass
class Load:
    """A run. ``duration``: from its start to the last answer's end. ``unfinished``: begun, then given up."""

    requests: list[Request] = field(default_factory=list)
    duration: float = 0.0
    unfinished: int = 0
    interrupted: bool = False


class Generator:
    """Runs one load.

    Args:
        send: asks the server.
        form: in which prompts are given: ``ids``, ``text`` or ``messages``.
        asked: what else every ``Ask`` has.
        done: is told of each request that ended.
    """

    def __init__(
        self,
        send: Send,
        form: str,
        asked: Mapping[str, Any],
        done: Callable[[Request], None] = lambda request: None,
    ) -> None:
        self._send = send
        self._form = form
        self._asked = asked
        self._done = done
        self._load = Load()
        self._numbers = itertools.count()
        self._sessions = itertools.count()
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopped = asyncio.Event()
        self._start = 0.0
        self._until: float | None = None

    def stop(self) -> None:
        """Send nothing more, and give up what is on its way."""
        self._load.interrupted = True
        self._stopped.set()

    async def open_loop(self, times: Sequence[float], sessions: Iterable[Session]) -> Load:
        """Start each session at its time, however the others are doing."""
        self._begin()
        for planned, session in zip(times, sessions, strict=False):
            if not await self._wait(planned):
                break
            task = asyncio.ensure_future(self._run(session, planned))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await self._end()

    async def closed_loop(
        self, places: int, sessions: Iterator[Session], duration: float | None = None
    ) -> Load:
        """Keep ``places`` sessions going, until there are no more or ``duration`` seconds have passed."""
        self._begin()
        self._until = duration

        async def place() -> None:
            while not self._over():
                session = next(sessions, None)
                if session is None:
                    return
                await self._run(session, self._now())

        self._tasks = {asyncio.ensure_future(place()) for _ in range(places)}
        return await self._end()

    def _begin(self) -> None:
        self._start = asyncio.get_running_loop().time()

    def _now(self) -> float:
        return asyncio.get_running_loop().time() - self._start

    def _over(self) -> bool:
        return self._stopped.is_set() or (self._until is not None and self._now() >= self._until)

    async def _wait(self, until: float) -> bool:
        """Whether that time came before the load was stopped."""
        seconds = until - self._now()
        if seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await self._stopped.wait()
            except TimeoutError:
                pass
        else:
            # Behind: whoever has something to receive comes first, and this goes out late, as it is counted.
            await asyncio.sleep(0)
        return not self._stopped.is_set()

    async def _end(self) -> Load:
        waiting = asyncio.ensure_future(self._stopped.wait())
        try:
            while self._tasks:
                done, _ = await asyncio.wait({*self._tasks, waiting}, return_when=asyncio.FIRST_COMPLETED)
                for task in done - {waiting}:
                    self._tasks.discard(task)
                    task.result()
                if waiting in done:
                    break
        finally:
            waiting.cancel()
            left = list(self._tasks)
            for task in left:
                task.cancel()
            await asyncio.gather(*left, waiting, return_exceptions=True)
        ends = [request.end for request in self._load.requests]
        self._load.duration = self._now() if self._load.interrupted else max(ends, default=0.0)
        self._load.requests.sort(key=lambda request: request.id)
        return self._load

    async def _run(self, session: Session, planned: float) -> None:
        number = next(self._sessions)
        dialogue = Dialogue(self._form)
        for place, turn in enumerate(session.turns):
            if place and (not await self._wait(planned) or self._over()):
                return
            request, answer = await self._request(turn, dialogue, number, place, planned)
            self._load.requests.append(request)
            self._done(request)
            if request.error is not None or not dialogue.heard(answer.text, answer.ids):
                return
            if place + 1 < len(session.turns):
                planned = request.end + session.turns[place + 1].think

    async def _request(
        self, turn: Turn, dialogue: Dialogue, session: int, place: int, planned: float
    ) -> tuple[Request, Answer]:
        number = next(self._numbers)
        ask = Ask(turn.new_tokens, **dialogue.ask(turn.content), **self._asked)
        try:
            answer = await self._send(ask)
        except asyncio.CancelledError:
            self._load.unfinished += 1
            raise
        since = self._start
        return Request(
            id=number,
            session=session,
            turn=place,
            planned=planned,
            sent=answer.sent - since,
            first_byte=None if answer.first_byte is None else answer.first_byte - since,
            times=tuple(time - since for time in answer.times),
            counted=answer.counted,
            asked_tokens=turn.new_tokens,
            prompt_tokens=answer.prompt_tokens,
            output_tokens=answer.output_tokens,
            cached_tokens=answer.cached_tokens,
            end=answer.end - since,
            finish=answer.finish,
            error=answer.error,
            detail=answer.detail,
        ), answer
