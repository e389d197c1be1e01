"""The rows as text."""

from __future__ import annotations

from typing import Any

from mini_sglang.bench.runs import Run, row, set_ratios
from mini_sglang.bench.sides import Side
from mini_sglang.bench.table import table


def measured(name: str, group: str = "bf16", seconds: float = 1.0, **fields: Any) -> dict[str, Any]:
    ids = list(range(2000))
    run = Run(name, group, 1, 1, 9, ids, seconds, 0.25, None, wall=seconds, **fields)
    return row(Side(name, name.title(), group), [run], None, start_seconds=1.25)


def test_a_row_shows_its_figures_and_what_makes_them_doubtful() -> None:
    almost = [0, *range(1, 1999), 0]
    rows = [
        measured("ours", choices=list(range(2000))),
        measured("peer", seconds=2.0, choices=almost, others=1.25),
        row(Side("gone", "Gone", "bf16", notes=("a note",)), [], "it is not installed"),
        measured("other", group="gguf Q4_1"),
    ]
    set_ratios(rows, "ours")
    lines = list(table(rows))
    heads, ours, peer, gone, _, heads_again, other = lines[:7]
    assert heads.startswith("bf16:") and heads_again.startswith("gguf Q4_1:")
    columns = {name: heads.index(name) + len(name) for name in ("tokens", "ratio", "agree", "TTFT ms")}
    assert heads.split()[1:] == heads_again.split()[2:]

    def cell(line: str, name: str) -> str:
        return line[: columns[name]].split("  ")[-1].strip()

    assert (cell(ours, "tokens"), cell(peer, "tokens")) == ("2000", "2000")
    assert (cell(ours, "ratio"), cell(peer, "ratio"), cell(other, "ratio")) == ("", "2.00", "")
    # 99.95 % is not all of them.
    assert (cell(ours, "agree"), cell(peer, "agree"), cell(other, "agree")) == ("100.0%", "99.9%", "-")
    assert cell(ours, "TTFT ms") == "250"
    assert peer.endswith("NOT QUIET") and "NOT QUIET" not in ours
    assert gone.split("  ", 1)[1].strip() == "invalid: it is not installed"
    assert "Gone (bf16): a note." in lines
    assert any(line.startswith("Peer (bf16): NOT QUIET: ") for line in lines)


def test_where_nothing_counts_there_are_reasons_only() -> None:
    made = row(Side("gone", "Gone", "gguf"), [], "it is not installed")
    lines = list(table([made]))
    assert len(lines) == 2 and lines[1] == "Gone  invalid: it is not installed"
