"""Records of kind ``kernels``: what each kernel reaches of what the machine gives."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from mini_sglang.bench.report.content import (
    Bar,
    BarChart,
    Chart,
    Column,
    Row,
    Section,
    Table,
    number,
    percent,
    scaled,
)
from mini_sglang.bench.report.reading import Fields, Source

# Cores that others may keep busy. With more, factors to torch say little.
_QUIET = 0.15


def kernels(source: Source) -> Section:
    title = source.settings.text("variant") or source.label
    section = Section(title=title, kicker="Kernels", file=source.file)
    charts: list[Chart] = [_reading(source), *_computing(source)]
    section.charts.extend(chart for chart in charts if not chart.empty)
    section.tables.append(_table(source.rows))
    bandwidth = source.limits.number("bandwidth_gb_s")
    best = max((row.number("share") or 0.0 for row in _single(source.rows)), default=0.0)
    if bandwidth and best:
        section.findings.append(
            f"The machine reads {bandwidth:.1f} GB/s; a product with one row reaches up to {best:.0%} of it."
        )
    others = [other for run in source.runs if (other := run.number("others")) is not None]
    if others:
        busy = statistics.median(others)
        said = f"Other processes kept {busy:.1f} cores busy meanwhile (median of the rows)"
        if busy > _QUIET:
            section.findings.append(
                f"NOT QUIET: {said}; torch, whose threads wait by spinning, suffers most."
            )
        else:
            section.notes.append(f"{said}.")
    return section


def _single(rows: Sequence[Fields]) -> list[Fields]:
    """Products with one row, which read the whole matrix for it."""
    return [row for row in rows if row.text("kernel") == "product" and row.number("rows") == 1]


def _reading(source: Source) -> BarChart:
    """What is bound by memory: products and attention with the fewest rows."""
    bars: list[Bar] = []
    for kernel in ("product", "attention, decode"):
        rows = [row for row in source.rows if row.text("kernel") == kernel]
        fewest = min((row.number("rows") or 0 for row in rows), default=0)
        for row in rows:
            rate = row.number("gb_s")
            if row.number("rows") == fewest and rate is not None:
                share = row.number("share")
                note = "" if share is None else f"{share:.0%}"
                label = f"{kernel.partition(',')[0]}, {row.text('weights')}"
                bars.append(Bar(label, rate, 0, note=note, detail=_rows(row), ours=True))
    bandwidth = source.limits.number("bandwidth_gb_s")
    return BarChart(
        slug="bandwidth",
        title="Bytes read, against what the machine gives",
        caption="The longer the better. The broken line is the machine's read bandwidth, measured in the "
        "same run, and each percentage a share of it. Above it, some of the data came from the CPU's caches.",
        axis="GB/s of weights or KV",
        bars=tuple(bars),
        limit=("read bandwidth", bandwidth) if bandwidth else None,
    )


def _computing(source: Source) -> list[Chart]:
    """What is bound by arithmetic: the most rows, ours beside torch."""
    matrix = source.limits.number("matrix_gflop_s")
    charts: list[Chart] = []
    for kernel, slug in (("product", "products"), ("attention, prefill", "prefill")):
        rows = [row for row in source.rows if row.text("kernel") == kernel]
        most = max((row.number("rows") or 0 for row in rows), default=0)
        bars: list[Bar] = []
        for row in rows:
            ours, torchs = row.number("gflop_s"), row.number("torch_gflop_s")
            if row.number("rows") != most or ours is None:
                continue
            name = row.text("weights")
            note = f"{ours / torchs:.1f}× torch" if torchs else ""
            bars.append(Bar(name, ours, 0, note=note, detail="ours", ours=True))
            if torchs is not None:
                bars.append(Bar(name, torchs, 1, detail="torch"))
        charts.append(
            BarChart(
                slug=slug,
                title=f"Arithmetic with {most:.0f} rows: {kernel}",
                caption="The longer the better. Dark: ours; hatched: torch on the same numbers. The broken "
                "line is torch's best product in bfloat16, measured in the same run.",
                axis="GFLOP/s",
                bars=tuple(bars),
                limit=("torch's bf16 product", matrix) if matrix else None,
                decimals=0,
            )
        )
    return charts


def _rows(row: Fields) -> str:
    rows, context = row.number("rows") or 0, row.number("context")
    return f"{rows:.0f} row{'s' * (rows != 1)}" + (f", {context:,.0f} positions" if context else "")


def _table(rows: Sequence[Fields]) -> Table:
    columns = (
        Column("kernel", figure=False),
        Column("type", figure=False),
        Column("rows"),
        Column("time", "µs"),
        Column("torch", "µs"),
        Column("rate", "GB/s"),
        Column("of read", "bandwidth"),
        Column("ours", "GFLOP/s"),
        Column("torch", "GFLOP/s"),
    )
    cells = (
        (
            row.text("kernel"),
            row.text("weights"),
            number(row.number("rows"), 0),
            scaled(row.number("seconds"), 1e6, 1),
            scaled(row.number("torch_seconds"), 1e6, 1),
            number(row.number("gb_s"), 1),
            percent(row.number("share")),
            number(row.number("gflop_s"), 1),
            number(row.number("torch_gflop_s"), 1),
        )
        for row in rows
    )
    return Table("Every kernel", columns, tuple(Row(line) for line in cells))
