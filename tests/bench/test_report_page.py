"""The page and the pictures: whole, by themselves, harmless, readable without colour."""

from __future__ import annotations

import base64
import io
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
import xml.etree.ElementTree as ElementTree
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.image
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from mini_sglang.bench.report import cli, drawing, style
from mini_sglang.bench.report.cli import main
from mini_sglang.bench.report.content import BarChart, Chart, LineChart
from mini_sglang.bench.report.lines import apart
from mini_sglang.bench.report.prepare import prepare
from mini_sglang.bench.report.reading import read_source
from mini_sglang.bench.report.style import NARROW, WIDE, Layout
from tests.bench.records import (
    Json,
    all_records,
    envelope,
    local_record,
    peer_row,
    peer_run,
    sweep_record,
    write,
)

VOID = {"meta", "img", "source"}
HOSTILE = (
    "</style></script><script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&lt;$x^2$ \u202e\x1b[31m"
)


class Page(HTMLParser):
    """Tags, attributes and text, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self._open: list[str] = []
        self.feed(html)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def values(self, name: str) -> list[str]:
        return [value for _, attribute, value in self.attributes if attribute == name]


def make(folder: Path, *more: str, **records: Json) -> Page:
    out = folder / "out"
    assert main([*map(str, write(folder, **records)), "--out", str(out), *more]) == 0
    return Page((out / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a report of every kind of record; ``out`` has what was made."""
    folder = tmp_path_factory.mktemp("report")
    make(folder, **all_records(), **{"sweep-2": sweep_record(2.0)})
    return folder


def all_charts(folder: Path) -> list[Chart]:
    paths = sorted(folder.glob("*.json"))
    return [chart for section in prepare(list(map(read_source, paths))).sections for chart in section.charts]


def page_of(folder: Path) -> Page:
    return Page((folder / "out" / "index.html").read_text(encoding="utf-8"))


def test_the_page_needs_nothing_else(everything: Path) -> None:
    page = page_of(everything)
    assert page.tags.count("html") == page.tags.count("h1") == 1
    assert not {"script", "link", "iframe", "object", "base", "form"} & set(page.tags)
    assert all(
        value.startswith("data:image/svg+xml;base64,") for value in page.values("src") + page.values("srcset")
    )
    assert all(value.startswith("#") for value in page.values("href"))
    assert set(page.values("href")) <= {f"#{name}" for name in page.values("id")}
    html = (everything / "out" / "index.html").read_text(encoding="utf-8")
    sheet = html[html.index("<style>") : html.index("</style>")]
    assert "url(" not in sheet and "@import" not in sheet and "http" not in sheet
    assert any(name.startswith("default-src 'none'") for name in page.values("content"))


def test_the_page_is_made_for_a_phone_too(everything: Path) -> None:
    page = page_of(everything)
    assert "width=device-width, initial-scale=1" in page.values("content")
    assert page.tags.count("picture") == page.tags.count("source") == page.tags.count("img")
    assert page.tags.count("figure") == page.tags.count("img") == len(all_charts(everything))
    assert all(len(alt) > 40 for alt in page.values("alt")) and len(page.values("alt")) == page.tags.count(
        "img"
    )
    # Every table scrolls in a box of its own.
    assert page.values("class").count("scroll") == page.tags.count("table")
    html = (everything / "out" / "index.html").read_text(encoding="utf-8")
    sizes = [float(size) for size in re.findall(r"font(?:-size)?: ?([0-9.]+)px", html)]
    assert sizes and min(sizes) >= 16


def test_every_row_is_in_the_page(everything: Path) -> None:
    page = page_of(everything)
    sources = [read_source(path) for path in sorted(everything.glob("*.json"))]
    report = prepare(sources)
    tables = [table for section in report.sections for table in section.tables]
    expected = sum(len(table.rows) + 1 + sum(bool(row.invalid) for row in table.rows) for table in tables)
    assert page.tags.count("tr") == expected
    for table in tables:
        for row in table.rows:
            assert all(cell in page.text for cell in row.cells)
            assert not row.invalid or f"Not valid: {row.invalid}" in page.text
    for source in sources:
        assert source.file in page.text and source.top.text("command") in page.text


