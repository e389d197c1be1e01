"""The report as one HTML page that needs nothing else: its pictures are in it, and nothing is loaded."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Callable
from importlib import resources

from mini_sglang.bench.report import style
from mini_sglang.bench.report.content import Chart, Report, Row, Section, Table
from mini_sglang.bench.report.style import Layout

Draw = Callable[[Chart, Layout], bytes]
"""Gives a chart as SVG."""

_SIZE = re.compile(rb'<svg[^>]*? viewBox="0 0 ([0-9.]+) ([0-9.]+)"')
# Nothing is loaded and no script runs, whatever a file has in it.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """HTML; all other text is escaped."""

    __slots__ = ()


def tag(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element. ``class_`` is ``class``, and ``_`` stands for ``-``."""
    inner = "".join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    names = {key: key.rstrip("_").replace("_", "-") for key in attributes}
    rest = "".join(f' {names[key]}="{html.escape(value)}"' for key, value in attributes.items())
    if name in ("meta", "img", "source"):
        return Markup(f"<{name}{rest}>")
    return Markup(f"<{name}{rest}>{inner}</{name}>")


def page(report: Report, draw: Draw) -> str:
    """The whole page."""
    sheet = resources.files("mini_sglang.bench.report").joinpath("page.css").read_text(encoding="utf-8")
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", name="color-scheme", content="light dark"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", report.title),
        tag("style", Markup(sheet)),
    )
    parts = [tag("h1", report.title), tag("p", report.summary, class_="summary")]
    if report.notices:
        parts.append(tag("ul", *(tag("li", notice) for notice in report.notices), class_="notices"))
    if len(report.sections) > 1:
        parts.append(_contents(report.sections))
    header = tag("header", *parts)
    sections = [_section(section, f"s{place}", draw) for place, section in enumerate(report.sections, 1)]
    body = tag("body", header, tag("main", *sections))
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def _contents(sections: list[Section]) -> Markup:
    links = (
        tag("li", tag("a", f"{section.kicker}: {section.title}", href=f"#s{place}"), f" ({section.file})")
        for place, section in enumerate(sections, 1)
    )
    return tag("nav", tag("ol", *links), aria_label="Contents")


def _section(section: Section, name: str, draw: Draw) -> Markup:
    parts = [tag("p", section.kicker, class_="kicker"), tag("h2", section.title)]
    if section.findings:
        parts.append(tag("ul", *(tag("li", finding) for finding in section.findings), class_="findings"))
    parts += [_figure(chart, draw) for chart in section.charts]
    parts += [_table(table) for table in section.tables]
    if section.notes:
        parts += [tag("h3", "Notes"), tag("ul", *(tag("li", note) for note in section.notes))]
    if section.facts:
        facts = (tag("div", tag("dt", term), tag("dd", _code(term, value))) for term, value in section.facts)
        parts += [tag("h3", "How this was measured"), tag("dl", *facts)]
    else:
        parts.append(tag("p", f"From {section.file}.", class_="summary"))
    return tag("section", *parts, id=name)


def _code(term: str, value: str) -> str:
    return tag("code", value) if term in ("Command", "Commit", "File") else value


def _figure(chart: Chart, draw: Draw) -> Markup:
    """Drawn twice, so that letters are of a good size on a phone as on a desk."""
    narrow, wide = draw(chart, style.NARROW), draw(chart, style.WIDE)
    width, height = _size(narrow)
    source = tag("source", media="(max-width: 600px)", srcset=_data(narrow), width=width, height=height)
    width, height = _size(wide)
    image = tag("img", src=_data(wide), alt=chart.alt, width=width, height=height)
    caption = tag("figcaption", tag("h3", chart.title), tag("p", chart.caption))
    return tag("figure", caption, tag("picture", source, image))


def _size(svg: bytes) -> tuple[str, str]:
    """In CSS pixels; matplotlib's are points."""
    found = _SIZE.search(svg)
    assert found is not None
    width, height = (f"{float(number) * 4 / 3:.0f}" for number in found.groups())
    return width, height


def _data(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode('ascii')}"


def _table(table: Table) -> Markup:
    heads = (
        tag("th", column.name, *([tag("span", column.unit)] if column.unit else []), scope="col")
        for column in table.columns
    )
    body = [line for row in table.rows for line in _lines(row, len(table.columns))]
    # Set by CSS from the number of the column: how figures are set is the same in all rows.
    texts = [i for i, column in enumerate(table.columns) if not column.figure]
    classes = f"text{len(texts)}"
    whole = tag(
        "table",
        tag("caption", table.caption),
        tag("thead", tag("tr", *heads)),
        tag("tbody", *body),
        class_=classes,
    )
    return tag("div", whole, class_="scroll", tabindex="0", role="region", aria_label=table.caption)


def _lines(row: Row, columns: int) -> list[Markup]:
    """The row, and below it why it is not valid."""
    first, *others = row.cells
    mark = [tag("span", "ours", class_="mark")] if row.ours else []
    kind = " ".join(name for name, on in (("ours", row.ours), ("invalid", bool(row.invalid))) if on)
    cells = [tag("th", first, *mark, scope="row"), *(tag("td", cell) for cell in others)]
    attributes = {"class_": kind} if kind else {}
    lines = [tag("tr", *cells, **attributes)]
    if row.invalid:
        why = tag("td", tag("span", f"Not valid: {row.invalid}"), colspan=str(columns))
        lines.append(tag("tr", why, class_="reason"))
    return lines
