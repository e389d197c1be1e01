"""Records of kind ``local`` and ``server``: peers side by side, in groups of the same weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from mini_sglang.bench.report.content import (
    Bar,
    BarChart,
    Chart,
    Column,
    Row,
    Section,
    Strip,
    StripChart,
    Table,
    number,
    percent,
    scaled,
    several,
    wide_apart,
)
from mini_sglang.bench.report.reading import Fields, Source

OURS = frozenset({"ours", "mini-sglang", "mini_sglang"})
# A peer whose answers are this much less the reference's own than ours is shown to.
_AGREES_LESS = 0.05


@dataclass
class Side:
    """One peer's row in a group, with its valid runs.

    Attributes:
        rates: ids a second of each run; ``firsts``: seconds to the first id of each prompt of each run.
        dropped: why runs of it were left out.
    """

    row: Fields
    title: str
    group: str
    ours: bool
    style: int
    reason: str
    rates: list[float] = field(default_factory=list)
    firsts: list[float] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """The row's tokens a second; None where the row is not valid."""
        return None if self.reason else self.row.number("tokens_per_s")

    @property
    def agree(self) -> float | None:
        return self.row.number("agree")


def compare(source: Source) -> Section:
    groups = read_sides(source)
    local = source.kind == "local"
    section = Section(
        title=source.settings.text("model") or source.label,
        kicker="Side by side, each in a process of its own" if local else "Side by side, over HTTP",
        file=source.file,
    )
    for place, (name, sides) in enumerate(groups.items(), 1):
        end = f"-{place}" if len(groups) > 1 else ""
        of = f": {name}" if name else ""
        section.findings.extend(findings(sides, name))
        charts: list[Chart] = [_rates(sides, f"throughput{end}", of), _firsts(sides, f"ttft{end}", of)]
        section.charts.extend(chart for chart in charts if not chart.empty)
        section.tables.append(_table(sides, name))
        section.notes.extend(_notes(sides, name))
    return section


def read_sides(source: Source) -> dict[str, list[Side]]:
    """The rows of each group, the fastest first. A style belongs to a peer, in all groups."""
    styles: dict[str, int] = {}
    groups: dict[str, list[Side]] = {}
    places: dict[str, set[str]] = {}
    for row in source.rows:
        peer, group = row.text("peer"), row.text("group")
        ours = is_ours(row)
        # Style 0 is ours alone.
        style = 0 if ours else styles.setdefault(peer, len(styles) + 1)
        reason = ""
        if row.flag("valid") is False or row.number("tokens_per_s") is None:
            reason = row.text("reason") or "no figure and no reason in the file"
        groups.setdefault(group, []).append(Side(row, row.text("title") or peer, group, ours, style, reason))
        places.setdefault(peer, set()).add(group)
    for run in source.runs:
        peer = run.text("peer")
        # A run without a group belongs to its peer's only one, or nobody can say to which.
        group = run.text("group") if "group" in run else next(iter(places.get(peer, {""})))
        if "group" not in run and len(places.get(peer, ())) > 1:
            continue
        for side in groups.get(group, []):
            if side.row.text("peer") == peer:
                _add(side, run)
    return {name: sorted(sides, key=lambda side: -(side.rate or 0)) for name, sides in groups.items()}


def is_ours(row: Fields) -> bool:
    return row.text("peer").lower() in OURS or row.text("title").lower().startswith("mini-sglang")


def _add(side: Side, run: Fields) -> None:
    if run.flag("valid") is False:
        side.dropped.append(run.text("reason") or "no reason in the file")
        return
    seconds, tokens = run.number("seconds"), run.count("ids")
    if seconds and tokens:
        side.rates.append(tokens / seconds)
    side.firsts.extend(times[0] for times in run.lists("times") if times)


