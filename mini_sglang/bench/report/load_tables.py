"""The tables and sentences of records of kind ``serve`` and ``sweep``."""

from __future__ import annotations

from collections.abc import Sequence

from mini_sglang.bench.report.content import Column, Row, Table, number, scaled
from mini_sglang.bench.report.reading import Fields

PERCENTILES = ("p50", "p90", "p99")
_LATENCIES = (("ttft", "TTFT"), ("tpot", "TPOT"), ("itl", "ITL"), ("e2e", "whole answer"))
# Below this share of what is asked for, a server does not keep up.
_KEEPS_UP = 0.9


def totals(row: Fields) -> str:
    completed, requests, errors = (
        number(row.number(name), 0) for name in ("completed", "requests", "errors")
    )
    half, most = (scaled(row.part("ttft").number(part), 1e3, 0) for part in ("p50", "p99"))
    return (
        f"{completed} of {requests} requests were answered in {number(row.number('duration'), 1)} s, "
        f"{number(row.number('output_throughput'), 1)} output tokens/s; the first token came after {half} ms "
        f"(p50) to {most} ms (p99)" + (f"; {errors} failed." if row.number("errors") else ".")
    )


def rate_of(row: Fields) -> float | None:
    """Requests a second that were asked for; None for so many at a time, and for all at once (``inf``)."""
    return None if row.text("request_rate") == "inf" else row.number("request_rate")


def saturation(rows: Sequence[Fields]) -> str:
    for row in rows:
        asked, done = rate_of(row), row.number("request_throughput")
        if asked and done is not None and done < _KEEPS_UP * asked:
            return (
                f"Asked for {asked:g} requests a second, the server finishes {done:.2f}, less than "
                f"{_KEEPS_UP:.0%} of them: from there on it does not keep up."
            )
    return f"At every rate the server finishes at least {_KEEPS_UP:.0%} of the requests asked for."


_COUNTS = (
    (Column("requests"), "requests", 0),
    (Column("finished"), "completed", 0),
    (Column("failed"), "errors", 0),
    (Column("time", "s"), "duration", 1),
    (Column("input", "tokens"), "input_tokens", 0),
    (Column("output", "tokens"), "output_tokens", 0),
    (Column("finished", "requests/s"), "request_throughput", 2),
    (Column("in target", "requests/s"), "goodput", 2),
    (Column("output", "tokens/s"), "output_throughput", 1),
    (Column("in and out", "tokens/s"), "total_throughput", 1),
)


def tables(rows: Sequence[Fields]) -> list[Table]:
    rates = all(rate_of(row) is not None for row in rows)
    first = Column("asked for", "requests/s") if rates else Column("load")
    counts, waits = [], []
    for row in rows:
        reason = "" if row.number("completed") else "no request was finished"
        load = _load(row, rates)
        figures = (number(row.number(name), decimals) for _, name, decimals in _COUNTS)
        counts.append(Row((load, *figures), invalid=reason))
        latencies = (_milliseconds(row, name, part) for name, _ in _LATENCIES for part in PERCENTILES)
        waits.append(Row((load, *latencies), invalid=reason))
    columns = [Column(f"{title} {part}", "ms") for _, title in _LATENCIES for part in PERCENTILES]
    latency = Table("Latency", (first, *columns), tuple(waits))
    if len(rows) == 1 and rows[0].number("completed"):
        latency = _one_latency(rows[0])
    columns = [column for column, _, _ in _COUNTS]
    return [Table("Requests and throughput", (first, *columns), tuple(counts)), latency]


def _one_latency(row: Fields) -> Table:
    parts = ("mean", *PERCENTILES)
    rows = (Row((title, *(_milliseconds(row, name, part) for part in parts))) for name, title in _LATENCIES)
    return Table("Latency", (Column(""), *(Column(part, "ms") for part in parts)), tuple(rows))


def _milliseconds(row: Fields, name: str, part: str) -> str:
    return scaled(row.part(name).number(part), 1e3, 0 if name in ("ttft", "e2e") else 1)


def _load(row: Fields, rates: bool) -> str:
    rate, concurrency = rate_of(row), row.number("concurrency")
    if rate is not None:
        return f"{rate:g}" if rates else f"{rate:g} requests/s"
    return f"{concurrency:.0f} at a time" if concurrency else "all at once"


def errors(runs: Sequence[Fields]) -> list[str]:
    """Each kind of error once, with how often it came."""
    found = [error for run in runs if (error := run.text("error"))]
    counts = {error: found.count(error) for error in found}
    return [f"{count} request{'s' * (count > 1)} failed: {error}" for error, count in counts.items()]
