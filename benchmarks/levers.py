"""Every lever off and on: writes docs/levers.md.

    python benchmarks/levers.py [--model FOLDER_OR_GGUF] [--plain FOLDER] [--rounds 5] [--only NAME …]

Each side of a row is an engine (or a pool) in a process of its own, with nothing but its settings different.
They take turns at the same prompts, in the other order each round, after one round to warm up. Off and on are
medians over the rounds; the ratio is the median of the rounds' own, above 1 where on is better.
``lever_table.py`` has the rows.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from lever_table import FIGURES, NOT_LEVERS, ROWS, SECTIONS, Row

from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.bench.machine import busy_seconds, machine
from mini_sglang.bench.process import PeerError, Process
from mini_sglang.config import Settings, setting_fields

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "benchmarks" / "lever_worker.py"
Rounds = list[dict[str, float]]
PAYS = 1.05
ENVIRONMENT = {spec.name: spec.metadata["env"][0] for spec in setting_fields()}


class Others:
    """The cores that other processes kept busy while the engines were measured."""

    def __init__(self) -> None:
        self.busy = self.seconds = 0.0

    def add(self, busy: float, seconds: float) -> None:
        self.busy, self.seconds = self.busy + busy, self.seconds + seconds

    def __str__(self) -> str:
        return f"{self.busy / self.seconds:.2f}" if self.seconds else "unknown"


def measure(row: Row, model: str, rounds: int, others: Others) -> tuple[Rounds, Rounds]:
    """The figures of every round, off and on.

    Raises:
        PeerError: a side cannot be started or fails.
    """
    sides: list[tuple[Process, Mapping[str, Any], Rounds]] = []
    try:
        for side in (row.off, row.on):
            settings = {**row.base, **({} if row.request else side)}
            options = {"model": model, "settings": settings, "pool": row.pool}
            given = {**row.given, **(side if row.request else {})}
            sides.append((Process(WORKER, sys.executable, options), given, []))
        for turn in range(rounds + 1):
            for process, given, runs in sides if turn % 2 else sides[::-1]:
                start, busy = time.perf_counter(), busy_seconds()
                reply = process.ask(do=row.work, turn=turn, **given)
                if turn:
                    runs.append(reply["answer"])
                if not row.pool:  # whose engines are processes of their own
                    own = reply["cpu_seconds"]
                    others.add(max(0.0, busy_seconds() - busy - own), time.perf_counter() - start)
    finally:
        for process, _, _ in sides:
            process.close()
    return sides[0][2], sides[1][2]


def verdict(ratios: Sequence[float]) -> str:
    middle = statistics.median(ratios)
    if middle >= PAYS and min(ratios) > 1:
        return "pays"
    if middle <= 1 / PAYS and max(ratios) < 1:
        return "**does not pay here**"
    return "no difference shown"


def shown(settings: Mapping[str, Any]) -> str:
    def value(one: Any) -> str:
        return str(int(one)) if isinstance(one, bool) else str(one)

    names = {name: ENVIRONMENT.get(name, name) for name in settings}
    return ", ".join(f"`{names[name]}={value(one)}`" for name, one in settings.items())


def why(error: PeerError) -> str:
    """The last thing a side said, without the paths of this machine."""
    said = re.sub(r"^.* ended with status \d+: (?:[\w.]+: )?", "", str(error), flags=re.DOTALL)
    return re.sub(r"/\S*/", "…/", said).replace("|", "/")


def amount(value: float, unit: str) -> str:
    return f"{value:,.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"


def lines_of(row: Row, off: Rounds, on: Rounds) -> list[str]:
    """The row's lines of the table, one for each figure."""
    lines = []
    for name in row.figures:
        figure = FIGURES[name]
        before, after = ([one[name] for one in runs] for runs in (off, on))
        ratios = [b / a if figure.more else a / b for a, b in zip(before, after, strict=True)]
        cells = [
            f"{shown(row.off)} → {shown(row.on)}",
            row.says,
            figure.title,
            *(amount(statistics.median(values) * figure.scale, figure.unit) for values in (before, after)),
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f}–{max(ratios):.2f})",
            verdict(ratios),
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def head(model: Path, rounds: int, others: Others) -> list[str]:
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    about = " ".join(f"{name}={value}" for name, value in machine().items())
    words = [Path(word).name if "/" in word else word for word in sys.argv[1:]]
    return [
        "# Every lever, off and on",
        "",
        "Written by `benchmarks/levers.py` from a run; not to be edited by hand. A ratio above 1 means on is",
        "better; in brackets the least and the greatest of the rounds. A lever *pays* where the median is",
        "5 % or more better and no round was worse, and *does not pay here* where it is as much worse.",
        "",
        f"- command: `python benchmarks/levers.py {shlex.join(words)}`".rstrip(),
        f"- commit: {commit or 'unknown'}, {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {about}",
        f"- model: {model.name}; {rounds} rounds, the sides taking turns",
        f"- cores that other processes kept busy meanwhile, on average: {others}",
    ]


def report(done: Sequence[tuple[Row, list[str]]]) -> list[str]:
    out: list[str] = []
    for section, title in SECTIONS.items():
        rows = [line for row, lines in done if row.section == section for line in lines]
        if rows:
            out += ["", f"## {title}", "", "| lever | workload | figure | off | on | ratio | here |"]
            out += ["| --- | --- | --- | ---: | ---: | ---: | --- |", *rows]
    out += ["", "## Settings that are no levers of speed", "", "| variable | why |", "| --- | --- |"]
    return out + [f"| `{ENVIRONMENT.get(name, name)}` | {reason} |" for name, reason in NOT_LEVERS.items()]


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a local folder or .gguf file; by default what the engine would take")
    parser.add_argument("--plain", type=Path, help="a folder of the same model's plain weights")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="settings, in any case")
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="by default docs/levers.md; - with --only"
    )
    parser.add_argument("--json", type=Path, help="every round")
    args = parser.parse_args()
    model = resolve_model(Settings.resolve({"model": args.model}), notify=say).path.resolve()
    only = {name.lower() for name in args.only}
    rows = [row for row in ROWS if not only or only & {*row.off, *row.on}]
    if not rows:
        say(f"levers: no row is about {' or '.join(args.only)}")
        return 2
    others = Others()
    done: list[tuple[Row, list[str]]] = []
    raw: list[dict[str, Any]] = []
    failed = False
    for row in rows:
        try:
            if row.plain and args.plain is None:
                raise PeerError("it needs --plain, a folder of plain weights (starter_files.py makes one)")
            path = args.plain.resolve() if row.plain else model
            off, on = measure(row, str(path), args.rounds, others)
        except PeerError as error:
            failed = True
            lines = [
                f"| {shown(row.off)} → {shown(row.on)} | {row.says} | not measured: {why(error)} | | | | |"
            ]
        else:
            lines = lines_of(row, off, on)
            raw.append({"off": dict(row.off), "on": dict(row.on), "runs": {"off": off, "on": on}})
        done.append((row, lines))
        say("\n".join(lines))
    text = "\n".join([*head(model, args.rounds, others), *report(done)]) + "\n"
    output = args.output or ("-" if only else str(ROOT / "docs" / "levers.md"))
    if output == "-":
        print(text, end="")
    else:
        Path(output).write_text(text, encoding="utf-8")
    if args.json:
        args.json.write_text(json.dumps({"argv": sys.argv[1:], "rows": raw}, indent=1))
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
