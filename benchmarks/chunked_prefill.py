"""A long prompt beside answers that are being made: how long they stand still, with chunks and without.

    python benchmarks/chunked_prefill.py [--model FOLDER_OR_GGUF] [--long 6000] [--chunks 256 512 1024 2048]

Each setting has an engine in a process of its own; they take turns, in another order each round after one to
warm up. Figures are medians over the rounds, but the worst gap between two tokens of an answer, which is
given as the median and the worst of the rounds' worst. ``all tok/s`` counts prompt tokens too. ``burst`` is
many short prompts at once, for what chunks cost where no long prompt is.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.bench.machine import busy_seconds, machine
from mini_sglang.bench.process import Process
from mini_sglang.config import Settings

WORKER = Path(__file__).with_name("lever_worker.py")
LONG_FIGURES = {
    "worst_gap": "worst gap ms", "gap_during": "gap during ms", "gap_otherwise": "median gap ms",
    "long_first": "long's first s", "all_tokens_per_s": "all tok/s",
}  # fmt: skip
BURST_FIGURES = {"first_mean": "first ms", "tokens_per_s": "tok/s"}


def sides(chunks: list[int]) -> dict[str, dict[str, Any]]:
    off: dict[str, dict[str, Any]] = {"off": {"chunked_prefill": False}}
    return off | {f"{size}": {"chunked_prefill": True, "prefill_chunk_size": size} for size in chunks}


def measure(args: argparse.Namespace, path: str) -> dict[str, dict[str, list[dict[str, float]]]]:
    base = {"num_threads": args.threads, "kv_token_budget": 2 * args.long + 8192}
    runs: dict[str, dict[str, list[dict[str, float]]]] = {"long": {}, "burst": {}}
    processes: dict[str, Process] = {}
    long = {"streams": args.streams, "prompt": 200, "new": args.new, "long": args.long}
    burst = {"requests": 16, "prompt": 400, "new": 32}
    try:
        for name, settings in sides(args.chunks).items():
            options = {"model": path, "settings": base | settings}
            processes[name] = Process(WORKER, sys.executable, options)
        for turn in range(args.rounds + 1):
            names = list(processes) if turn % 2 else list(processes)[::-1]
            for name in names:
                process = processes[name]
                for kind, do, given in (("long", "long_beside", long), ("burst", "burst", burst)):
                    start, busy = time.perf_counter(), busy_seconds()
                    reply = process.ask(do=do, turn=turn, **given)
                    others = busy_seconds() - busy - reply["cpu_seconds"]
                    figures = reply["answer"] | {"others": others / (time.perf_counter() - start)}
                    if turn:
                        runs[kind].setdefault(name, []).append(figures)
            print(f"round {turn} of {args.rounds}", file=sys.stderr)
    finally:
        for process in processes.values():
            process.close()
    return runs


def show(kind: str, runs: dict[str, list[dict[str, float]]], shown: dict[str, str]) -> None:
    print(f"\n{kind:8}" + "".join(f"{title:>18}" for title in shown.values()) + f"{'others’ cores':>15}")
    for name, rounds in runs.items():
        cells = []
        for figure, title in shown.items():
            values = [one[figure] * (1e3 if title.endswith("ms") else 1) for one in rounds]
            text = f"{statistics.median(values):.1f}"
            cells.append(f"{text} ({max(values):.1f})" if figure == "worst_gap" else text)
        others = statistics.median(one["others"] for one in rounds)
        print(f"{name:8}" + "".join(f"{cell:>18}" for cell in cells) + f"{others:15.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a local folder or .gguf file; by default what the engine would take")
    parser.add_argument("--long", type=int, default=6000, help="tokens of the long prompt")
    parser.add_argument("--streams", type=int, default=4, help="answers being made beside it")
    parser.add_argument("--new", type=int, default=160, help="tokens of each")
    parser.add_argument("--chunks", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    path = resolve_model(
        Settings.resolve({"model": args.model}), notify=lambda line: print(line, file=sys.stderr)
    ).path
    runs = measure(args, str(path.resolve()))
    print(" ".join(f"{name}={value}" for name, value in machine().items()))
    print(
        f"{path.name}: {args.streams} answers of {args.new} tokens to prompts of 200, a prompt of {args.long}"
    )
    show("chunk", runs["long"], LONG_FIGURES)
    show("burst", runs["burst"], BURST_FIGURES)
    if args.json:
        args.json.write_text(json.dumps({"argv": sys.argv[1:], "runs": runs}, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
