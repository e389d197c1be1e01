"""Records of kind ``serve`` and ``sweep``, a server under load at one rate or at several: the charts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate

from mini_sglang.bench.report.content import (
    Chart,
    Line,
    LineChart,
    Section,
    wide_apart,
)
from mini_sglang.bench.report.load_tables import PERCENTILES, errors, rate_of, saturation, tables, totals
from mini_sglang.bench.report.reading import Fields, Source


def serve(source: Source) -> Section:
    """One load: how long requests waited, and how much of their prompts came from the cache."""
    section = Section(title=_title(source), kicker="Under load", file=source.file)
    charts: list[Chart] = [_waits(source), *_cache(source)]
    section.charts.extend(chart for chart in charts if not chart.empty)
    section.tables.extend(tables(source.rows))
    section.findings.extend(totals(row) for row in source.rows)
    section.notes.extend([*source.settings.texts("notes"), *errors(source.runs)])
    return section


def sweep(source: Source) -> Section:
    """Several rates: what becomes of latency and throughput."""
    section = Section(title=_title(source), kicker="Latency against load", file=source.file)
    rows = sorted(source.rows, key=lambda row: rate_of(row) or 0)
    charts: list[Chart] = [
        _percentiles(rows, "ttft", "Time to first token against load", "time to first token, ms"),
        _percentiles(
            rows, "tpot", "Time per further token against load", "time per token after the first, ms"
        ),
        *_throughputs(rows),
    ]
    section.charts.extend(chart for chart in charts if not chart.empty)
    section.tables.extend(tables(rows))
    end = source.settings.text("end")
    section.findings.append(f"{end[0].upper()}{end[1:]}." if end else saturation(rows))
    section.notes.extend([*source.settings.texts("notes"), *errors(source.runs)])
    return section


def waits_of_all(sources: Sequence[Source]) -> LineChart:
    """TTFT of several ``serve`` files in one chart."""
    lines = [_ecdf(source.label, _firsts(source), style) for style, source in enumerate(sources)]
    return LineChart(
        slug="ttft",
        title="Time to first token",
        caption="The further left the better: the share of requests whose first token came within that time.",
        axis="share of requests, %",
        x_axis="time to first token, ms",
        lines=tuple(line for line in lines if line.x),
        log_x=wide_apart([x for line in lines for x in line.x]),
        top=100,
        decimals=0,
    )


def sweeps_together(sources: Sequence[Source]) -> list[Chart]:
    """Several ``sweep`` files in one chart of each figure."""
    pick: list[tuple[str, str, str, Callable[[Fields], float | None]]] = [
        ("ttft-p50", "Time to first token, median", "time to first token (p50), ms", _of("ttft", "p50", 1e3)),
        ("ttft-p99", "Time to first token, p99", "time to first token (p99), ms", _of("ttft", "p99", 1e3)),
        ("throughput", "Output throughput", "output tokens per second", _of("output_throughput")),
    ]
    charts: list[Chart] = []
    for slug, title, axis, value in pick:
        lines = []
        for style, source in enumerate(sources):
            rows = sorted(source.rows, key=lambda row: rate_of(row) or 0)
            lines.append(_over_rate(rows, source.label, style, value))
        charts.append(_load_chart(slug, title, "A line for each file.", axis, lines, slug != "throughput"))
    return [chart for chart in charts if not chart.empty]


def _title(source: Source) -> str:
    settings = source.settings
    parts = [settings.text(name) for name in ("model", "dataset", "dialect")]
    return ", ".join(part for part in parts if part) or source.label


def _firsts(source: Source) -> list[float]:
    """Milliseconds from sending a request to its first token, of those without an error."""
    found = []
    for run in source.runs:
        sent, first = run.number("sent"), run.number("first")
        if sent is not None and first is not None and not run.text("error"):
            found.append(1e3 * (first - sent))
    return found


def _ecdf(label: str, values: Sequence[float], style: int) -> Line:
    """The share of ``values`` that are at most x, in percent, as steps from 0 to 100."""
    x = sorted(values)
    y = [100 * (i + 1) / len(x) for i in range(len(x))]
    if x:
        x, y = [x[0], *x], [0.0, *y]
    return Line(label, tuple(x), tuple(y), style, steps=True, plain=True)


def _waits(source: Source) -> LineChart:
    ends = []
    for run in source.runs:
        sent, end = run.number("sent"), run.number("end")
        if sent is not None and end is not None and not run.text("error"):
            ends.append(1e3 * (end - sent))
    lines = [
        _ecdf(label, values, style)
        for style, (label, values) in enumerate((("first token", _firsts(source)), ("whole answer", ends)))
    ]
    return LineChart(
        slug="ttft",
        title="How long requests waited",
        caption="The further left the better: the share of the requests that had their first token, and "
        "their whole answer, within that time after they were sent. Requests that failed are not among them.",
        axis="share of requests, %",
        x_axis="time after sending, ms",
        lines=tuple(line for line in lines if line.x),
        log_x=wide_apart([x for line in lines for x in line.x]),
        top=100,
        decimals=0,
    )


def _cache(source: Source) -> list[Chart]:
    """The file's samples, and what each answer said of its prompt."""
    lines = []
    samples = sorted(
        (point for row in source.rows for point in row.parts("cache")),
        key=lambda point: point.number("t") or 0.0,
    )
    pairs = [(point.number("t"), point.number("hit_rate")) for point in samples]
    known = [(t, 100 * rate) for t, rate in pairs if t is not None and rate is not None]
    if known:
        lines.append(Line("window by window", *_split(known), 0, plain=len(known) > 40))
    asked = sorted(
        (sent, run.number("cached_tokens") or 0.0, run.number("prompt_tokens") or 0.0)
        for run in source.runs
        if (sent := run.number("sent")) is not None and "cached_tokens" in run and not run.text("error")
    )
    asked = [request for request in asked if request[2]]
    if asked:
        hits = accumulate(hit for _, hit, _ in asked)
        totals = accumulate(total for _, _, total in asked)
        running = [100 * hit / total for hit, total in zip(hits, totals, strict=True)]
        times = [sent for sent, _, _ in asked]
        single = [100 * hit / total for _, hit, total in asked]
        lines.append(Line("all requests so far", tuple(times), tuple(running), 1, plain=True))
        lines.append(Line("one request", tuple(times), tuple(single), 2, dots=True))
    if not lines:
        return []
    return [
        LineChart(
            slug="cache",
            title="Cache hit rate over time",
            caption="How much of the prompts' tokens the cache gave: the higher, the less was computed.",
            axis="prompt tokens from the cache, %",
            x_axis="time since the start, s",
            lines=tuple(lines),
            top=100,
            decimals=0,
        )
    ]


