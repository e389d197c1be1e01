"""Rows of reliability over real servers, with tiny random models made on the spot.

    python -m benchmarks.reliability load   [ROW …] [--size full|ci|FRACTION] [--json FILE]
    python -m benchmarks.reliability faults [ROW …] [--size full|ci|FRACTION] [--json FILE]

``load`` has L1, L3, L4, F3 and F4; ``faults`` has F1, F2, F5, F6 and F7. At the end is a table of what must
hold and what was seen. Exit status 1 where something did not hold or a row broke.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path

from benchmarks.reliability.report import CI, FULL, Row, RowRun, Size, as_json, table

GROUPS = ("load", "faults")


def rows_of(group: str) -> Mapping[str, RowRun]:
    """The rows of a group by name; each group is a module with ``ROWS``."""
    rows: Mapping[str, RowRun] = importlib.import_module(f"benchmarks.reliability.{group}").ROWS
    return rows


def size_of(text: str) -> Size:
    if text in ("ci", "full"):
        return CI if text == "ci" else FULL
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not ci, full or a fraction from 0 to 1")
    return Size(fraction)


def run(name: str, row_run: RowRun, size: Size) -> Row:
    """Run a row; one that breaks is a row whose check failed."""
    started = time.perf_counter()
    try:
        row = row_run(size)
    except Exception as error:
        traceback.print_exc()
        row = Row(name, "broke")
        row.check("the row runs to its end", f"{type(error).__name__}: {error}"[:300], False)
    row.seconds = round(time.perf_counter() - started, 1)
    return row


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.reliability",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    groups = parser.add_subparsers(dest="group", required=True, metavar="load|faults")
    for group in GROUPS:
        one = groups.add_parser(group, help=f"the rows of {group}")
        one.add_argument("rows", nargs="*", metavar="ROW", help="names of rows; all of them by default")
        one.add_argument(
            "--size", type=size_of, default=FULL, help="full (the default), ci, or a fraction of full"
        )
        one.add_argument("--json", type=Path, metavar="FILE", help="write checks and figures there")
    args = parser.parse_args(argv)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)
    known = rows_of(args.group)
    names = [name.upper() for name in args.rows] or list(known)
    if unknown := [name for name in names if name not in known]:
        parser.error(f"there is no row {unknown[0]} in {args.group}; there are {', '.join(known)}")
    rows: list[Row] = []
    for name in names:
        print(f"{name} …", file=sys.stderr, flush=True)
        rows.append(run(name, known[name], args.size))
        bad = len(rows[-1].failures())
        print(
            f"{name} {rows[-1].title}: {rows[-1].seconds:.0f} s, {'ok' if not bad else f'{bad} NOT OK'}",
            file=sys.stderr,
            flush=True,
        )
    print(table(rows))
    if args.json:
        report = {
            "argv": sys.argv[1:],
            "cpus": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "rows": as_json(rows),
        }
        args.json.write_text(json.dumps(report, indent=1))
    return 1 if any(row.failures() for row in rows) else 0


if __name__ == "__main__":
    raise SystemExit(main())