def test_pictures_in_the_page_are_whole(everything: Path) -> None:
    page = page_of(everything)
    for data in page.values("src") + page.values("srcset"):
        svg = base64.b64decode(data.partition(",")[2], validate=True)
        root = ElementTree.fromstring(svg)
        assert root.tag == "{http://www.w3.org/2000/svg}svg"
        assert len(list(root.iter("{http://www.w3.org/2000/svg}path"))) > 10
        links = [
            value for node in root.iter() for name, value in node.attrib.items() if name.endswith("href")
        ]
        assert all(link.startswith("#") for link in links)


def inked(png: Path) -> float:
    image = np.asarray(matplotlib.image.imread(png))
    assert image.shape[1] == 2 * WIDE.width and image.shape[0] > 200
    return float((image[..., :3].mean(-1) < 0.9).mean())


def test_every_chart_is_a_png(everything: Path) -> None:
    pictures = sorted((everything / "out").glob("*.png"))
    assert len(pictures) == len(all_charts(everything)) > 10
    for picture in pictures:
        assert picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert 0.002 < inked(picture) < 0.5


def replaced(
    value: Any, text: str, fixed: tuple[str, ...] = ("kind", "peer", "group", "turn", "kernel")
) -> Any:
    """Every string of a record replaced; names of fields stay, those of versions and the machine go too."""
    if isinstance(value, dict):
        return {
            name: inner if name in fixed else replaced(inner, text, fixed) for name, inner in value.items()
        }
    if isinstance(value, list):
        return [replaced(item, text, fixed) for item in value]
    return text if isinstance(value, str) else value


@pytest.mark.parametrize("kind", all_records())
def test_what_a_file_says_never_becomes_markup(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = all_records()[kind]
    pages = []
    for place, text in enumerate((HOSTILE, "harmless")):
        folder = tmp_path / str(place)
        folder.mkdir()
        hostile = replaced(record, text)
        if text == HOSTILE:
            hostile["machine"][HOSTILE] = hostile["settings"][HOSTILE] = hostile["versions"][HOSTILE] = (
                HOSTILE
            )
        pages.append(make(folder, "--title", text, a=hostile))
        # What stands in the second page's pictures is not looked at.
        monkeypatch.setattr(cli, "svg", lambda chart, layout: b'<svg viewBox="0 0 9 9"/>')
        monkeypatch.setattr(cli, "png", lambda chart, layout, source: b"")
    wild, calm = pages
    assert Counter(calm.tags) == Counter(wild.tags)
    names = [[(tag, name) for tag, name, _ in page.attributes] for page in pages]
    assert Counter(names[0]) == Counter(names[1])
    # It is there, as text.
    assert wild.text.count("<script>alert(1)</script><img src=x onerror=alert(2)>\"'><b>&lt;$x^2$") > 3
    assert "\u202e" not in wild.text and "\x1b" not in wild.text


def test_hostile_group_and_peer_names_stay_text_and_out_of_file_names(tmp_path: Path) -> None:
    name = "../<script>x"
    rows = [peer_row(name, 10.0, group=name), peer_row("ours", 5.0, group=name)]
    page = make(tmp_path, a=envelope("local", rows, [peer_run(name, 6.4, group=name)]))
    assert "script" not in page.tags and name in page.text
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "index.html",
        "01-throughput.png",
        "01-ttft.png",
    }


def test_the_same_files_give_the_same_bytes(tmp_path: Path, everything: Path) -> None:
    """Also in a process with another hash seed and other settings of matplotlib."""
    again = tmp_path / "again"
    (tmp_path / "matplotlibrc").write_text(
        "axes.grid: True\nlines.linewidth: 9\nfont.size: 30\nsvg.fonttype: none\n"
    )
    code = "import sys; from mini_sglang.bench.report.cli import main; sys.exit(main(sys.argv[1:]))"
    paths = [everything / f"{name}.json" for name in (*all_records(), "sweep-2")]
    env = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(tmp_path), "TZ": "Asia/Tokyo"}
    subprocess.run(
        [sys.executable, "-c", code, *map(str, paths), "--out", str(again)],
        check=True,
        env=env,
        capture_output=True,
    )
    names = {path.name for path in (everything / "out").iterdir()}
    assert {path.name for path in again.iterdir()} == names
    for name in names:
        assert (again / name).read_bytes() == (everything / "out" / name).read_bytes(), name


