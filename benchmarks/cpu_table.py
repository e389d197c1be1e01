"""The CPU's table: ours against each peer at the work it is known for, and against what the machine gives.

    python benchmarks/cpu_table.py ROW … [--rounds 5] [--reference] [--json FILE]
    python benchmarks/cpu_table.py --list

``starter_files.py`` and ``random_model.py`` make the models, but for the Q4_1 GGUF.

A row is WORK/WEIGHTS (``one-stream/q4_1``); the name of a work is all its rows. Every engine has a process of
its own; all get the same token ids, greedy, end-of-text ignored, and give equally many. They take turns, the
order turned round each round after one to warm up, with a pause between, in which threads that spin go to
sleep. Memory's bandwidth and the rate of bf16 products are measured in each round too. Figures are medians.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cpu_report import QUIET, RowReport, Run, as_json, lines
from cpu_rows import Ids, Reply, Row, Side, Text, all_rows

from mini_sglang.bench.machine import busy_seconds, machine
from mini_sglang.bench.process import PeerError, Process

REST = 0.4
"""Seconds between two turns; Intel's OpenMP spins for 0.2 after its last work."""
ENGINES = {"llama": "llama.cpp", "openvino": "OpenVINO GenAI", "vllm": "vLLM", "transformers": "Hugging Face"}


class Table:
    """Runs rows with the models and interpreters that the command line names."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args

    def run(self, row: Row) -> RowReport:
        """All rounds of a row.

        Raises:
            PeerError: a file or interpreter is missing, or an engine failed.
        """
        fresh = row.sides[0].task.fresh
        report = RowReport(row, Path(self.model("ours", row.weights)))
        processes: dict[tuple[str, str], Process] = {}
        try:
            # Ours first: it makes the ids of the prompts.
            processes[row.sides[0].key] = ours = self.start(row, row.sides[0])
            text = Text(ours.ask(do="encode", text=self.text())["answer"])
            if self.args.reference and not fresh:
                report.reference = self.reference(row, text)
            for side in row.sides:
                if side.key not in processes:
                    processes[side.key] = self.start(row, side)
            limits = Process("limits", sys.executable, {"threads": self.args.threads})
            processes[("limits", "")] = limits
            report.abouts = {side.name: processes[side.key].about for side in row.sides}
            report.abouts["limits"] = limits.about
            for turn in range(self.args.rounds + 1):
                sides = row.sides if turn % 2 else row.sides[::-1]
                for side in sides:
                    run = self.turn(row, side, processes[side.key], text, turn)
                    if turn:
                        report.runs.append(run)
                time.sleep(REST)
                if turn:
                    report.bandwidth.append(limits.ask(do="bandwidth")["answer"])
                    if row.share == "matrix":
                        report.matrix.append(limits.ask(do="matrix")["answer"])
                print(f"{row.name}: round {turn} of {self.args.rounds}", file=sys.stderr)
            if row.name.startswith("batch-64"):
                report.spread = self.spread(row, ours, text)
        finally:
            for process in processes.values():
                process.close()
        return report

    def turn(self, row: Row, side: Side, process: Process, text: Text, turn: int) -> Run:
        prompts = side.task.prompts(text, turn)
        rest(self.args.wait)
        if side.task.fresh:
            start = time.perf_counter()
            process = self.start(row, side)
            reply = process.ask(ids=prompts, new=side.task.new, cold=True)
            reply["seconds"] = time.perf_counter() - start
            process.close()
        else:
            if side.task.primed is not None:
                process.ask(ids=side.task.primed(text, turn), new=1, cold=True)
            start, busy = time.perf_counter(), busy_seconds()
            reply = process.ask(ids=prompts, new=side.task.new, cold=side.task.primed is None)
            others = busy_seconds() - busy - reply["cpu_seconds"]
            reply["others"] = max(0.0, others) / (time.perf_counter() - start)
        check(side.name, reply, prompts, side.task.new)
        return Run(side.name, turn, sum(map(len, prompts)), side.task.figure(reply, prompts), reply)

    def spread(self, row: Row, ours: Process, text: Text) -> Reply:
        """One more run of the first side, for when each request had its first and its last id."""
        task = row.sides[0].task
        return ours.ask(ids=task.prompts(text, 0), new=task.new, cold=True, spread=True)

    def reference(self, row: Row, text: Text) -> Ids:
        """What the same weights answer in float32 to the first round's prompts."""
        options = {"model": self.model("ours", row.weights), "threads": self.args.threads, "dtype": "fp32"}
        process = Process("transformers", self.python("transformers"), options)
        try:
            task = row.sides[0].task
            ids: Ids = process.ask(ids=task.prompts(text, 1), new=task.new, cold=True)["ids"]
        finally:
            process.close()
        return ids

    def start(self, row: Row, side: Side) -> Process:
        text, task = Text([0]), side.task
        prompts = task.prompts(text, 0)
        options: dict[str, Any] = {
            "model": self.model(side.engine, row.weights),
            "threads": self.args.threads,
            "prefix_cache": task.primed is not None,
            "requests": len(prompts),
            "tokens": max(map(len, prompts)) + task.new,
            **side.options,
        }
        if side.engine == "ours":
            given = dict(pair.split("=", 1) for pair in self.args.setting)
            options["settings"] = {"prefix_cache": True, **settings_of(row.weights), **task.setting, **given}
        if side.engine == "openvino":
            options["properties"] = dict(pair.split("=", 1) for pair in self.args.openvino_property)
        env = {"OMP_NUM_THREADS": str(self.args.threads)}
        if side.engine == "vllm" and self.args.vllm_preload:
            env["LD_PRELOAD"] = self.args.vllm_preload
        return Process(side.engine, self.python(side.engine), options, env)

    def model(self, engine: str, weights: str) -> str:
        """The file or folder of the weights for an engine."""
        flag = {"fp32": "bf16", "int4": "qwen", "int8": "qwen"}.get(weights, weights)
        if flag == "qwen" and engine != "ours":
            flag = f"qwen_{weights}_gguf"
        path: Path | None = getattr(self.args, flag)
        option = "--" + flag.replace("_", "-")
        if path is None:
            raise PeerError(f"no model given for {weights} weights: {option} must name one")
        if not path.exists():
            raise PeerError(f"{option}: {str(path)!r} does not exist")
        return str(path.resolve())

    def python(self, engine: str) -> str:
        return sys.executable if engine == "ours" else str(getattr(self.args, f"{engine}_python"))

    def text(self) -> str:
        if self.args.text is not None:
            return str(self.args.text.read_text(encoding="utf-8"))
        from pydoc_data.topics import topics

        return "\n\n".join(topics[name] for name in sorted(topics))


