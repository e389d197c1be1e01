"""Records of kind ``local`` and ``server``: peers side by side, in groups of the same weights."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
        reason: why it has no figure; empty where it has one.
        runs: all of it; ``dropped``: why some of them do not count.
        rates: tokens a second of each round of which every run counts.
    """

    row: Fields
    title: str
    group: str
    ours: bool
    style: int
    reason: str
    runs: list[Fields] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)

    @property
    def rate(self) -> float | None:
        """The row's tokens a second; None where the row is not valid."""
        return None if self.reason else self.row.number("tokens_per_s")

    @property
    def firsts(self) -> list[float]:
        """Seconds to the first token of every answer that counts."""
        return [first for run in self.runs if run.flag("valid") is not False for first in _firsts_of(run)]

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
        found = findings(sides, name)
        section.findings.extend([" ".join(found)] if len(groups) > 1 else found)
        charts: list[Chart] = [_rates(sides, f"throughput{end}", of), _firsts(sides, f"ttft{end}", of)]
        section.charts.extend(chart for chart in charts if not chart.empty)
        section.tables.append(_table(sides, name))
        section.notes.extend(_notes(sides, name))
    if any(side.agree is not None for sides in groups.values() for side in sides):
        section.notes.append("“Ids agree”: the share of greedy ids that the float32 reference chooses too.")
    section.notes.extend(source.settings.texts("notes"))
    return section


def read_sides(source: Source) -> dict[str, list[Side]]:
    """The rows of each group, the fastest first. A style belongs to a peer, in all groups."""
    styles: dict[str, int] = {}
    groups: dict[str, list[Side]] = {}
    sides: dict[str, list[Side]] = {}
    for row in source.rows:
        peer, group = row.text("peer"), row.text("group")
        ours = is_ours(row)
        # Style 0 is ours alone.
        style = 0 if ours else styles.setdefault(peer, len(styles) + 1)
        reason = ""
        if row.flag("valid") is False or row.number("tokens_per_s") is None:
            reason = row.text("reason") or "no figure and no reason in the file"
        side = Side(row, row.text("title") or peer, group, ours, style, reason)
        groups.setdefault(group, []).append(side)
        sides.setdefault(peer, []).append(side)
    rounds: dict[tuple[int, str], list[Fields]] = {}
    for place, run in enumerate(source.runs):
        side_of = _side_of(run, sides.get(run.text("peer"), []))
        if side_of is not None:
            side_of.runs.append(run)
            key = id(side_of), run.text("round") or f"run {place}"
            rounds.setdefault(key, []).append(run)
            if run.flag("valid") is False:
                side_of.dropped.append(run.text("reason") or "no reason in the file")
    for side in (side for found in groups.values() for side in found):
        side.rates.extend(
            rate for (owner, _), runs in rounds.items() if owner == id(side) and (rate := _rate(runs))
        )
    return {name: sorted(found, key=lambda side: -(side.rate or 0)) for name, found in groups.items()}


def _side_of(run: Fields, sides: Sequence[Side]) -> Side | None:
    """The peer's row that a run belongs to; None where nobody can say which.

    Rows may tell parts of a group of runs apart: of ``bf16`` the burst is ``bf16, 8 at once``.
    """
    if "group" in run:
        group = run.text("group")
        exact = [side for side in sides if side.group == group]
        burst = run.text("turn") == "burst"
        sides = exact or [
            side
            for side in sides
            if side.group.startswith(f"{group}, ") and side.group.endswith("at once") is burst
        ]
    return sides[0] if len(sides) == 1 else None


def _rate(runs: Sequence[Fields]) -> float | None:
    """Tokens a second of the turns of one round; None where one of them does not count."""
    if any(run.flag("valid") is False for run in runs):
        return None
    tokens = sum(run.count("ids") or run.number("output_tokens") or 0 for run in runs)
    seconds = sum(run.number("seconds") or 0 for run in runs)
    return tokens / seconds if tokens and seconds else None


def _firsts_of(run: Fields) -> list[float]:
    """Seconds to the first token of each prompt, from whichever of the fields has it."""
    firsts = [times[0] for times in run.lists("times") if times]
    first = run.number("first")
    return firsts or ([] if first is None else [first])


def is_ours(row: Fields) -> bool:
    return row.text("peer").lower() in OURS or row.text("title").lower().startswith("mini-sglang")


def findings(sides: list[Side], group: str) -> list[str]:
    """Who is faster, also where it is not us; what lies within the spread of the rounds is called so."""
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
        said.append(f"Not clearly apart from {several(close)}: rounds of both overlap.")
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
        caption="The longer the better. A bar is the table's figure, a dot one round, and the line through "
        "the dots goes from the slowest to the fastest. What has no valid figure has no bar, but its reason.",
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
        caption="The further left the better. A dot is one answer, the upright stroke is the median.",
        axis="time to first token, ms",
        strips=tuple(strips),
        log=wide_apart([value for strip in strips for value in strip.values]),
    )


_COLUMNS = (
    Column("peer", figure=False),
    Column("tokens"),
    Column("time", "s"),
    Column("rate", "tokens/s"),
    Column("rounds", "min – max"),
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
                f"{name}: its row says {number(rate, 1)} tokens/s, which is outside of what its rounds give, "
                f"{number(min(side.rates), 1)} to {number(max(side.rates), 1)}"
            )
    return found
