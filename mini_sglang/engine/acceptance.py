"""Whether guessing ahead pays: how often guesses are right, and what a step costs by its rows."""

from __future__ import annotations

# Rows go through a matrix by powers of two: so many drafts fill them beside a request's own row.
_LENGTHS = frozenset((1, 3, 7, 15, 31, 63, 127))
# What a step costs before any was timed, in rows: four of weights to read, and one for each row.
_PRIOR_BASE = 4.0
# How fast old steps fade, and rows² that the prior's slope counts as much as.
_FADE, _PRIOR_SPREAD = 0.98, 20.0
# A step slower than this many times what was expected is taken for one that was interrupted.
_STALL = 3.0
# What guesses give must be worth so much of what they cost.
_MARGIN = 1.1


class StepCosts:
    """Seconds of a step by the tokens that run in it: a line through the steps seen, older ones fading."""

    def __init__(self) -> None:
        self._weight = self._rows = self._seconds = self._rows_rows = self._rows_seconds = 0.0
        self._base, self._row = _PRIOR_BASE, 1.0

    def observe(self, rows: int, seconds: float) -> None:
        if self._weight:
            seconds = min(seconds, _STALL * self.step(rows))
        self._weight = self._weight * _FADE + 1.0
        self._rows = self._rows * _FADE + rows
        self._seconds = self._seconds * _FADE + seconds
        self._rows_rows = self._rows_rows * _FADE + rows * rows
        self._rows_seconds = self._rows_seconds * _FADE + rows * seconds
        mean_rows, mean_seconds = self._rows / self._weight, self._seconds / self._weight
        spread = self._rows_rows - self._rows * mean_rows
        common = self._rows_seconds - self._rows * mean_seconds
        prior = mean_seconds / (_PRIOR_BASE + mean_rows)
        slope = (common + _PRIOR_SPREAD * prior) / (spread + _PRIOR_SPREAD)
        self._row = min(max(slope, 0.02 * prior), mean_seconds / mean_rows)
        self._base = mean_seconds - self._row * mean_rows

    def step(self, rows: int) -> float:
        """Seconds, or before any step was seen a number to compare with others of its kind."""
        return self._base + self._row * rows


class Chance:
    """How probable it is that a guess is right where the ones before it were: a moving average.

    Args:
        prior: the chance before anything is known.
    """

    __slots__ = ("_right", "_tried")

    def __init__(self, prior: float) -> None:
        self._right, self._tried = 3.0 * prior, 3.0

    @property
    def value(self) -> float:
        return self._right / self._tried

    def learn(self, drafted: int, accepted: int) -> None:
        # What comes after the first wrong guess was not tried.
        self._right = self._right * 0.9 + accepted
        self._tried = self._tried * 0.9 + accepted + (accepted < drafted)


def best_length(
    costs: StepCosts, chance: float, room: int, rows: int, tokens: int, draft_cost: float = 0.0
) -> int:
    """How many tokens to guess for one request of a step, so that the step gives most tokens a second.

    The guesses of the other requests are left out: each request gets those that pay by themselves, and all of
    them together then pay too.

    Args:
        chance: that a guess is right where the ones before it were.
        room: most guesses.
        rows: tokens that run in the step without guesses.
        tokens: tokens that it gives without guesses.
        draft_cost: what a guess itself costs, in the unit of ``costs``.
    """
    base = costs.step(rows)
    best, speed = 0, tokens / base
    right, gained = 1.0, 0.0
    for count in range(1, room + 1):
        right *= chance
        gained += right
        if count in _LENGTHS or count == room:
            seconds = costs.step(rows + count) + draft_cost * count
            if (tokens + gained) / seconds > speed and gained * base > _MARGIN * tokens * (seconds - base):
                best, speed = count, (tokens + gained) / seconds
    return best