def rest(wait: float) -> None:
    """Let threads that spin go to sleep; then wait for other processes, at most ``wait`` seconds."""
    end = time.perf_counter() + wait
    time.sleep(REST)
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(REST)
        if busy_seconds() - busy < QUIET * REST:
            break


def settings_of(weights: str) -> dict[str, Any]:
    if weights in ("bf16", "fp32"):
        return {"dtype": weights}
    return {"quantization": weights} if weights in ("int4", "int8") else {}


def check(name: str, reply: Reply, prompts: Ids, new: int) -> None:
    counts = [len(ids) for ids in reply["ids"]]
    if counts != [new] * len(prompts):
        raise PeerError(f"{name} gave {counts} ids where {len(prompts)} times {new} were asked for")


def chosen_rows(names: list[str]) -> list[Row]:
    rows = all_rows()
    chosen = []
    for name in names:
        found = [row for key, row in rows.items() if name in (key, key.split("/")[0], "all")]
        if not found:
            raise PeerError(f"there is no row {name!r}; --list names them")
        chosen += found
    return chosen


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="ROW", help="work/weights, a work, or all")
    parser.add_argument("--list", action="store_true", help="name the rows")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--wait", type=float, default=0, metavar="SECONDS", help="before each turn, for a quiet machine"
    )
    parser.add_argument(
        "--reference", action="store_true", help="count ids equal to float32 Hugging Face's too"
    )
    parser.add_argument("--json", type=Path, help="every single run, the machine, versions")
    parser.add_argument(
        "--text", type=Path, help="what prompts are cut from; by default Python's help topics"
    )
    models = ("q4-1", "q8-0", "bf16", "qwen", "qwen-int4-gguf", "qwen-int8-gguf")
    for name in models:
        parser.add_argument(f"--{name}", type=Path, metavar="PATH")
    for engine, title in ENGINES.items():
        variable = f"{engine.upper()}_PYTHON"
        parser.add_argument(
            f"--{engine}-python",
            metavar="PATH",
            default=os.environ.get(variable, sys.executable),
            help=f"an interpreter that has {title} (or {variable}); by default this one",
        )
    parser.add_argument(
        "--vllm-preload",
        default="",
        metavar="PATHS",
        help="LD_PRELOAD of vLLM, which asks for libiomp5 and tcmalloc",
    )
    parser.add_argument("--openvino-property", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--setting", action="append", default=[], metavar="NAME=VALUE", help="of ours")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if args.list:
        for row in all_rows().values():
            print(f"{row.name:20} {' | '.join(side.name for side in row.sides)}")
        return 0
    report: dict[str, Any] = {"argv": sys.argv, "machine": machine(), "rows": []}
    print(" ".join(f"{name}={value}" for name, value in report["machine"].items()))
    status = 0
    try:
        rows = chosen_rows(args.rows)
    except PeerError as error:
        print(f"cpu_table: {error}", file=sys.stderr)
        return 2
    table = Table(args)
    for row in rows:
        try:
            done = table.run(row)
        except PeerError as error:
            print(f"cpu_table: {row.name}: {error}", file=sys.stderr)
            status = 2
            continue
        print("\n".join(lines(done)), flush=True)
        report["rows"].append(as_json(done))
        if args.json:
            args.json.write_text(json.dumps(report, indent=1, default=str))
    return status


if __name__ == "__main__":
    raise SystemExit(main())
