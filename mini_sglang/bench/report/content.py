"""What a report is made of, before anything is drawn: charts, tables and text. No matplotlib here."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

NONE = "–"


@dataclass(frozen=True)
class Chart:
    """What every chart has.

    Attributes:
        slug: its name among the charts of its section, for the PNG's file name.
        title: what it shows; ``caption``: how to read it.
        axis: of the figures, with their unit.
    """

    slug: str
    title: str
    caption: str
    axis: str

    @property
    def alt(self) -> str:
        """The chart in words, with its figures."""
        raise NotImplementedError

    @property
    def empty(self) -> bool:
        """Whether there is nothing to draw."""
        raise NotImplementedError


@dataclass(frozen=True)
class Bar:
    """One bar, or the reason why there is none.

    Attributes:
        detail: beside or under its label.
        value: its length; None where there is no figure, and then ``reason`` says why.
        points: each round's own figure.
        note: what follows the figure.
        ours: whether it is mini-sglang's.
        style: which hatch; bars of one chart differ in it.
    """

    label: str
    value: float | None
    style: int
    detail: str = ""
    points: tuple[float, ...] = ()
    note: str = ""
    reason: str = ""
    ours: bool = False


@dataclass(frozen=True)
class BarChart(Chart):
    """Bars from zero. ``limit``: a line at what cannot be passed, with its name."""

    bars: tuple[Bar, ...]
    limit: tuple[str, float] | None = None
    decimals: int = 1

    @property
    def alt(self) -> str:
        parts = []
        for bar in self.bars:
            if bar.value is None:
                parts.append(f"{bar.label}: no figure, {bar.reason}")
                continue
            runs = ""
            if bar.points:
                low, high = (number(end, self.decimals) for end in (min(bar.points), max(bar.points)))
                runs = f" ({len(bar.points)} rounds, {low} to {high})"
            parts.append(f"{bar.label}: {number(bar.value, self.decimals)}{runs}")
        limit = f" {self.limit[0]}: {number(self.limit[1], self.decimals)}." if self.limit else ""
        return f"Bar chart of {self.axis}. {'; '.join(parts)}.{limit}"

    @property
    def empty(self) -> bool:
        return all(bar.value is None for bar in self.bars)


@dataclass(frozen=True)
class Strip:
    """All values of one side, as they are."""

    label: str
    values: tuple[float, ...]
    style: int
    ours: bool = False

    @property
    def median(self) -> float:
        return statistics.median(self.values)


@dataclass(frozen=True)
class StripChart(Chart):
    """A row of dots for each side, with its median. ``log``: the axis."""

    strips: tuple[Strip, ...]
    log: bool = False
    decimals: int = 0

    @property
    def alt(self) -> str:
        parts = [
            f"{strip.label}: median {number(strip.median, self.decimals)}, "
            f"{number(min(strip.values), self.decimals)} to {number(max(strip.values), self.decimals)} "
            f"({len(strip.values)} values)"
            for strip in self.strips
        ]
        return f"Every value of {self.axis}. {'; '.join(parts)}."

    @property
    def empty(self) -> bool:
        return not self.strips


@dataclass(frozen=True)
class Line:
    """Points of rising ``x``; a ``y`` of None is a gap.

    Attributes:
        style: its dashes and marker; lines of one chart differ in it.
        steps: it stays where it is until the next point.
        plain: without markers; ``dots``: without a line.
    """

    label: str
    x: tuple[float, ...]
    y: tuple[float | None, ...]
    style: int
    steps: bool = False
    plain: bool = False
    dots: bool = False


@dataclass(frozen=True)
class LineChart(Chart):
    """Lines over ``x_axis``. ``diagonal``: names the line where y is x. ``top``: of the y axis."""

    x_axis: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = False
    diagonal: str = ""
    top: float | None = None
    decimals: int = 1

    @property
    def alt(self) -> str:
        parts = []
        for line in self.lines:
            points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None]
            if not points:
                continue
            (x0, y0), (x1, y1) = points[0], points[-1]
            parts.append(
                f"{line.label}: {number(y0, self.decimals)} at {x0:.4g}, "
                f"{number(y1, self.decimals)} at {x1:.4g}"
            )
        return f"{self.axis} over {self.x_axis}. {'; '.join(parts)}."

    @property
    def empty(self) -> bool:
        return all(y is None for line in self.lines for y in line.y)


@dataclass(frozen=True)
class Column:
    """``unit`` stands under the name; figures are set right."""

    name: str
    unit: str = ""
    figure: bool = True


@dataclass(frozen=True)
class Row:
    """A cell for each column. ``invalid``: why its figures, which are shown all the same, do not count."""

    cells: tuple[str, ...]
    ours: bool = False
    invalid: str = ""


@dataclass(frozen=True)
class Table:
    caption: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Section:
    """One file, or what several have in common.

    Attributes:
        kicker: what kind of benchmark it is.
        findings: what the figures say, a sentence each.
        facts: how it was measured, (name, value).
        notes: what has to be known about single rows.
    """

    title: str
    kicker: str
    file: str
    findings: list[str] = field(default_factory=list)
    charts: list[Chart] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class Report:
    """``notices``: what to know before all else. ``summary``: where it was measured."""

    title: str
    summary: str
    notices: list[str]
    sections: list[Section]


def number(value: float | None, decimals: int) -> str:
    """With thousands apart; a dash for none."""
    return NONE if value is None else f"{value:,.{decimals}f}"


def scaled(value: float | None, factor: float, decimals: int) -> str:
    return number(None if value is None else value * factor, decimals)


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.0%}"


def wide_apart(values: Sequence[float]) -> bool:
    """Whether only a logarithmic axis shows all of them."""
    return bool(values) and min(values) > 0 and max(values) > 20 * min(values)


def several(names: Sequence[str]) -> str:
    """``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