def drawn(chart: Chart, layout: Layout, **how: str) -> Any:
    with drawing._looks():
        figure = drawing.draw(chart, layout, **how)
        FigureCanvasAgg(figure).draw()
    return figure


def bars_of(figure: Any) -> list[Rectangle]:
    """Those with a face: each has an outline of its own over it."""
    return [patch for patch in figure.axes[0].patches if isinstance(patch, Rectangle) and patch.get_fill()]


def luminance(colour: Any) -> float:
    red, green, blue, _ = matplotlib.colors.to_rgba(colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=["wide", "narrow"])
def test_bars_differ_without_colour(layout: Layout) -> None:
    """Of thirty peers each has a hatch of its own; ours alone is dark."""
    rows = [peer_row("ours", 5.0), *(peer_row(f"peer{i}", 10.0 + i) for i in range(30))]
    (chart, *_) = charts_of(envelope("local", rows, []))
    assert isinstance(chart, BarChart)
    bars = bars_of(drawn(chart, layout))
    assert len(bars) == 31
    hatches = {bar.get_hatch() or "" for bar in bars}
    assert len(hatches) == 31
    dark = [bar for bar in bars if luminance(bar.get_facecolor()) < 0.3]
    assert [bar.get_width() for bar in dark] == [5.0] and not dark[0].get_hatch()


def test_bars_begin_at_zero_and_what_is_not_valid_has_none(tmp_path: Path) -> None:
    (chart, *_) = charts_of(local_record())
    assert isinstance(chart, BarChart)
    for layout in (WIDE, NARROW):
        figure = drawn(chart, layout)
        assert [bar.get_width() for bar in bars_of(figure)] == [bar.value for bar in chart.bars if bar.value]
        assert all(bar.get_x() == 0 for bar in bars_of(figure)) and figure.axes[0].get_xlim()[0] == 0
        said = [text.get_text() for text in figure.findobj(Text)]
        assert "no figure: 60 of 64 tokens" in said
        # Each round is a dot.
        dots = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
        assert sum(len(line.get_xdata()) for line in dots) == 15


def test_lines_differ_without_colour() -> None:
    kinds = {(style.DASHES[i % 6], style.MARKERS[i % 10]) for i in range(30)}
    assert len(kinds) == 30
    dashes = [style.DASHES[i] for i in range(6)]
    assert all(a != b for a, b in itertools.combinations(dashes, 2))


def charts_of(record: Json) -> list[Chart]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "x.json"
        path.write_text(json.dumps(record))
        return prepare([read_source(path)]).sections[0].charts


def long_record() -> Json:
    """Long names, many digits, one value."""
    name = "A stack with quite a long name, version 12.34.56.post7+cpu"
    rows = [
        peer_row("ours", 1234567.8, title="mini-sglang with a long title of its own"),
        peer_row("a", 1_000_000.1, title=name, ratio=123456.789, agree=0.123),
        peer_row("b", None, title=name, reason=f"it said: {name} {name}"),
    ]
    return envelope("local", rows, [peer_run("a", 64.0), peer_run("ours", 6400.0, first=99.0)])


def axes_of(figure: Any) -> tuple[Any, Any]:
    return figure.axes[0].xaxis, figure.axes[0].yaxis


def texts(figure: Any) -> list[tuple[Text, Any]]:
    """What is drawn: ticks beyond the ends of an axis are there, but not to be seen."""
    beyond = set()
    for axis in axes_of(figure):
        low, high = sorted(axis.get_view_interval())
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        beyond |= {id(tick.label1) for tick in ticks if not low <= tick.get_loc() <= high}
    renderer = figure.canvas.get_renderer()
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    return [(text, text.get_window_extent(renderer)) for text in found if id(text) not in beyond]