def _split(points: Sequence[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return tuple(x for x, _ in points), tuple(y for _, y in points)


def _of(name: str, part: str = "", factor: float = 1.0) -> Callable[[Fields], float | None]:
    def value(row: Fields) -> float | None:
        found = row.part(name).number(part) if part else row.number(name)
        return None if found is None or not row.number("completed") else found * factor

    return value


def _over_rate(
    rows: Sequence[Fields], label: str, style: int, value: Callable[[Fields], float | None]
) -> Line:
    """A row without a finished request has no figure, and makes a gap."""
    points = [(rate, value(row)) for row in rows if (rate := rate_of(row)) is not None]
    return Line(label, tuple(x for x, _ in points), tuple(y for _, y in points), style)


def _load_chart(
    slug: str, title: str, caption: str, axis: str, lines: Sequence[Line], log: bool, diagonal: str = ""
) -> LineChart:
    values = [y for line in lines for y in line.y if y is not None]
    return LineChart(
        slug=slug,
        title=title,
        caption=caption,
        axis=axis,
        x_axis="requests asked for per second",
        lines=tuple(lines),
        log_y=log and wide_apart(values),
        diagonal=diagonal,
    )


def _percentiles(rows: Sequence[Fields], name: str, title: str, axis: str) -> LineChart:
    lines = [_over_rate(rows, part, style, _of(name, part, 1e3)) for style, part in enumerate(PERCENTILES)]
    caption = "The lower the better: half of the requests are below p50, one in a hundred is above p99."
    return _load_chart(name, title, caption, axis, lines, log=True)


def _throughputs(rows: Sequence[Fields]) -> list[Chart]:
    output = _over_rate(rows, "output", 0, _of("output_throughput"))
    done = [_over_rate(rows, "finished", 0, _of("request_throughput"))]
    good = _over_rate(rows, "within target", 1, _of("goodput"))
    if any(y is not None for y in good.y):
        done.append(good)
    return [
        _load_chart(
            "throughput",
            "Output throughput against load",
            "The higher the better; where it no longer rises, the server is saturated.",
            "output tokens per second",
            [output],
            log=False,
        ),
        _load_chart(
            "requests",
            "Requests finished against requests asked for",
            "On the diagonal the server keeps up; below it, requests pile up.",
            "requests finished per second",
            done,
            log=False,
            diagonal="keeps up",
        ),
    ]
