"""Charts of lines, each named at its end."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from mini_sglang.bench.report import style
from mini_sglang.bench.report.content import Line, LineChart
from mini_sglang.bench.report.drawing import CSS_PIXELS, Frame, fit, length, plain_numbers, points

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_HEIGHT_WIDE, _HEIGHT_NARROW = 340.0, 250.0
_LEFT = 58.0
_SAMPLE, _NAME_HEIGHT = 34.0, 20.0
_NAMES_WIDTH = 170.0


def draw_lines(chart: LineChart, frame: Frame) -> Figure:
    layout = frame.layout
    lines = [line for line in chart.lines if any(y is not None for y in line.y)]
    named = len(lines) > 1 or bool(chart.diagonal)
    room = layout.width - _SAMPLE - 40 if layout.narrow else _NAMES_WIDTH
    names = [fit(line.label, room, layout.small) for line in lines]
    right = 28.0
    if named and layout.narrow:
        frame.top += _NAME_HEIGHT * len(lines) + 2
    elif named:
        right = _SAMPLE + 28 + max(length(name, layout.small) for name in names)
    # The name of the y axis lies above it, so that it need not be read sideways.
    frame.top += 24
    height = _HEIGHT_NARROW if layout.narrow else _HEIGHT_WIDE
    figure, axes = frame.axes(height, _LEFT, right, below=46)
    axes.grid(color=style.RULE, linewidth=0.8)
    axes.set_xlabel(chart.x_axis, size=points(layout.small), loc="left")
    _note(axes, chart.axis, -_LEFT + 6, height + 9, frame, va="bottom")
    for line in lines:
        _line(axes, line)
    _scales(axes, chart, layout.narrow)
    if chart.diagonal:
        _diagonal(axes, chart, frame)
    if named:
        _names(axes, lines, names, frame, (layout.width - _LEFT - right, height))
    return figure


def _line(axes: Any, line: Line) -> None:
    y = [float("nan") if value is None else value for value in line.y]
    drawstyle = "steps-post" if line.steps else "default"
    zorder = 3 + line.style / 100
    axes.plot(line.x, y, drawstyle=drawstyle, zorder=zorder, clip_on=not line.dots, **_look(line))


def _look(line: Line) -> dict[str, Any]:
    marked = not line.plain or len(line.x) == 1
    return {
        "color": style.COLOURS[line.style % len(style.COLOURS)],
        "linestyle": "none" if line.dots else style.DASHES[line.style % len(style.DASHES)],
        "linewidth": 2,
        "marker": "o" if line.dots else style.MARKERS[line.style % len(style.MARKERS)] if marked else "",
        "markersize": 4.5 if line.dots else 6,
        "markerfacecolor": style.PAPER if line.style or line.dots else None,
    }


def _scales(axes: Any, chart: LineChart, narrow: bool) -> None:
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    for axis, log in ((axes.xaxis, chart.log_x), (axes.yaxis, chart.log_y)):
        if log:
            (axes.set_xscale if axis is axes.xaxis else axes.set_yscale)("log")
            plain_numbers(axis)
            if narrow and axis is axes.xaxis:
                from matplotlib.ticker import LogLocator

                axis.set_major_locator(LogLocator(subs=(1.0,), numticks=6))
        else:
            axis.set_major_locator(MaxNLocator(nbins=5 if narrow else 8, steps=[1, 2, 5, 10]))
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    if not chart.log_x:
        axes.set_xlim(left=0)
    if not chart.log_y:
        # Never cut off below: what looks twice as high is twice as much.
        axes.set_ylim(0, chart.top * 1.03 if chart.top else None)


def _diagonal(axes: Any, chart: LineChart, frame: Frame) -> None:
    most = axes.get_xlim()[1]
    axes.plot([0, most], [0, most], color=style.QUIET, linewidth=1.2, linestyle=(0, (4, 3)), zorder=2)
    axes.set_xlim(0, most)
    axes.set_ylim(0, max(axes.get_ylim()[1], most))
    axes.annotate(
        chart.diagonal,
        (most * 0.62, most * 0.62),
        xytext=(points(-8), points(8)),
        textcoords="offset points",
        size=points(frame.layout.small),
        color=style.QUIET,
        ha="right",
    )


def _names(axes: Any, lines: list[Line], names: list[str], frame: Frame, size: tuple[float, float]) -> None:
    """Each line's name with a piece of it: in a narrow picture above, else where the line ends."""
    width, height = size
    if frame.layout.narrow:
        ups = [height + 36 + _NAME_HEIGHT * (len(lines) - 1 - place) for place in range(len(lines))]
        begin = 6.0 - _LEFT
    else:
        ends = []
        for line in lines:
            point = [(x, y) for x, y in zip(line.x, line.y, strict=True) if y is not None][-1]
            low = axes.transAxes.transform((0, 0))[1]
            ends.append(float(axes.transData.transform(point)[1] - low) / axes.figure.dpi * CSS_PIXELS)
        ups, begin = apart(ends, frame.layout.small * 1.4, height), width + 10
    for line, name, up in zip(lines, names, ups, strict=True):
        sample = Line(line.label, (0.0, 1.0), (0.0, 0.0), line.style, plain=line.plain, dots=line.dots)
        xs = [(begin + along * _SAMPLE) / width for along in ((0.5,) if line.dots else (0, 0.5, 1))]
        (drawn,) = axes.plot(xs, [up / height] * len(xs), transform=axes.transAxes, **_look(sample))
        drawn.set_clip_on(False)
        if not line.dots:
            drawn.set_markevery([1])
        _note(axes, name, begin + _SAMPLE + 7, up, frame, va="center", color=style.INK)


def _note(axes: Any, text: str, right: float, up: float, frame: Frame, **how: Any) -> None:
    """Text so many pixels from the lower left corner of the axes."""
    axes.annotate(
        text,
        (0, 0),
        xycoords="axes fraction",
        xytext=(points(right), points(up)),
        textcoords="offset points",
        size=points(frame.layout.small),
        annotation_clip=False,
        **{"color": style.QUIET, **how},
    )


def apart(places: list[float], gap: float, top: float) -> list[float]:
    """The places moved as little as keeps them ``gap`` apart and between 0 and ``top``, in the same order."""
    order = sorted(range(len(places)), key=lambda i: places[i])
    moved = list(places)
    for before, i in pairwise(order):
        moved[i] = max(moved[i], moved[before] + gap)
    limit = top
    for i in reversed(order):
        moved[i] = min(moved[i], limit)
        limit = moved[i] - gap
    return moved
