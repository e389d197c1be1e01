"""Kernels and answers beside their twins, what the card gives, the public workload, and Hugging Face's.

    benchmarks/gpu.sh [--json FILE] [--minutes 9] [--only PART,PART] [--set NAME=VALUE]...
    benchmarks/gpu.sh --device cpu --tiny

Each part runs in a process of its own within a budget of seconds, and is ended where it takes longer: what
it had said by then counts. The JSON is written after every part. Exit status 2 without CUDA, 1 where a kernel
differs from its twin or a part broke.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mini_sglang.bench.machine import Limits
from mini_sglang.bench.record import Record
from mini_sglang.errors import MiniSglangError

ROOT = Path(__file__).parents[2]
MINUTES = 9.0
# Seconds of each part at most where there are so many minutes; together they fit.
BUDGETS: Mapping[str, float] = {
    "kernels": 110,
    "answers": 90,
    "limits": 15,
    "small": 60,
    "large": 110,
    "generate": 70,
    "batching": 60,
}
TITLES = {
    "kernels": "kernels and their twins",
    "answers": "answers of tiny models and transformers'",
    "limits": "what the card gives",
    "small": "Qwen3-0.6B, random weights",
    "large": "Qwen3-14B, random weights",
    "generate": "Hugging Face generate, Qwen3-0.6B",
    "batching": "Hugging Face continuous batching, Qwen3-0.6B",
}
PEERS = ("generate", "batching")
# Whose time goes to compiling kernels, each on one core: so many processes share the part's rows.
SHARES: Mapping[str, int] = {"kernels": 8, "answers": 6}
_LEAST_SECONDS = 5.0
_LOOK_SECONDS = 0.5

Row = dict[str, Any]


class Ended(Exception):
    """A part that did not run to its end; says why."""


def run_part(
    name: str,
    options: Mapping[str, Any],
    seconds: float,
    take: Any,
    stop: threading.Event | None = None,
) -> None:
    """Run a part and give every row it says to ``take``, until ``stop`` is set.

    Raises:
        Ended: it was cut off or broke.
    """
    stop = stop or threading.Event()
    child = subprocess.Popen(
        [sys.executable, "-m", "benchmarks.gpu.parts", name, json.dumps(options)],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        cwd=ROOT,
        env=environment(options["device"]),
        start_new_session=True,
        text=True,
    )
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def read() -> None:
        assert child.stdout is not None
        for line in child.stdout:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, daemon=True).start()
    end = time.monotonic() + seconds
    try:
        while True:
            try:
                line = lines.get(timeout=max(0.0, min(end - time.monotonic(), _LOOK_SECONDS)))
            except queue.Empty:
                if stop.is_set() or time.monotonic() >= end:
                    raise Ended(f"cut off after {seconds:.0f} s") from None
                continue
            if line is None:
                break
            if line.startswith("@"):
                take(json.loads(line[1:]))
            else:
                print(line, end="", file=sys.stderr)
        try:
            status = child.wait(max(0.0, end - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise Ended(f"cut off after {seconds:.0f} s, at its end") from None
        if status:
            raise Ended(f"broke with exit status {status}")
    finally:
        # What it started in turn is of its session.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()


def run_shares(name: str, options: Mapping[str, Any], seconds: float, take: Any) -> None:
    """As ``run_part``, in several processes side by side where a part can be shared out."""
    shares = min(SHARES.get(name, 1), os.cpu_count() or 1) if options["device"] == "cuda" else 1
    lock, stop = threading.Lock(), threading.Event()
    ends: list[str] = []

    def take_one(row: Row) -> None:
        with lock:
            take(row)

    def run(share: int) -> None:
        try:
            run_part(name, {**options, "share": share, "shares": shares}, seconds, take_one, stop)
        except Ended as error:
            ends.append(str(error))

    threads = [threading.Thread(target=run, args=(share,)) for share in range(shares)]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    finally:
        stop.set()
    if ends:
        # What broke matters more than what took too long.
        raise Ended(min(ends, key=lambda end: "cut off" in end))


def environment(device: str) -> dict[str, str]:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}
    if device == "cpu":
        own["TRITON_INTERPRET"] = "1"
    return {**os.environ, **own}


class Report:
    """The rows so far, as a table and as JSON.

    Attributes:
        broken: whether anything went wrong that is no matter of time.
    """

    def __init__(self, record: Record, path: Path | None) -> None:
        self.record = record
        self._path = path
        self.broken = False

    def take(self, part: str, row: Row) -> None:
        rows = self.record.rows
        row = {"part": part, **row}
        same = [place for place, one in enumerate(rows) if (one["part"], one["name"]) == (part, row["name"])]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        self.broken |= row.get("ok") is False

    def value(self, part: str, name: str) -> float | None:
        found = [row["value"] for row in self.record.rows if (row["part"], row["name"]) == (part, name)]
        return found[0] if found else None

    def write(self) -> None:
        bandwidth, matrix = (self.value("limits", name) for name in ("copy bandwidth", "bf16 matrix product"))
        if bandwidth and matrix:
            self.record.limits = Limits(bandwidth, 1e3 * matrix, 0)
        if self._path is not None:
            self.record.write(self._path)

    def table(self) -> str:
        lines: list[str] = []
        for part, title in TITLES.items():
            rows = [row for row in self.record.rows if row["part"] == part]
            if rows:
                lines += ["", title]
                lines += [shown(row) for row in rows]
        return "\n".join(lines)


def shown(row: Row) -> str:
    value, unit = row["value"], row["unit"]
    figure = "" if value is None else f"{value:.2g}" if unit == "error" else f"{value:,.1f}"
    verdict = {True: "ok  ", False: "BAD ", None: "    "}[row.get("ok")]
    return f"  {verdict}{row['name']:46} {figure:>12} {unit:9} {row['note']}".rstrip()


def settings_of(pairs: list[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise SystemExit(f"--set {pair}: it must be NAME=VALUE, such as COMPILE_MODEL=0.")
        found[name.lower()] = value
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="benchmarks/gpu.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write what is measured there")
    parser.add_argument("--minutes", type=float, default=MINUTES, help="of all parts together")
    parser.add_argument("--only", default=",".join(BUDGETS), help=f"of {', '.join(BUDGETS)}")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE", help="of the engine")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--tiny", action="store_true", help="tiny models and few requests")
    options = parser.parse_args(argv)
    options.parts = options.only.split(",")
    if unknown := set(options.parts) - set(BUDGETS):
        parser.error(f"--only: there is no {', '.join(sorted(unknown))}; there are {', '.join(BUDGETS)}")
    if options.device == "cpu" and not options.tiny:
        parser.error("--device cpu is a rehearsal, and needs --tiny")
    return options


def main(argv: list[str] | None = None) -> int:
    options = parse(argv)
    end = time.monotonic() + 60 * options.minutes
    given: dict[str, Any] = {
        "device": options.device, "tiny": options.tiny, "settings": settings_of(options.set),
    }  # fmt: skip
    found: list[Row] = []
    try:
        run_part("device", given, 60, found.append)
    except Ended as error:
        print(f"PyTorch could not be asked for CUDA: {error}.", file=sys.stderr)
        return 2
    if found[0].get("refused"):
        print("There is no CUDA here: PyTorch finds no GPU it can use.", file=sys.stderr)
        return 2
    card = found[0]
    asked = {**given, "minutes": options.minutes, "parts": options.parts, "card": card["note"]}
    report = Report(Record("gpu", asked, versions=card["versions"]), options.json)
    print(f"{card['note']}; {', '.join(f'{name} {text}' for name, text in card['versions'].items())}")
    for part in (part for part in BUDGETS if part in options.parts):
        start, left = time.monotonic(), end - time.monotonic()
        seconds = min(BUDGETS[part] * options.minutes / MINUTES, left)
        if seconds < _LEAST_SECONDS:
            report.take(part, {"name": "not run", "value": None, "unit": "", "note": "no time was left"})
            continue
        print(f"{TITLES[part]} …", file=sys.stderr, flush=True)
        more = {**given, "bandwidth": report.value("limits", "copy bandwidth")}
        try:
            run_shares(part, more, seconds, lambda row, part=part: report.take(part, row))
        except Ended as error:
            # What Hugging Face's cannot do is no fault of what is measured.
            ok = None if "cut off" in str(error) or part in PEERS else False
            report.take(part, {"name": "ended", "value": None, "unit": "", "note": str(error), "ok": ok})
        took = time.monotonic() - start
        report.record.runs.append({"part": part, "seconds": round(took, 1)})
        try:
            report.write()
        except MiniSglangError as error:
            print(error, file=sys.stderr)
            return 2
    report.write()
    print(report.table())
    return int(report.broken)


if __name__ == "__main__":
    sys.exit(main())
