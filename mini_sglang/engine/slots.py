"""An engine's place in the pool: its handle, its restarts and the totals that outlive them."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields

from mini_sglang.engine.cache_limits import CACHE_TOTALS
from mini_sglang.engine.counters import EngineCounters
from mini_sglang.engine.handle import EngineHandle, EngineInfo

logger = logging.getLogger(__name__)

# Seconds before an engine that died is started again: doubled each time, back to the first after it
# was well for a while.
FIRST_BACKOFF = 0.5
LONGEST_BACKOFF = 30.0
HEALTHY_AFTER = 60.0
_CLOSE_SECONDS, _HURRIED_SECONDS = 15.0, 1.0
_SAVE_SECONDS = 130.0  # where engines save their prefix caches
_LOOK_SECONDS = 0.02

_TOTALS = (
    *(spec.name for spec in fields(EngineCounters)),
    "prefix_evicted_tokens",
    "retractions",
    "speculation_switched_off",
    *CACHE_TOTALS,
)


@dataclass(frozen=True, slots=True)
class EngineStats:
    """One engine as the pool sees it.

    ``state`` is "starting", "ready", "dead" (it is started again in ``restart_in`` seconds) or "closed".
    ``counters`` is what the engine last said (``EngineCore.stats``), its totals carried over restarts.
    """

    index: int
    state: str
    inflight: int
    restarts: int
    failure: str | None
    restart_in: float
    counters: dict[str, int]


class EngineSlot:
    """State of one engine of the pool, which guards it by its lock.

    ``opened`` is set while the handle has been seen ready; ``refused`` where it then would not take a
    request, so that nothing is sent there until its death shows.
    """

    def __init__(self, index: int) -> None:
        self.index = index
        self.handle: EngineHandle | None = None
        self.opened = False
        self.refused = False
        self.inflight = 0
        self.restarts = -1  # the first start is none
        self.failure: str | None = None
        self.start_at = 0.0
        self._failures = 0
        self._ready_since = 0.0
        self._carried: dict[str, int] = {}

    @property
    def usable(self) -> bool:
        return self.opened and not self.refused and self.handle is not None and self.handle.state == "ready"

    @property
    def state(self) -> str:
        if self.handle is None:
            return "dead" if self.restarts >= 0 else "starting"
        return self.handle.state

    @property
    def never_started(self) -> bool:
        """Whether it failed before it was ready even once."""
        return self._ready_since == 0.0 and self.failure is not None

    def started(self, handle: EngineHandle | None, failure: str | None, now: float) -> None:
        """A handle was made, or could not be."""
        self.handle, self.opened, self.refused = handle, False, False
        self.restarts += 1
        if handle is None:
            self._fail(failure, now)

    def ready(self, now: float) -> None:
        self.opened = True
        self._ready_since = now or 1e-9
        self.failure = None

    def died(self, now: float) -> None:
        """Let go of a dead handle and set the time of the next start."""
        handle = self.handle
        assert handle is not None
        if self.opened and now - self._ready_since >= HEALTHY_AFTER:
            self._failures = 0
        for name, value in handle.stats().items():
            if name in _TOTALS:
                self._carried[name] = self._carried.get(name, 0) + value
        self.handle, self.opened = None, False
        self._fail(handle.failure, now)

    def stats(self, now: float) -> EngineStats:
        counters = dict(self._carried)
        for name, value in (self.handle.stats() if self.handle is not None else {}).items():
            counters[name] = value + self._carried.get(name, 0)
        waits = max(0.0, self.start_at - now) if self.state == "dead" else 0.0
        restarts = max(0, self.restarts)
        return EngineStats(self.index, self.state, self.inflight, restarts, self.failure, waits, counters)

    def _fail(self, failure: str | None, now: float) -> None:
        backoff = min(LONGEST_BACKOFF, FIRST_BACKOFF * 2**self._failures)
        self._failures = min(self._failures + 1, 16)
        self.failure = failure or f"engine {self.index} died"
        self.start_at = now + backoff
        # A first start that fails everywhere ends the server, which then says why: once is enough.
        level = logging.INFO if self.never_started and self.restarts == 0 else logging.ERROR
        logger.log(level, "%s; it is started again in %.1f s", self.failure.rstrip("."), backoff)


class EngineSlots:
    """The engines of a pool: starts each, and again when it has died and its back-off is over.

    Args:
        make_handle: starts the engine of this number and returns at once, while it loads.
        lock: the pool's, which guards the slots. ``start_due`` takes it, the other methods need it held or,
            for what only reads, do without.
        wake: called, in threads of the engines, when ``refresh`` may find something.
        saving: whether engines have something to save at their end.
    """

    def __init__(
        self,
        make_handle: Callable[[int], EngineHandle],
        count: int,
        lock: threading.Lock,
        wake: Callable[[], None],
        saving: bool = False,
    ) -> None:
        self._saving = saving
        self._make_handle = make_handle
        self._slots = [EngineSlot(index) for index in range(count)]
        self._lock = lock
        self._wake = wake

    def __iter__(self) -> Iterator[EngineSlot]:
        return iter(self._slots)

    def __len__(self) -> int:
        return len(self._slots)

    def __getitem__(self, index: int) -> EngineSlot:
        return self._slots[index]

    def starts(self) -> list[float]:
        """When engines are to be started."""
        return [slot.start_at for slot in self._slots if slot.handle is None]

    def start_due(self, clock: Callable[[], float]) -> None:
        """Start every engine whose time has come, side by side."""
        for slot in self._slots:
            if slot.handle is not None or slot.start_at > clock():
                continue
            handle, failure = None, None
            try:
                handle = self._make_handle(slot.index)
                handle.watch(self._wake)
            except Exception as error:
                logger.exception("engine %d could not be started", slot.index)
                failure = f"engine {slot.index} could not be started: {error}"
            with self._lock:
                slot.started(handle, failure, clock())

    def kill(self, why: str) -> None:
        """Have every engine die at once. Not under the lock."""
        for handle in self._handles():
            handle.kill(why)

    def close(self, hurry: threading.Event) -> None:
        """Close every engine side by side; not under the lock.

        One that does not end within 15 s (130 s where it may save), 1 s once ``hurry`` is set, is left:
        a process is killed before, a thread in the midst of a step cannot be.
        """
        closers = [threading.Thread(target=handle.close, daemon=True) for handle in self._handles()]
        for closer in closers:
            closer.start()
        deadline = time.monotonic() + (_SAVE_SECONDS if self._saving else _CLOSE_SECONDS)
        while any(closer.is_alive() for closer in closers) and time.monotonic() < deadline:
            if hurry.wait(_LOOK_SECONDS):
                deadline = min(deadline, time.monotonic() + _HURRIED_SECONDS)
                break
        for closer in closers:
            closer.join(max(0.0, deadline - time.monotonic()))

    def _handles(self) -> list[EngineHandle]:
        with self._lock:
            return [slot.handle for slot in self._slots if slot.handle is not None]

    def refresh(self, now: float) -> tuple[list[tuple[EngineSlot, EngineInfo]], list[EngineHandle]]:
        """Look at every handle: which engines are newly ready, and handles found dead, for closing."""
        opened: list[tuple[EngineSlot, EngineInfo]] = []
        dead: list[EngineHandle] = []
        for slot in self._slots:
            handle = slot.handle
            if handle is None:
                continue
            if handle.state == "ready" and not slot.opened:
                slot.ready(now)
                opened.append((slot, handle.info))
            elif handle.state == "dead":
                slot.died(now)
                dead.append(handle)
        return opened, dead
