"""Engines that do what a test tells them, behind the face of ``EngineHandle``, and a clock that it sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from mini_sglang.config import Settings
from mini_sglang.engine.handle import ENGINE_DIED, NOT_STARTED, EngineInfo, Sink, Work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.engine.routing import Router
from mini_sglang.errors import EngineError
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

INFO = EngineInfo({"model": "fake"}, (0, 1), 40, 4096, 4096, 16, 8192)


def work(name: str, prompt: Sequence[int] = (2, 3, 4), namespace: str = "") -> Work:
    return Work(name, tuple(prompt), SamplingParams(seed=1), 8, namespace=namespace)


@dataclass
class Clock:
    now: float = 100.0

    def __call__(self) -> float:
        return self.now


class FakeHandle:
    """Starts when told ``open``; aborts are confirmed by ``confirm``, as an engine does between steps."""

    def __init__(self, index: int, info: EngineInfo, log: list[tuple[str, FakeHandle]]) -> None:
        self.index = index
        self._log = log
        self.state = "starting"
        self.failure: str | None = None
        self.works: dict[str, tuple[Work, Sink]] = {}
        self.started: set[str] = set()
        self.aborts: dict[str, FinishReason] = {}
        self.counters: dict[str, int] = {"requests": 0}
        self.refuses = False
        self._info = info
        self._watchers: list[Callable[[], None]] = []

    @property
    def info(self) -> EngineInfo:
        if self.state == "starting":
            raise EngineError("starting")
        return self._info

    def watch(self, callback: Callable[[], None]) -> None:
        self._watchers.append(callback)

    def submit(self, work: Work, sink: Sink) -> None:
        if self.state != "ready" or self.refuses:
            raise EngineError(self.failure or self.state)
        assert work.request_id not in self.works
        self.works[work.request_id] = (work, sink)
        self._log.append((work.request_id, self))
        self.counters["requests"] += 1

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        if request_id in self.works:
            self.aborts[request_id] = reason

    def stats(self) -> dict[str, int]:
        return dict(self.counters)

    def kill(self, why: str) -> None:
        self.die(why)

    def close(self) -> None:
        if self.state != "dead":
            self.state = "closed"
        for name in list(self.works):
            self.end(name, FinishReason.ABORT)

    # What the test does to it.

    def open(self) -> None:
        self.state = "ready"
        self._changed()

    def token(self, name: str, token: int = 5) -> None:
        self.started.add(name)
        self.works[name][1](TokenEvent(name, (token,)))

    def end(
        self,
        name: str,
        reason: FinishReason = FinishReason.LENGTH,
        error: str | None = None,
        kind: str | None = None,
    ) -> None:
        sink = self.works.pop(name)[1]
        self.aborts.pop(name, None)
        tokens = (6,) if reason is FinishReason.LENGTH else ()
        sink(TokenEvent(name, tokens, finish=reason, error=error, error_kind=kind))

    def confirm(self) -> None:
        for name, reason in list(self.aborts.items()):
            self.end(name, reason)

    def die(self, reason: str = "it was killed") -> None:
        self.state, self.failure = "dead", reason
        for name in list(self.works):
            kind = ENGINE_DIED if name in self.started else NOT_STARTED
            self.end(name, FinishReason.ERROR, reason, kind)
        self._changed()

    def _changed(self) -> None:
        for callback in self._watchers:
            callback()


@dataclass
class Inbox:
    """A sink that keeps the events and refuses anything after the end."""

    events: list[TokenEvent] = field(default_factory=list)

    def __call__(self, event: TokenEvent) -> None:
        assert not self.ended, f"{event} after {self.events[-1]}"
        self.events.append(event)

    @property
    def ended(self) -> bool:
        return bool(self.events) and self.events[-1].finish is not None

    @property
    def last(self) -> TokenEvent:
        assert self.ended
        return self.events[-1]


class Bench:
    """A pool over fake handles whose upkeep and time the test drives."""

    def __init__(self, router: Router | None = None, info: EngineInfo = INFO, **settings: object) -> None:
        settings.setdefault("num_engines", 2)
        self.clock = Clock()
        self.log: list[tuple[str, FakeHandle]] = []
        """What was sent where, in order."""
        self.info = info
        resolved = Settings.resolve(settings, {})
        self.handles: list[list[FakeHandle]] = [[] for _ in range(resolved.num_engines)]
        self.pool = EnginePool(self._make, resolved, clock=self.clock, router=router, background=False)
        self.inboxes: dict[str, Inbox] = {}

    def _make(self, index: int) -> FakeHandle:
        handle = FakeHandle(index, self.info, self.log)
        self.handles[index].append(handle)
        return handle

    def __getitem__(self, index: int) -> FakeHandle:
        """The engine that runs now in this place."""
        return self.handles[index][-1]

    def open(self) -> Bench:
        """Start every engine that is due, and have it ready."""
        self.pool.tick()
        for handles in self.handles:
            if handles and handles[-1].state == "starting":
                handles[-1].open()
        self.pool.tick()
        return self

    def after(self, seconds: float) -> None:
        self.clock.now += seconds
        self.pool.tick()

    def submit(self, name: str, prompt: Sequence[int] = (2, 3, 4), namespace: str = "") -> Inbox:
        with self.pool.reserve() as ticket:
            inbox = self.inboxes[name] = Inbox()
            self.pool.submit(work(name, prompt, namespace), inbox, ticket)
        return inbox

    def where(self, name: str) -> int | None:
        """The engine that has the request now."""
        return next((i for i, handles in enumerate(self.handles) if name in handles[-1].works), None)
