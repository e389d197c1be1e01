"""Several engines behind one door: who serves a request, who waits, and what happens when one dies."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from mini_sglang.config import Settings
from mini_sglang.engine.admission import Admission
from mini_sglang.engine.flights import Flight, PoolStats, Ticket
from mini_sglang.engine.handle import (
    NOT_STARTED,
    TIMEOUT,
    UNAVAILABLE,
    EngineHandle,
    EngineInfo,
    Sink,
    Work,
    call_sink,
)
from mini_sglang.engine.order import Line, order_of
from mini_sglang.engine.pool_adapters import PoolAdapters
from mini_sglang.engine.routing import CacheAware, Candidate, Router, make_router
from mini_sglang.engine.slots import EngineSlots
from mini_sglang.errors import EngineError, InvalidValueError, OverloadedError, UnavailableError
from mini_sglang.types import FinishReason, TokenEvent

logger = logging.getLogger(__name__)

_ENDING = "the server is ending"
_CONFIRM_SECONDS = 5.0  # an engine's time to confirm aborts when the server ends
_RETRY_SECONDS = 1.0  # what Retry-After says while the server ends


class EnginePool:
    """Routes requests to engines, holds back what they cannot take, restarts those that die.

    At most MAX_INFLIGHT_PER_ENGINE requests are with an engine, by default a quarter more than it can
    batch, so that it never waits for the next; up to MAX_QUEUE more wait here, in order of priority, aged,
    and arrival (``order.order_of``). Each request that ``submit`` took gets exactly one event with
    ``finish``. When an engine dies, requests of which it had run nothing go to another, once; the others
    end with an error, since one may be why.

    Every method may be called from any thread, and from a sink.

    Args:
        make_handle: starts the engine of this number and returns at once, while it loads.
        clock: seconds; for tests.
        router: in place of the one of SCHEDULER_MODE.
        background: False for tests, which call ``tick`` themselves.
    """

    def __init__(
        self,
        make_handle: Callable[[int], EngineHandle],
        settings: Settings,
        *,
        clock: Callable[[], float] = time.monotonic,
        router: Router | None = None,
        background: bool = True,
    ) -> None:
        self._settings = settings
        self._clock = clock
        self._router = router or make_router(settings)
        self._keeps_output = isinstance(self._router, CacheAware)
        self._lock = threading.Lock()
        self._wake = threading.Event()
        saving = settings.prefix_cache_file is not None
        self._slots = EngineSlots(
            make_handle, max(1, settings.num_engines), self._lock, self._wake.set, saving
        )
        self._admission = Admission(settings, self._slots)
        self.adapters = PoolAdapters(self._lock, self._slots, settings.max_loras)
        self._changed = threading.Condition(self._lock)
        self._flights: dict[str, Flight] = {}
        self._queue: Line[Flight] = Line()
        self._serials = itertools.count()
        self._info: EngineInfo | None = None
        self._draining = False
        self._closed = False
        self._finished = False
        self._killed = threading.Event()
        self._totals = dict.fromkeys(("accepted", "ended", "refused", "timed_out", "resubmitted"), 0)
        self._thread: threading.Thread | None = None
        if background:
            self._thread = threading.Thread(target=self._run, name="mini-sglang-pool", daemon=True)
            self._thread.start()

    # What the pool is and has.

    @property
    def info(self) -> EngineInfo:
        """Of the first engine that was ready. Raises ``UnavailableError`` before that."""
        if self._info is None:
            raise _still_loading()
        return self._info

    @property
    def ready(self) -> bool:
        """Whether a request would be taken, room permitting."""
        return not self._draining and any(slot.usable for slot in self._slots)

    @property
    def state(self) -> str:
        """ "starting", "ready", "degraded" (some engines are down), "down", "draining" or "closed"."""
        if self._closed or self._draining:
            return "closed" if self._closed else "draining"
        usable = sum(slot.usable for slot in self._slots)
        if usable:
            return "ready" if usable == len(self._slots) else "degraded"
        return "starting" if self._info is None else "down"

    @property
    def in_flight(self) -> int:
        """Requests that have a place: reserved, waiting, or with an engine."""
        return len(self._flights) + self._admission.reserved

    def stats(self) -> PoolStats:
        with self._lock:
            now = self._clock()
            engines = tuple(slot.stats(now) for slot in self._slots)
            return PoolStats(
                mode=self._settings.scheduler_mode,
                state=self.state,
                engines=engines,
                reserved=self._admission.reserved,
                queued=len(self._queue),
                inflight=len(self._flights) - len(self._queue),
                longest_wait=max((now - flight.arrived for flight in self._queue), default=0.0),
                restarts=sum(engine.restarts for engine in engines),
                **self._totals,
            )

    def wait_ready(self, timeout: float | None = None) -> None:
        """Wait until an engine is ready.

        Raises:
            EngineError: every engine failed to start, with the reason of the first, or ``timeout`` seconds
                went by.
        """

        def settled() -> bool:
            return self._closed or self._info is not None or all(slot.never_started for slot in self._slots)

        with self._changed:
            if not self._changed.wait_for(settled, timeout):
                raise EngineError(f"no engine was ready within {timeout:g} seconds")
            if self._info is None:
                raise EngineError(self._slots[0].failure or "the engines are closed")

    # Requests.

    def reserve(self, count: int = 1) -> Ticket:
        """Take ``count`` places, at once or not at all.

        Raises:
            OverloadedError: there are not as many.
            UnavailableError: the server ends, or no engine is ready.
        """
        with self._lock:
            if self._draining:
                raise UnavailableError("The server is ending.", retry_after=_RETRY_SECONDS)
            if self._info is None:
                raise _still_loading()
            try:
                self._admission.reserve(count, len(self._flights), len(self._queue), self._clock())
            except OverloadedError:
                self._totals["refused"] += count
                raise
            return Ticket(count, self.in_flight, self._give_back)

    def submit(self, work: Work, sink: Sink, ticket: Ticket) -> None:
        """Give a request one of the ticket's places; ``sink`` hears of it in threads of the engines.

        Raises:
            InvalidValueError: a request of this id runs, or its adapter was unloaded.
            EngineError: the ticket has no place left.
            UnavailableError: the server has stopped since the place was taken.
        """
        with self._lock:
            if self._closed:
                raise UnavailableError("The server is ending.", retry_after=_RETRY_SECONDS)
            if ticket.remaining < 1:
                raise EngineError("the ticket has no place left")
            if work.request_id in self._flights:
                raise InvalidValueError("request_id", work.request_id, "unique among running requests")
            self.adapters.enter(work.lora)
            ticket.remaining -= 1
            self._admission.reserved -= 1
            self._totals["accepted"] += 1
            now, aging = self._clock(), self._settings.priority_aging_seconds
            order = order_of(now, work.params.priority, aging, next(self._serials))
            flight = Flight(work, sink, now, now, order)
            self._flights[work.request_id] = flight
            self._queue.add(flight)
        self._pump()
        if flight.slot is None:
            self._wake.set()  # for its time in the queue

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        """End a request; its terminal event says ``reason``. Does nothing where it has ended."""
        with self._lock:
            flight = self._flights.get(request_id)
            if flight is None:
                return
            flight.abort = reason
            queued, handle = flight.slot is None, flight.handle if flight.sent else None
            if queued:
                self._queue.remove(flight)
                self._forget(flight)
        if queued:
            call_sink(flight.sink, TokenEvent(request_id, finish=reason))
        elif handle is not None:
            handle.abort(request_id, reason)

    # The end.

    def drain(self, timeout: float) -> None:
        """Take no more requests and wait for those there are; past ``timeout`` seconds, end them.

        What is ended so gets an error event.
        """
        with self._changed:
            self._draining = True
            done = self._changed.wait_for(lambda: not self._flights and not self._admission.reserved, timeout)
        if not done:
            self._end_all()
            with self._changed:
                self._changed.wait_for(lambda: not self._flights, _CONFIRM_SECONDS)

    def close(self) -> None:
        """End every request with an error event, and the engines. Safe to call twice."""
        with self._changed:
            self._draining = self._closed = True
            self._changed.notify_all()
        self._wake.set()
        self._end_all()
        if self._thread is not None and threading.current_thread() is not self._thread:
            self._thread.join()
        if not self._finished:
            self._slots.close(self._killed)
        self._finished = True
        for flight in list(self._flights.values()):
            if self._end(flight):
                call_sink(flight.sink, flight.error(_ENDING, UNAVAILABLE))

    def kill(self) -> None:
        """Close, and do not wait for steps to end; it hurries a ``close`` that does."""
        with self._changed:
            self._draining = self._closed = True
            self._killed.set()
        self._end_all()
        self._slots.kill(_ENDING)
        self.close()

    def _end_all(self) -> None:
        with self._lock:
            self._closed = True
            queued = list(self._queue)
            self._queue.clear()
            for flight in queued:
                self._forget(flight)
            running = [flight for flight in self._flights.values() if flight.abort is None]
            for flight in running:
                flight.abort, flight.ending = FinishReason.ABORT, True
        for flight in queued:
            call_sink(flight.sink, flight.error(_ENDING, UNAVAILABLE))
        for flight in running:
            if flight.sent and flight.handle is not None:
                flight.handle.abort(flight.work.request_id)

    # Routing.

    def _choose(self) -> Flight | None:
        """Take the first of the queue and give it an engine; None where it must wait. The lock is held."""
        running = len(self._flights) - len(self._queue)
        if not self._queue or not self._admission.has_room(running):
            return None
        candidates = [
            Candidate(slot.index, slot.inflight)
            for slot in self._slots
            if slot.inflight < self._admission.per_engine and slot.usable
        ]
        if not candidates:
            return None
        flight = self._queue.pop()
        slot = self._slots[self._router.choose(flight.work, candidates)]
        slot.inflight += 1
        self._router.sent(slot.index, flight.work)
        flight.slot, flight.handle, flight.sent = slot, slot.handle, False
        flight.attempt += 1
        flight.sent_at = self._clock()
        return flight

    def _pump(self) -> None:
        """Send what can be sent."""
        while True:
            with self._lock:
                flight = self._choose()
                if flight is None:
                    return
                handle, attempt = flight.handle, flight.attempt
                work = replace(flight.work, waited=flight.sent_at - flight.arrived)
                assert handle is not None
            try:
                handle.submit(work, self._sink_of(flight, attempt))
            except EngineError:
                # It never got there, so this is no resubmission: only the engine is out of the question.
                with self._lock:
                    slot = flight.slot
                    assert slot is not None
                    slot.refused = slot.refused or slot.handle is handle
                if not self._requeue(flight):
                    self._finish(flight, flight.error(_ENDING, UNAVAILABLE))
                self._wake.set()
                continue
            except Exception as error:
                logger.exception("request %s could not be sent", flight.work.request_id)
                self._finish(flight, flight.error(f"it could not be sent: {error!r:.200}", None))
                continue
            with self._lock:
                if flight.attempt == attempt:
                    flight.sent = True
                reason = flight.abort
            if reason is not None:
                handle.abort(flight.work.request_id, reason)

    def _requeue(self, flight: Flight) -> bool:
        """Put it back in its place in the queue; False where it is to end instead."""
        with self._lock:
            if flight.ended or flight.abort is not None or self._closed:
                return False
            self._leave_slot(flight)
            flight.attempt += 1  # nothing more is heard of the old one
            flight.queued_at = self._clock()
            self._queue.add(flight)
            return True

    def _sink_of(self, flight: Flight, attempt: int) -> Sink:
        def sink(event: TokenEvent) -> None:
            # Only this handle's thread ends a flight that is with it, so the lock is not needed here.
            if flight.ended or flight.attempt != attempt:
                return
            if event.finish is not None:
                self._last_event(flight, event)
                return
            flight.heard = True
            if self._keeps_output:
                flight.output_ids.extend(event.token_ids)
            if not call_sink(flight.sink, event):
                handle = flight.handle
                self._end(flight)
                if handle is not None:
                    handle.abort(flight.work.request_id)
                self._pump()

        return sink

    def _last_event(self, flight: Flight, event: TokenEvent) -> None:
        moves = event.error_kind == NOT_STARTED and not flight.heard and not flight.resubmitted
        flight.resubmitted = flight.resubmitted or moves
        if moves and self._requeue(flight):
            with self._lock:
                self._totals["resubmitted"] += 1
            logger.warning("request %s goes to another engine", flight.work.request_id)
            self._pump()
            self._wake.set()
            return
        if flight.ending:
            event = replace(event, finish=FinishReason.ERROR, error=_ENDING, error_kind=UNAVAILABLE)
        elif flight.abort is not None and event.error_kind == NOT_STARTED:
            event = TokenEvent(flight.work.request_id, finish=flight.abort)
        if self._keeps_output:
            flight.output_ids.extend(event.token_ids)
        self._finish(flight, event)

    def _finish(self, flight: Flight, event: TokenEvent) -> None:
        if self._end(flight):
            call_sink(flight.sink, event)
        self._pump()

    def _end(self, flight: Flight) -> bool:
        """Give its place back; False where it has ended already."""
        with self._lock:
            if flight.ended:
                return False
            slot, handle = flight.slot, flight.handle
            if slot is not None and slot.handle is handle:
                self._router.ended(slot.index, flight.work, flight.output_ids)
            self._admission.note_service(self._clock() - flight.sent_at)
            self._forget(flight)
            return True

    def _forget(self, flight: Flight) -> None:
        """The lock is held."""
        flight.ended = True
        del self._flights[flight.work.request_id]
        self._leave_slot(flight)
        self.adapters.leave(flight.work.lora)
        self._totals["ended"] += 1
        if not self._flights:
            self._changed.notify_all()

    @staticmethod
    def _leave_slot(flight: Flight) -> None:
        if flight.slot is not None:
            flight.slot.inflight -= 1
        flight.slot = flight.handle = None
        flight.sent = False

    def _give_back(self, ticket: Ticket) -> None:
        with self._lock:
            self._admission.reserved -= ticket.remaining
            ticket.remaining = 0
            if not self._admission.reserved:
                self._changed.notify_all()

    # Engines.

    def tick(self) -> float | None:
        """Start, open and restart engines, end what waited too long.

        Returns the seconds until there may be more to do, None where only an event can make it so.
        """
        if not self._closed:
            self._slots.start_due(self._clock)
        timeout = self._settings.queue_timeout
        with self._changed:
            now = self._clock()
            opened, dead = self._slots.refresh(now)
            for slot, info in opened:
                self._info = self._info or info
                self._router.opened(slot.index, info)
                if slot.handle is not None:
                    self.adapters.opened(slot.handle)
            expired = [flight for flight in self._queue if now - flight.queued_at >= timeout]
            for flight in expired:
                self._queue.remove(flight)
                self._forget(flight)
                self._totals["timed_out"] += 1
            self._changed.notify_all()
        for handle in dead:
            handle.close()
        for flight in expired:
            message = f"no engine was free within {timeout:g} seconds (QUEUE_TIMEOUT)"
            call_sink(flight.sink, flight.error(message, TIMEOUT))
        self._pump()
        with self._lock:
            due = [*self._slots.starts(), *(flight.queued_at + timeout for flight in self._queue)]
            return max(0.0, min(due) - self._clock()) if due else None

    def _run(self) -> None:
        while not self._closed:
            self._wake.clear()
            try:
                wait = self.tick()
            except Exception:
                logger.exception("the pool's upkeep failed")
                wait = 1.0
            self._wake.wait(wait)


def _still_loading() -> UnavailableError:
    return UnavailableError("The model is still being loaded.", retry_after=5.0)
