"""What the pool keeps of a request, and what it hands out: tickets and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType

from mini_sglang.engine.handle import EngineHandle, Sink, Work
from mini_sglang.engine.order import Order
from mini_sglang.engine.slots import EngineSlot, EngineStats
from mini_sglang.types import FinishReason, TokenEvent


@dataclass(frozen=True, slots=True)
class PoolStats:
    """Counts of requests, and of the restarts of all engines.

    ``reserved`` places have no request yet, ``queued`` requests wait in the pool for an engine, ``inflight``
    ones are with one; ``longest_wait`` is how many seconds the queue's longest waiting one is in the pool.
    The rest are totals. ``state`` and ``mode`` are as ``EnginePool.state`` and
    SCHEDULER_MODE.
    """

    mode: str
    state: str
    engines: tuple[EngineStats, ...]
    reserved: int
    queued: int
    inflight: int
    longest_wait: float
    accepted: int
    ended: int
    refused: int
    timed_out: int
    resubmitted: int
    restarts: int


class Ticket:
    """Places taken before the work of preparing requests. A context manager; what is unused goes back.

    Attributes:
        remaining: places that no ``submit`` has used.
        inflight: requests that had a place when these were taken, these included.
    """

    def __init__(self, count: int, inflight: int, give_back: Callable[[Ticket], None]) -> None:
        self.remaining = count
        self.inflight = inflight
        self._give_back = give_back

    def release(self) -> None:
        """Give back the places that no ``submit`` has used. Safe to call twice."""
        self._give_back(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


@dataclass(slots=True, eq=False)
class Flight:
    """A request between ``submit`` and its terminal event. ``slot`` is None while it is queued.

    It ``arrived`` once; ``queued_at`` is when it joined the queue last, to which its ``order`` brought it.
    """

    work: Work
    sink: Sink
    arrived: float
    queued_at: float
    order: Order
    slot: EngineSlot | None = None
    handle: EngineHandle | None = None
    attempt: int = 0
    sent: bool = False  # the handle has it, so that an abort finds it there
    sent_at: float = 0.0
    heard: bool = False  # an event of it went to the sink
    resubmitted: bool = False
    ended: bool = False
    abort: FinishReason | None = None
    ending: bool = False  # ended by the server, not by its client
    output_ids: list[int] = field(default_factory=list)

    def error(self, message: str, kind: str | None) -> TokenEvent:
        """A terminal event of this request."""
        return TokenEvent(self.work.request_id, finish=FinishReason.ERROR, error=message, error_kind=kind)
