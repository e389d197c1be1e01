"""Charts as pictures, by matplotlib, which is imported here alone and only when something is drawn."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from mini_sglang.bench.report import style
from mini_sglang.bench.report.content import BarChart, Chart, LineChart, StripChart
from mini_sglang.bench.report.style import Layout
from mini_sglang.errors import MiniSglangError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CSS_PIXELS = 96
_PNG_SCALE = 2
# Of an SVG: the document type, metadata, comments (which repeat all text) and indentation.
_UNSEEN = re.compile(
    rb"<!DOCTYPE[^>]*>\s*|<metadata>.*?</metadata>\s*|<!--.*?-->\s*|^ +", re.DOTALL | re.MULTILINE
)


def check_matplotlib() -> None:
    """Raises: MiniSglangError, where there is none."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MiniSglangError(
            "The report needs matplotlib to draw, which is not installed: pip install 'mini-sglang[bench]'."
        ) from None


def svg(chart: Chart, layout: Layout) -> bytes:
    """The chart for the page, on no ground of its own; the same bytes for the same chart."""
    with _looks():
        figure = draw(chart, layout)
        out = io.BytesIO()
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _UNSEEN.sub(b"", out.getvalue())


def png(chart: Chart, layout: Layout, source: str) -> bytes:
    """The chart to be shown by itself: with its title, and ``source``, a line on where it comes from."""
    with _looks():
        figure = draw(chart, layout, title=chart.title, source=source)
        out = io.BytesIO()
        figure.savefig(
            out,
            format="png",
            dpi=CSS_PIXELS * _PNG_SCALE,
            facecolor=style.PAPER,
            metadata={"Software": None},
        )
    return out.getvalue()


def draw(chart: Chart, layout: Layout, title: str = "", source: str = "") -> Figure:
    """The chart as a figure of matplotlib."""
    from mini_sglang.bench.report.bars import draw_bars, draw_strips
    from mini_sglang.bench.report.lines import draw_lines

    if isinstance(chart, BarChart):
        return draw_bars(chart, Frame(layout, title, source))
    if isinstance(chart, StripChart):
        return draw_strips(chart, Frame(layout, title, source))
    assert isinstance(chart, LineChart)
    return draw_lines(chart, Frame(layout, title, source))


@contextmanager
def _looks() -> Iterator[None]:
    """Matplotlib's own defaults and ours over them, whatever the user has set."""
    import matplotlib
    import matplotlib.style

    with warnings.catch_warnings(), matplotlib.style.context("default"):
        # Its fonts have not every letter of every name; a box stands for one then.
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        looks: Any = style.RC
        matplotlib.rcParams.update(looks)
        yield


class Frame:
    """A figure with room around its axes, all in CSS pixels.

    Attributes:
        top: where the axes may begin, below the title.
        bottom: how much is taken below the axis' own label.
    """

    def __init__(self, layout: Layout, title: str, source: str) -> None:
        self.layout = layout
        self.title = title
        self.source = source
        self.top = 44.0 if title else 8.0
        self.bottom = 30.0 if source else 4.0

    def axes(self, height: float, left: float, right: float, below: float) -> tuple[Figure, Any]:
        """Axes of ``height``, with room for what is at their sides and ``below``."""
        from matplotlib.figure import Figure

        width, total = self.layout.width, self.top + height + below + self.bottom
        figure = Figure(figsize=(width / CSS_PIXELS, total / CSS_PIXELS), dpi=CSS_PIXELS)
        box = (
            left / width,
            (below + self.bottom) / total,
            (width - left - right) / width,
            height / total,
        )
        axes = figure.add_axes(box)
        axes.tick_params(labelsize=points(self.layout.small), length=3)
        if self.title:
            figure.text(
                8 / width,
                1 - 12 / total,
                fit(self.title, width - 16, self.layout.text + 2.5, "bold"),
                size=points(self.layout.text + 2.5),
                weight="bold",
                va="top",
            )
        if self.source:
            figure.text(
                8 / width,
                9 / total,
                fit(self.source, width - 16, 11),
                size=points(11),
                color=style.QUIET,
                va="bottom",
            )
        return figure, axes


def points(pixels: float) -> float:
    return pixels * 0.75


def length(text: str, size: float, weight: str = "normal") -> float:
    """Of text in letters of ``size``, both in pixels, at most."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=points(size), weight=weight)
    width, _, _ = text_to_path.get_text_width_height_descent(text, font, False)
    # Letters that are fitted to a PNG's pixels are wider.
    return 1.06 * float(width) / points(1)


def fit(text: str, room: float, size: float, weight: str = "normal") -> str:
    """Cut to the pixels there are."""
    if length(text, size, weight) <= room:
        return text
    text = text[: int(4 * room / size)]  # no more even of the thinnest letters
    while text and length(f"{text}…", size, weight) > room:
        text = text[:-1].rstrip()
    return f"{text}…"


def plain_numbers(axis: Any) -> None:
    """1, 2, 5, 10, … as they are on a logarithmic axis."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())
