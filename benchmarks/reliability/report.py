"""What a row must hold, what was seen, and the table and JSON of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold.

    Attributes:
        what: what must hold, with its bound.
        seen: what was measured or found.
        timed: whether it depends on how fast the machine is, so that a test on a loaded one leaves it out.
    """

    what: str
    seen: str
    ok: bool
    timed: bool = False


@dataclass(slots=True)
class Row:
    """One row's outcome. ``figures`` are what was measured, as JSON data."""

    name: str
    title: str
    checks: list[Check] = field(default_factory=list)
    figures: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0

    def check(self, what: str, seen: object, ok: bool, *, timed: bool = False) -> None:
        """Note one thing that must hold."""
        self.checks.append(Check(what, str(seen), bool(ok), timed))

    def check_leaks(self, leaks: object) -> None:
        """Note what ``Server.leaks`` found once all was served."""
        self.check("pages, places and requests exactly back", leaks or "nothing is left", not leaks)

    def check_log(self, said: str) -> None:
        """Note whether the server's log has a traceback."""
        self.check("no traceback in the log", said.count("Traceback"), "Traceback" not in said)

    def failures(self, *, timed: bool = True) -> list[Check]:
        """What did not hold; ``timed`` False leaves out what depends on the machine's speed."""
        return [check for check in self.checks if not check.ok and (timed or not check.timed)]


@dataclass(frozen=True, slots=True)
class Size:
    """How much of a row's full size is run: 1.0 is all of it, ``CI`` what a test can afford."""

    fraction: float

    def of(self, full: float, least: int) -> int:
        """A count at this size, at least ``least``."""
        return max(least, round(full * self.fraction))

    def seconds(self, full: float, least: float) -> float:
        """A time at this size, at least ``least`` seconds."""
        return max(least, full * self.fraction)


CI = Size(0.0)
FULL = Size(1.0)

RowRun = Callable[[Size], Row]
"""Runs one row at a size. It raises only where the row itself is broken, not where a check fails."""


def table(rows: Sequence[Row]) -> str:
    """The rows' checks as text, one a line."""
    lines = ["| row | what must hold | seen | |", "| --- | --- | --- | --- |"]
    lines += [
        f"| {row.name} | {check.what} | {check.seen} | {'ok' if check.ok else 'NOT OK'} |"
        for row in rows
        for check in row.checks
    ]
    return "\n".join(lines)


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    return [asdict(row) for row in rows]


def percentile(values: Sequence[float], percent: float) -> float:
    """The least value that at least ``percent`` of the values do not exceed; ``values`` is not empty."""
    ordered = sorted(values)
    return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]
