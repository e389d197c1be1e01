"""How many requests a pool takes, and when one that is refused should come again."""

from __future__ import annotations

from mini_sglang.config import Settings
from mini_sglang.engine.slots import EngineSlots
from mini_sglang.errors import OverloadedError, UnavailableError

_RETRY_SECONDS = (1.0, 60.0)  # least and most that Retry-After says


class Admission:
    """The places of a pool. What it is told and what it says is under the pool's lock.

    Attributes:
        per_engine: requests that one engine may have at a time.
        reserved: places that are taken and have no request yet.
    """

    def __init__(self, settings: Settings, slots: EngineSlots) -> None:
        batch = settings.max_batch_size
        self.per_engine = settings.max_inflight_per_engine or batch + max(2, batch // 4)
        self.reserved = 0
        self._max_inflight = settings.max_inflight_total
        self._max_queue = settings.max_queue
        self._slots = slots
        self._service_seconds = 1.0

    def reserve(self, count: int, taken: int, queued: int, now: float) -> None:
        """Take ``count`` places, at once or not at all.

        Args:
            taken: requests that are in the pool; ``queued`` of them wait for an engine.

        Raises:
            OverloadedError: there are not as many.
            UnavailableError: no engine is ready.
        """
        room = self.per_engine * sum(slot.usable for slot in self._slots)
        room = min(room, self._max_inflight or room)
        if room == 0:
            wait = min(self._slots.starts(), default=0.0) - now
            raise UnavailableError("No engine is running; one is being started.", retry_after=_bounded(wait))
        limit = room + self._max_queue
        if taken + self.reserved + count > limit:
            # Until those that wait now will have been taken, going by recent requests.
            wait = self._service_seconds * (queued + 1) / room
            message = f"The server is busy: it takes {limit} requests at a time."
            raise OverloadedError(message, retry_after=_bounded(wait))
        self.reserved += count

    def has_room(self, running: int) -> bool:
        """Whether one more may be with an engine beside the ``running`` ones."""
        return not self._max_inflight or running < self._max_inflight

    def note_service(self, seconds: float) -> None:
        """How long a request was with its engine."""
        self._service_seconds += 0.1 * (seconds - self._service_seconds)


def _bounded(seconds: float) -> float:
    low, high = _RETRY_SECONDS
    return min(high, max(low, seconds))
