"""How many tokens one call of the backend may have, where the device ran out of memory before.

As TCP finds what a network carries (Jacobson, "Congestion Avoidance and Control", 1988): half of what failed,
then more again, slowly; and from one up by doubling where one sequence was the reason.
"""

from __future__ import annotations

# Calls near the limit before it is doubled; twice as many each time that turns out too early.
_PATIENCE, _MOST_PATIENCE = 32, 1024
_ANY = 1 << 20


class StepSize:
    """See the module.

    Attributes:
        limit: tokens; None is any number.
    """

    def __init__(self) -> None:
        self.limit: int | None = None
        self._goal: int | None = None  # up to which the limit doubles with every call
        self._before: int | None = None  # the goal before the failures since the last call that ran
        self._failing = False
        self._clean = 0
        self._patience = _PATIENCE
        self._probing = False

    def failed(self, tokens: int) -> None:
        """A call of several tokens did not fit."""
        self._begin_failing()
        if self._probing:
            self._patience = min(2 * self._patience, _MOST_PATIENCE)
        self._clean, self._probing = 0, False
        self.limit = self._goal = max(1, tokens // 2)

    def refused(self) -> None:
        """What failed could not be made smaller: of the size of other calls that says nothing."""
        self._begin_failing()
        self.limit, self._goal = 1, self._before

    def ran(self, tokens: int) -> None:
        """A call of so many tokens was done."""
        self._failing = False
        if self.limit is None:
            return
        if self._goal is None or self.limit < self._goal:
            self.limit = 2 * self.limit if self._goal is None else min(2 * self.limit, self._goal)
        elif 2 * tokens > self.limit:
            self._clean += 1
            if self._clean >= self._patience:
                if self._probing:
                    self._patience = _PATIENCE
                self._clean, self._probing = 0, True
                self.limit = self._goal = 2 * self.limit
        if self.limit >= _ANY:
            self.limit = self._goal = None

    def _begin_failing(self) -> None:
        if not self._failing:
            self._before, self._failing = self._goal, True