@pytest.mark.parametrize("layout", [WIDE, NARROW], ids=["wide", "narrow"])
def test_all_text_is_within_the_picture_and_none_on_another(everything: Path, layout: Layout) -> None:
    for chart in [*all_charts(everything), *charts_of(long_record())]:
        figure = drawn(chart, layout, title=chart.title, source="some.json · a machine")
        found = texts(figure)
        ticks = {id(text) for axis in axes_of(figure) for text in axis.get_ticklabels(which="both")}
        width, height = figure.bbox.width, figure.bbox.height
        for text, box in found:
            assert box.x0 >= -1 and box.y0 >= -1, (chart.title, text.get_text())
            assert box.x1 <= width + 1 and box.y1 <= height + 1, (chart.title, text.get_text(), box)
        words = [(text, box) for text, box in found if id(text) not in ticks]
        for (one, a), (other, b) in itertools.combinations(words, 2):
            apart_ = a.x1 <= b.x0 + 1 or b.x1 <= a.x0 + 1 or a.y1 <= b.y0 + 2 or b.y1 <= a.y0 + 2
            assert apart_, (chart.title, one.get_text(), other.get_text())


def test_names_are_no_formulas_and_letters_without_a_glyph_no_noise() -> None:
    rows = [peer_row("ours", 5.0, title="$x^{2$ and \\frac"), peer_row("b", 4.0, title="模型 🦙")]
    (chart, *_) = charts_of(envelope("local", rows, []))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.svg(chart, WIDE)
        drawing.png(chart, WIDE, "")
    said = [text.get_text() for text in drawn(chart, WIDE).findobj(Text)]
    assert "$x^{2$ and \\frac" in said


def test_a_gap_is_no_line_to_zero() -> None:
    charts = {chart.slug: chart for chart in charts_of(sweep_record())}
    chart = charts["throughput"]
    assert isinstance(chart, LineChart)
    line = drawn(chart, WIDE).axes[0].lines[0]
    assert np.isnan(line.get_ydata()[-1]) and (line.get_ydata()[:-1] > 0).all()


@pytest.mark.parametrize(
    "places, moved",
    [
        ([10.0, 50.0], [10.0, 50.0]),
        ([50.0, 50.0, 50.0], [50.0, 60.0, 70.0]),
        ([100.0, 99.0], [100.0, 90.0]),
        ([], []),
    ],
)
def test_names_of_lines_are_kept_apart(places: list[float], moved: list[float]) -> None:
    assert apart(places, 10.0, 100.0) == moved


def test_records_without_a_valid_figure_still_make_a_page(tmp_path: Path) -> None:
    rows = [peer_row("ours", None), peer_row("b", None)]
    page = make(tmp_path, a=envelope("local", rows, []))
    assert page.tags.count("img") == 0 and page.text.count("Not valid: it did not run") == 2
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]


def test_without_matplotlib_it_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = write(tmp_path, a=local_record())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main([str(paths[0]), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "pip install 'mini-sglang[bench]'" in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_matplotlib_is_imported_only_to_draw(everything: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from mini_sglang.bench.report import bars, cli, lines;"
        "cli.prepare([cli.read_source(Path(sys.argv[1]))]); assert 'matplotlib' not in sys.modules;"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, str(everything / "local.json")], check=True)


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "FILE.json"),
        (["absent.json"], "absent.json"),
        (["{file}", "--out", "{file}"], "--out"),
        (["{file}", "--colour"], "--colour"),
    ],
)
def test_bad_arguments_are_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
) -> None:
    (path,) = write(tmp_path, a=local_record())
    assert main([argument.format(file=path) for argument in arguments]) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1 and "Traceback" not in error


def test_svg_has_no_comments_and_png_no_date(everything: Path) -> None:
    for chart in all_charts(everything)[:3]:
        svg = drawing.svg(chart, WIDE)
        assert b"<!--" not in svg and b"<metadata" not in svg
        png = drawing.png(chart, WIDE, "x")
        assert b"Software" not in png and b"tIME" not in png
        assert matplotlib.image.imread(io.BytesIO(png)).shape[1] == 2 * WIDE.width
