"""A load's figures as text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]
_SPREADS = (
    ("time to first token", "ttft"),
    ("time per token after", "tpot"),
    ("between tokens", "itl"),
    ("end to end", "e2e"),
)
_PLANNED = (("first token, from plan", "ttft_planned"), ("end to end, from plan", "e2e_planned"))
_POINTS = ("mean", "p50", "p90", "p99")
_LATE = 0.001


def lines(row: Row) -> Iterator[str]:
    """The summary of one load."""
    yield from _pairs(_summary(row))
    yield ""
    spreads = list(_SPREADS)
    if row["lag"] is not None and row["lag"]["p99"] > _LATE and row["concurrency"] is None:
        spreads += _PLANNED
    yield f"{'ms':<24}" + "".join(f"{point:>11}" for point in _POINTS)
    for title, name in spreads:
        values = row[name]
        if name == "itl" and row["itl_of"] == "pieces":
            title = "between pieces of text"
        cells = ["-"] * 4 if values is None else [f"{values[point] * 1e3:,.2f}" for point in _POINTS]
        yield f"{title:<24}" + "".join(f"{cell:>11}" for cell in cells)


def _summary(row: Row) -> Iterator[tuple[str, str]]:
    yield "requests", f"{row['completed']} completed, {row['errors']} failed{_kinds(row)}"
    asked = (
        f"asked {row['request_rate']}"
        if row["request_rate"] is not None
        else f"{row['concurrency']} at a time"
    )
    yield (
        "duration",
        f"{row['duration']:.2f} s, {row['request_throughput']:.3f} requests/s ({asked}), "
        f"{row['mean_inflight']:.1f} in flight on average",
    )
    cached = "" if row["cached_tokens"] is None else f" ({row['cached_tokens']:,} from the cache)"
    yield "tokens", f"{row['input_tokens']:,} in{cached}, {row['output_tokens']:,} out"
    yield (
        "throughput",
        f"{row['output_throughput']:.1f} tokens/s out, {row['total_throughput']:.1f} in and out",
    )
    if row["goodput"] is not None:
        yield "goodput", f"{row['goodput']:.3f} requests/s within the goals"
    if row["lag"] is not None:
        yield (
            "sent late by",
            f"{row['lag']['p50'] * 1e3:.2f} ms at the median, {row['lag']['p99'] * 1e3:.2f} at p99",
        )


def _kinds(row: Row) -> str:
    kinds = row["errors_by_kind"]
    return " (" + ", ".join(f"{count} {kind}" for kind, count in kinds.items()) + ")" if kinds else ""


def _pairs(pairs: Iterator[tuple[str, str]]) -> Iterator[str]:
    for name, value in pairs:
        yield f"{name:<14}{value}"


_SWEEP: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("rate", lambda row: str(row["request_rate"])),
    ("served/s", lambda row: f"{row['request_throughput']:.2f}"),
    ("out tok/s", lambda row: f"{row['output_throughput']:.1f}"),
    ("of offered", lambda row: "-" if row["followed"] is None else f"{row['followed']:.0%}"),
    ("in flight", lambda row: f"{row['mean_inflight']:.1f}"),
    ("TTFT p50", lambda row: _ms(row["ttft_planned"], "p50")),
    ("TTFT p99", lambda row: _ms(row["ttft_planned"], "p99")),
    ("TPOT p50", lambda row: _ms(row["tpot"], "p50")),
    ("e2e p99", lambda row: _ms(row["e2e_planned"], "p99")),
    ("goodput", lambda row: "-" if row["goodput"] is None else f"{row['goodput']:.2f}"),
    ("failed", lambda row: str(row["errors"])),
)


def sweep_lines(rows: Sequence[Row]) -> Iterator[str]:
    """A line for each rate; latency in milliseconds, from the planned times."""
    cells = [[show(row) for _, show in _SWEEP] for row in rows]
    widths = [max(len(name), *(len(line[at]) for line in cells)) for at, (name, _) in enumerate(_SWEEP)]
    for line in [[name for name, _ in _SWEEP], *cells]:
        yield "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True))


def _ms(values: Mapping[str, float] | None, point: str) -> str:
    return "-" if values is None else f"{values[point] * 1e3:.0f}"