def findings(sides: list[Side], group: str) -> list[str]:
    """Who is faster, also where it is not us; what lies within the spread of the runs is called so."""
    ours = next((side for side in sides if side.ours and side.rate), None)
    start = f"{group}: " if group else ""
    failed = [side.title for side in sides if side.reason]
    missing = [f"No valid figure from {several(failed)}."] if failed else []
    if ours is None or ours.rate is None:
        return [f"{start}no valid figure of mini-sglang.", *missing]
    slower, faster, close = [], [], []
    for side in sides:
        if side.ours or not side.rate:
            continue
        ratio = side.row.number("ratio") or ours.rate / side.rate
        if _overlap(ours.rates, side.rates):
            close.append(f"{side.title} ({ratio:.2f} times)")
        elif ratio >= 1:
            slower.append(f"{ratio:.2f} times {side.title}")
        else:
            less = side.agree is not None and (ours.agree or 0) - side.agree > _AGREES_LESS
            wrong = f" with {percent(side.agree)} of its ids the reference's own" if less else ""
            faster.append(f"{side.title}, which is {1 / ratio:.2f} times as fast{wrong}")
    said = [f"{start}mini-sglang gives {number(ours.rate, 1)} tokens/s."]
    if slower:
        said.append(f"That is {several(slower)}.")
    if close:
        said.append(f"Not clearly apart from {several(close)}: runs of both overlap.")
    if faster:
        said.append(f"Behind {several(faster)}.")
    return [*said, *missing]


def _overlap(a: list[float], b: list[float]) -> bool:
    return bool(a and b) and min(a) <= max(b) and min(b) <= max(a)


def _rates(sides: list[Side], slug: str, of: str) -> BarChart:
    bars = []
    for side in sides:
        ratio = side.row.number("ratio")
        bars.append(
            Bar(
                label=side.title,
                value=side.rate,
                style=side.style,
                detail="" if side.agree is None or side.reason else f"{percent(side.agree)} of ids agree",
                points=() if side.reason else tuple(side.rates),
                note="" if ratio is None or side.ours else f"ours is {ratio:.2f}×",
                reason=side.reason,
                ours=side.ours,
            )
        )
    return BarChart(
        slug=slug,
        title=f"Throughput{of}",
        caption="The longer the better. A bar is the table's figure, a dot one run, and the line through the "
        "dots goes from the slowest to the fastest. “Ids agree”: the share of greedy ids that the float32 "
        "reference chooses too. What has no valid figure has no bar, but its reason.",
        axis="output tokens per second",
        bars=tuple(bars),
    )


def _firsts(sides: list[Side], slug: str, of: str) -> StripChart:
    strips = [
        Strip(side.title, tuple(1e3 * first for first in side.firsts), side.style, side.ours)
        for side in sides
        if side.firsts and not side.reason
    ]
    return StripChart(
        slug=slug,
        title=f"Time to first token{of}",
        caption="The further left the better. A dot is one request, the upright stroke is the median.",
        axis="time to first token, ms",
        strips=tuple(strips),
        log=wide_apart([value for strip in strips for value in strip.values]),
    )


_COLUMNS = (
    Column("peer", figure=False),
    Column("tokens"),
    Column("time", "s"),
    Column("rate", "tokens/s"),
    Column("runs", "min – max"),
    Column("TTFT", "ms"),
    Column("ITL", "ms"),
    Column("ours", "÷ peer"),
    Column("ids", "agree"),
    Column("equal", "first ids"),
    Column("peak", "MB"),
    Column("start", "s"),
)


def _table(sides: list[Side], group: str) -> Table:
    rows = []
    for side in sides:
        row = side.row
        rates = f"{number(min(side.rates), 1)} – {number(max(side.rates), 1)}" if side.rates else "–"
        ratio = "–" if side.ours else number(row.number("ratio"), 2)
        cells = (
            side.title,
            number(row.number("tokens"), 0),
            number(row.number("seconds"), 2),
            number(row.number("tokens_per_s"), 1),
            rates,
            scaled(row.number("ttft"), 1e3, 0),
            scaled(row.number("itl"), 1e3, 1),
            ratio,
            percent(side.agree),
            number(row.number("same_until"), 0),
            number(row.number("peak_mb"), 0),
            number(row.number("start_seconds"), 1),
        )
        rows.append(Row(cells, side.ours, side.reason))
    return Table(group or "All peers", _COLUMNS, tuple(rows))


def _notes(sides: Iterable[Side], group: str) -> list[str]:
    found: list[str] = []
    for side in sides:
        name = f"{side.title} ({group})" if group else side.title
        found.extend(f"{name}: {note}" for note in side.row.texts("notes"))
        for reason in dict.fromkeys(side.dropped):
            count = side.dropped.count(reason)
            found.append(f"{name}: {count} run{'s' * (count > 1)} left out of the charts: {reason}")
        rate = side.rate
        if rate and side.rates and not 0.98 * min(side.rates) <= rate <= 1.02 * max(side.rates):
            found.append(
                f"{name}: its row says {number(rate, 1)} tokens/s, which is outside of what its runs give, "
                f"{number(min(side.rates), 1)} to {number(max(side.rates), 1)}"
            )
    return found
