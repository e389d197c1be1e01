"""Charts with a row for each side: bars, and dots."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mini_sglang.bench.report import style
from mini_sglang.bench.report.content import Bar, BarChart, StripChart, number
from mini_sglang.bench.report.drawing import Frame, fit, plain_numbers, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_GOLDEN = 0.618034


def draw_bars(chart: BarChart, frame: Frame) -> Figure:
    heads = 1 + any(bar.detail or bar.note for bar in chart.bars)
    rows = _Rows(frame, len(chart.bars), chart.axis, heads, limit=chart.limit is not None)
    ends = [max((bar.value, *bar.points)) for bar in chart.bars if bar.value is not None]
    if chart.limit:
        ends.append(chart.limit[1])
    # Figures stand at the ends of the bars, in a narrow picture above them, and clear of a line.
    rows.axes.set_xlim(0, (max(ends, default=0) or 1) * (1.04 if rows.narrow or chart.limit else 1.42))
    alone = all(bar.ours for bar in chart.bars)
    for place, bar in enumerate(chart.bars):
        strong = bar.ours and not alone
        rows.label(place, bar.label, bar.detail, strong)
        if bar.value is None:
            rows.reason(place, bar.reason)
            continue
        face, edge = (style.OURS, style.OURS) if bar.ours else (style.OTHER_FACE, style.OTHER_HATCH)
        where, hatch = {"y": rows.y(place), "height": 2 * rows.half}, style.hatch(bar.style)
        rows.axes.barh(width=bar.value, color=face, edgecolor=edge, hatch=hatch, linewidth=0, **where)
        # The hatch has the colour of the edge: a darker edge is a bar of its own.
        edge = style.OURS if bar.ours else style.OTHER_EDGE
        rows.axes.barh(width=bar.value, fill=False, edgecolor=edge, linewidth=1, zorder=2, **where)
        _runs(rows.axes, bar, rows.y(place), rows.half)
        end = max((bar.value, *bar.points))
        rows.figure_of(place, end, number(bar.value, chart.decimals), strong, bar.note)
    if chart.limit:
        rows.limit(*chart.limit)
    return rows.figure


def draw_strips(chart: StripChart, frame: Frame) -> Figure:
    rows = _Rows(frame, len(chart.strips), chart.axis, 1)
    axes, half = rows.axes, rows.half
    most = max(value for strip in chart.strips for value in strip.values)
    if chart.log:
        axes.set_xscale("log")
        least = min(value for strip in chart.strips for value in strip.values)
        axes.set_xlim(least / 1.3, most * (1.3 if rows.narrow else 2.2))
        plain_numbers(axes.xaxis)
    else:
        axes.set_xlim(0, (most or 1) * (1.04 if rows.narrow else 1.22))
    for place, strip in enumerate(chart.strips):
        y = rows.y(place)
        colour = style.OURS if strip.ours else style.QUIET
        axes.plot(
            strip.values,
            _heights(len(strip.values), y, half),
            style.MARKERS[strip.style % len(style.MARKERS)],
            markersize=5.5,
            markerfacecolor=colour if strip.ours else style.PAPER,
            markeredgecolor=colour,
            markeredgewidth=1,
            zorder=3,
            clip_on=False,
        )
        axes.plot([strip.median] * 2, [y - half, y + half], color=style.INK, linewidth=2.2, zorder=4)
        rows.label(place, strip.label, "", strip.ours)
        rows.figure_of(place, max(strip.values), number(strip.median, chart.decimals), strip.ours)
    return rows.figure


class _Rows:
    """Axes with a row for each side: names left of it in a wide picture, above it in a narrow one.

    Attributes:
        half: of the height of what is drawn in a row, in rows.
    """

    def __init__(self, frame: Frame, count: int, axis: str, heads: int, limit: bool = False) -> None:
        self.layout = layout = frame.layout
        self.narrow = layout.narrow
        if limit:
            frame.top += 22
        # In a narrow picture: lines of text, the bar, and room to the next.
        self._head = 4.0 + 18 * heads if self.narrow else 0.0
        self._pitch = self._head + 22 + 12 if self.narrow else 48.0
        self.half = (11 if self.narrow else 15) / self._pitch
        left = layout.labels + 8 if layout.labels else 8.0
        self._column = limit and not self.narrow
        right = 176 if self._column else 28
        self._width = layout.width - left - right
        self.figure, self.axes = frame.axes(count * self._pitch, left, right, below=46)
        axes = self.axes
        axes.set_ylim(count - 0.5, -0.5)
        axes.set_yticks([])
        axes.spines["left"].set_visible(not self.narrow)
        axes.grid(axis="x", color=style.RULE, linewidth=0.8)
        axes.set_xlabel(axis, size=points(layout.small), loc="left")
        axes.xaxis.get_major_locator().set_params(nbins=4 if self.narrow else 7)
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:,g}")

    def y(self, place: int) -> float:
        """The middle of what is drawn."""
        return place - 0.5 + (self._head + 11) / self._pitch if self.narrow else float(place)

    def label(self, place: int, label: str, detail: str, ours: bool) -> None:
        layout, weight = self.layout, "bold" if ours else "normal"
        below: dict[str, Any] = {"size": points(layout.small), "color": style.QUIET}
        # In a narrow picture figure and note stand on the same lines.
        room = self._width * 0.64 if self.narrow else layout.labels - 8
        name = fit(label, room, layout.text, weight)
        detail = fit(detail, self._width * 0.6 if self.narrow else room, layout.small)
        if self.narrow:
            self._text(0, place, name, down=12, size=points(layout.text), weight=weight)
            self._text(0, place, detail, down=30, **below)
            return
        middle = self._pitch / 2
        up = 8 if detail else 0
        self._text(0, place, name, -8, middle - up, size=points(layout.text), weight=weight, ha="right")
        self._text(0, place, detail, -8, middle + 9, ha="right", **below)

    def reason(self, place: int, reason: str) -> None:
        text = fit(f"no figure: {reason}", self._width - 12, self.layout.small)
        how: dict[str, Any] = {"size": points(self.layout.small), "color": style.QUIET, "style": "italic"}
        down = self._head + 11 if self.narrow else self._pitch / 2
        self._text(0, place, text, 0 if self.narrow else 8, down, **how)

    def figure_of(self, place: int, x: float, text: str, ours: bool, note: str = "") -> None:
        """A figure with a note: right of ``x``, in a column where a line is, above in a narrow picture."""
        layout, weight = self.layout, "bold" if ours else "normal"
        below: dict[str, Any] = {"size": points(layout.small), "color": style.QUIET}
        if self.narrow:
            note = fit(note, self._width * 0.38, layout.small)
            self._text(1, place, text, down=12, size=points(layout.text), weight=weight, ha="right")
            self._text(1, place, note, down=30, ha="right", **below)
            return
        if self._column:
            middle = self._pitch / 2
            size = points(layout.text)
            self._text(1, place, text, 62, middle, size=size, weight=weight, ha="right")
            self._text(1, place, note, 72, middle, **below)
            return
        how = {"xytext": (points(9), 0), "textcoords": "offset points", "va": "center"}
        y = self.y(place)
        value = self.axes.annotate(text, (x, y), size=points(layout.text), weight=weight, **how)
        if note:
            self.axes.annotate(note, (1, 0.5), xycoords=value, **how, **below)

    def limit(self, name: str, value: float) -> None:
        """A broken line from top to bottom, in a narrow picture only where no text stands."""
        axes = self.axes
        places = range(round(axes.get_ylim()[0] + 0.5))
        beyond = self.half + 1 / self._pitch
        spans = [(self.y(place) - beyond, self.y(place) + beyond) for place in places]
        for top, bottom in spans if self.narrow else [(-0.5, len(places) - 0.5)]:
            # Light beneath, so that it shows on a dark bar too.
            axes.plot([value] * 2, [top, bottom], color=style.PAPER, linewidth=3, zorder=3)
            axes.plot([value] * 2, [top, bottom], "--", color=style.INK, linewidth=1.3, zorder=3)
        axes.annotate(
            f"{name} {number(value, 0 if value >= 100 else 1)}",
            (value, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, points(5)),
            textcoords="offset points",
            size=points(self.layout.small),
            ha="right" if value > axes.get_xlim()[1] * 0.4 else "left",
            va="bottom",
        )

    def _text(self, x: float, place: int, text: str, right: float = 0, down: float = 0, **how: Any) -> None:
        """Text at ``x``, a share of the axes, and so many pixels from there and below the row's top."""
        self.axes.annotate(
            text,
            (x, place - 0.5),
            xycoords=("axes fraction", "data"),
            xytext=(points(right), points(-down)),
            textcoords="offset points",
            annotation_clip=False,
            va="center",
            **how,
        )


def _heights(count: int, y: float, half: float) -> list[float]:
    """Dots of one row lie at different heights, the same ones each time."""
    return [y + half * 1.2 * (_GOLDEN * i % 1 - 0.5) for i in range(count)] if count > 1 else [y]


def _runs(axes: Any, bar: Bar, y: float, half: float) -> None:
    if not bar.points:
        return
    for colour, width in ((style.PAPER, 3.2), (style.INK, 1.2)):
        axes.plot([min(bar.points), max(bar.points)], [y, y], color=colour, linewidth=width, zorder=3)
    axes.plot(
        bar.points,
        _heights(len(bar.points), y, half),
        "o",
        markersize=4.5,
        markerfacecolor=style.PAPER,
        markeredgecolor=style.INK,
        markeredgewidth=1,
        zorder=4,
    )
