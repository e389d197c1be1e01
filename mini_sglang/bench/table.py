"""The rows of a comparison as text."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from mini_sglang.bench.runs import QUIET

Row = Mapping[str, Any]
NONE = "-"


def _number(name: str, digits: int, scale: float = 1.0) -> Callable[[Row], str]:
    def shown(row: Row) -> str:
        value = row[name]
        return NONE if value is None else f"{value * scale:.{digits}f}"

    return shown


def _spread(row: Row) -> str:
    low, high = row["spread"]
    return f"{low:.1f} to {high:.1f}"


def _agree(row: Row) -> str:
    # Rounded down, so that 100 % is what it says.
    return NONE if row["agree"] is None else f"{int(row['agree'] * 1000) / 10:.1f}%"


def _ratio(row: Row) -> str:
    return "" if row["ratio"] is None else f"{row['ratio']:.2f}"


COLUMNS: Sequence[tuple[str, Callable[[Row], str]]] = (
    ("tokens", _number("tokens", 0)),
    ("seconds", _number("seconds", 2)),
    ("tokens/s", _number("tokens_per_s", 1)),
    ("(rounds)", _spread),
    ("ratio", _ratio),
    ("TTFT ms", _number("ttft", 0, 1e3)),
    ("ITL ms", _number("itl", 1, 1e3)),
    ("agree", _agree),
    ("same until", _number("same_until", 0)),
    ("start s", _number("start_seconds", 1)),
    ("peak MB", _number("peak_mb", 0)),
)
LEGEND = (
    "Tokens and seconds are a round's; all but start and peak are medians over the rounds. ratio: tokens/s "
    "of mini-sglang over this peer's in the same group; above 1 mini-sglang is faster.",
    "agree: ids that the float32 reference would choose too after the same ids. same until: leading ids "
    "equal to the reference's own answers of round 1. peak: memory of all the peer's processes, added up.",
)


Columns = Sequence[tuple[str, Callable[[Row], str]]]
TTFB = ("TTFB ms", _number("ttfb", 0, 1e3))
"""Of comparisons over HTTP: to the first byte of the body, whatever is in it."""


def table(rows: Sequence[Row], columns: Columns = COLUMNS) -> Iterator[str]:
    """A line for each row under its group's, the notes under all.

    ``rows`` are as ``runs.row`` makes them; ``-`` stands for what a peer does not show.
    """
    width = max([len("peer"), *(len(row["title"]) for row in rows)])
    cells = [[show(row) for _, show in columns] if row["valid"] else [] for row in rows]
    widths = [
        max([len(name), *(len(line[column]) for line in cells if line)])
        for column, (name, _) in enumerate(columns)
    ]
    heads = "  ".join(name.rjust(size) for (name, _), size in zip(columns, widths, strict=True))
    group = None
    for row, line in zip(rows, cells, strict=True):
        if row["group"] != group:
            if group is not None:
                yield ""
            group = row["group"]
            yield f"{group}:".ljust(width) + "  " + heads
        title = row["title"].ljust(width)
        if row["valid"]:
            shown = "  ".join(one.rjust(size) for one, size in zip(line, widths, strict=True))
            flag = "  NOT QUIET" if row["others"] > QUIET else ""
            yield f"{title}  {shown}{flag}"
        else:
            yield f"{title}  invalid: {row['reason']}"
    if any(row["valid"] for row in rows):
        yield ""
        for words in LEGEND:
            yield from sentence(words)
    for row in rows:
        for note in row["notes"]:
            yield from sentence(f"{row['title']} ({row['group']}): {note}.")


def sentence(text: str) -> list[str]:
    """A note in lines about as wide as the table."""
    return textwrap.wrap(text, 120, subsequent_indent="  ")
