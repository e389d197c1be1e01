"""A start: from a fresh process to its first token, what the time goes to, and the memory it takes.

    python benchmarks/start_bench.py [--model GGUF_OR_FOLDER] [--rounds 9] [--serve] [--against FOLDER]

Every figure is of processes of their own, after one that fills the caches. Seconds are those from before the
process is made to the first byte of its answer, or with ``--serve`` to the first 200 of /ready, as seen from
here. CPU seconds are of the process and its children, from start to end: they say more where the cores have
other work. With ``--against``, another checkout of the package, the two take turns.
"""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import mmap
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
_MB = 1e6
_SERVE_SECONDS = 120.0
# What the timeline shows: modules whose import it times, and functions, by module.
_TIMED_MODULES = ("numpy", "torch", "tokenizers", "jinja2", "llguidance", "mini_sglang.backend.loader")
_TIMED_FUNCTIONS = {
    "mini_sglang.cli.args": {"command_parser": "arguments"},
    "mini_sglang.backend.loading.source": {"resolve_model": "find the model"},
    "mini_sglang.text.tokenizer": {
        "load_tokenizer": "tokenizer",
        "Tokenizer.encode_chat": "encode the prompt",
    },
    "mini_sglang.api.loading": {"load_core": "load_core"},
    "mini_sglang.backend.loader": {
        "load_backend": "load_backend",
        "open_kernels": "kernels",
        "open_checkpoint": "file header",
        "_load": "weights",
        "KVPool": "KV pool",
        "StepProgram.build": "step program",
        "ModelBackend.run": "first step",
    },
}


@dataclass
class Run:
    """One process: seconds to its first byte, CPU seconds and peak resident bytes of the whole."""

    first: float
    cpu: float
    peak: int


def command(tree: Path, model: str, *words: str) -> tuple[list[str], dict[str, str]]:
    arguments = [sys.executable, "-P", "-m", "mini_sglang", *words, "--model", model, "--quiet"]
    return arguments, {**os.environ, "PYTHONPATH": str(tree)}


def generate(tree: Path, model: str) -> Run:
    arguments, environment = command(tree, model, "generate", "--max-new-tokens", "1", "Hi")
    start = time.perf_counter()
    process = subprocess.Popen(arguments, env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    if not process.stdout.read(1):
        raise SystemExit("mini-sglang generate gave no token")
    first = time.perf_counter() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    # This process is small, so that the peak is the child's own (Linux keeps the parent's over a fork).
    return Run(first, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def serve(tree: Path, model: str) -> Run:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    arguments, environment = command(tree, model, "serve", "--port", str(port))
    start = time.perf_counter()
    process = subprocess.Popen(arguments, env=environment)
    try:
        while not _is_ready(port):
            if process.poll() is not None or time.perf_counter() - start > _SERVE_SECONDS:
                raise SystemExit("mini-sglang serve did not become ready")
            time.sleep(0.01)
        first = time.perf_counter() - start
    finally:
        process.send_signal(signal.SIGTERM)
        _, _, usage = os.wait4(process.pid, 0)
        process.returncode = 0
    return Run(first, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024)


def _is_ready(port: int) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    try:
        connection.request("GET", "/ready")
        return connection.getresponse().status == 200
    except OSError:
        return False
    finally:
        connection.close()


def take_turns(trees: Sequence[Path], rounds: int, run: Callable[[Path], Run]) -> dict[Path, list[Run]]:
    runs: dict[Path, list[Run]] = {tree: [] for tree in trees}
    for index in range(rounds + 1):
        for tree in trees if index % 2 else reversed(trees):
            result = run(tree)
            if index:
                runs[tree].append(result)
    return runs


def show_runs(title: str, runs: dict[Path, list[Run]]) -> dict[str, Any]:
    print(
        f"\n{title}, {len(next(iter(runs.values())))} runs: seconds to the first answer, CPU seconds, peak MB"
    )
    figures: dict[str, Any] = {}
    for tree, results in runs.items():
        firsts, cpus = [run.first for run in results], [run.cpu for run in results]
        peak = max(run.peak for run in results)
        print(
            f"  min {min(firsts):.2f}  median {statistics.median(firsts):.2f}  "
            f"CPU min {min(cpus):.2f} median {statistics.median(cpus):.2f}  peak {peak / _MB:.0f}  {tree}"
        )
        figures[str(tree)] = {"first": firsts, "cpu": cpus, "peak": peak}
    return figures


class Timeline(PathFinder):
    """Times imports and functions of this process; give it a place in ``sys.meta_path``."""

    def __init__(self) -> None:
        self.spans: list[tuple[str, float, float, float]] = []

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:  # type: ignore[override]
        if name not in _TIMED_MODULES and name not in _TIMED_FUNCTIONS:
            return None
        spec = PathFinder.find_spec(name, path, target)
        assert spec is not None and spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            label = f"import {name}" if name in _TIMED_MODULES else ""
            self.timed(label, execute)(module)
            for function, label in _TIMED_FUNCTIONS.get(name, {}).items():
                self._wrap(module, function, label)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec

    def add(self, label: str, start: float, cpu: float) -> None:
        self.spans.append((label, start, time.monotonic(), time.process_time() - cpu))

    def timed(self, label: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **keywords: Any) -> Any:
            start, cpu = time.monotonic(), time.process_time()
            try:
                return function(*arguments, **keywords)
            finally:
                if label:
                    self.add(label, start, cpu)

        return call

    def _wrap(self, module: ModuleType, function: str, label: str) -> None:
        holder: Any = module
        *outer, last = function.split(".")
        for name in outer:
            holder = getattr(holder, name)
        setattr(holder, last, self.timed(label, getattr(holder, last)))


def child(model: str, started: float) -> None:
    """Be one ``generate`` and print its timeline and memory as JSON on standard error."""
    timeline = Timeline()
    timeline.add("interpreter", started, 0.0)
    sys.meta_path.insert(0, timeline)
    engines: list[Any] = []
    begin, cpu = time.monotonic(), time.process_time()
    from mini_sglang.cli import main

    timeline.add("import mini_sglang.cli", begin, cpu)

    def open_engine(**keywords: Any) -> Any:
        from mini_sglang.cli.face import load_engine

        engines.append(load_engine(**keywords))
        close, engines[0].close = engines[0].close, lambda: None
        engines.append(close)
        return engines[0]

    main(["generate", "--quiet", "--model", model, "--max-new-tokens", "1", "Hi"], open_engine)
    timeline.add("all", started, 0.0)
    engine, close = engines
    backend = engine._thread.core._backend
    status = Path("/proc/self/status").read_text()
    told = {
        "spans": [(label, start - started, end - started, cpu) for label, start, end, cpu in timeline.spans],
        "peak": int(re.search(r"VmHWM:\s+(\d+)", status)[1]) << 10,  # type: ignore[index]
        "kv": backend.kv.data.nbytes,
        "kv_used": _resident(backend.kv.data.data_ptr(), backend.kv.data.nbytes),
        "weights": backend.decoder.nbytes,
        "modules": len(sys.modules),
    }
    close()
    print(json.dumps(told), file=sys.stderr)


def _resident(address: int, length: int) -> int:
    """Bytes of these that are in memory."""
    start = address // mmap.PAGESIZE * mmap.PAGESIZE
    pages = (ctypes.c_ubyte * -(-(address + length - start) // mmap.PAGESIZE))()
    if ctypes.CDLL(None).mincore(ctypes.c_void_p(start), ctypes.c_size_t(address + length - start), pages):
        raise SystemExit("mincore failed")
    return sum(page & 1 for page in bytes(pages)) * mmap.PAGESIZE


def show_phases(tree: Path, model: str, rounds: int) -> dict[str, Any]:
    told: list[dict[str, Any]] = []
    for _ in range(rounds):
        arguments = [sys.executable, "-P", __file__, "--child", str(time.monotonic()), "--model", model]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr)
        told.append(json.loads(done.stderr.splitlines()[-1]))
    best = min(told, key=lambda one: one["spans"][-1][3])
    print(f"\nThe run of {rounds} with the least CPU time, in ms: from when, how long, CPU time")
    spans = sorted(best["spans"], key=lambda span: (span[1], -span[2]))
    for place, (label, start, end, cpu) in enumerate(spans):
        depth = sum(other[1] <= start and end <= other[2] for other in spans[:place])
        print(f"  {start * 1e3:6.0f} {(end - start) * 1e3:6.0f} {cpu * 1e3:6.0f}  {'  ' * depth}{label}")
    file = Path(model).stat().st_size if Path(model).is_file() else best["weights"]
    rest = max(one["peak"] - one["kv_used"] for one in told) - file
    print(
        f"\nMemory in MB: peak {max(one['peak'] for one in told) / _MB:.0f} = file {file / _MB:.0f} + "
        f"KV pool {best['kv_used'] / _MB:.0f} (of {best['kv'] / _MB:.0f} set aside) + {rest / _MB:.0f}"
    )
    return best


def show_imports(tree: Path, model: str, count: int) -> None:
    arguments, environment = command(tree, model, "generate", "--max-new-tokens", "1", "Hi")
    arguments[1:1] = ["-X", "importtime"]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    rows = re.findall(r"^import time: +(\d+) \| +(\d+) \| ( *)(\S+)$", done.stderr, re.MULTILINE)
    own: dict[str, int] = {}
    for alone, _, _, name in rows:
        own[name.split(".")[0]] = own.get(name.split(".")[0], 0) + int(alone)
    print(f"\nImports, in ms: {sum(own.values()) / 1e3:.0f} in all, of {len(rows)} modules")
    print("  by package, its own modules: " + _columns(sorted(own.items(), key=lambda x: -x[1])[:count]))
    cumulative = sorted(((name, int(total)) for _, total, _, name in rows), key=lambda x: -x[1])
    print("  with all that they import: " + _columns(cumulative[:count]))


def _columns(pairs: Sequence[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {micros / 1e3:.0f}" for name, micros in pairs)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--imports", type=int, default=16, help="how many of the longest imports to list")
    parser.add_argument("--serve", action="store_true", help="time `mini-sglang serve` too")
    parser.add_argument("--against", type=Path, help="another checkout of the package, to take turns with")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        child(options.model, options.child)
        return
    model = options.model or _starter()
    trees = [tree.resolve() for tree in (options.against, ROOT) if tree is not None]
    result: dict[str, Any] = {}
    result["generate"] = show_runs(
        "generate", take_turns(trees, options.rounds, lambda tree: generate(tree, model))
    )
    if options.serve:
        result["serve"] = show_runs(
            "serve", take_turns(trees, options.rounds, lambda tree: serve(tree, model))
        )
    for tree in trees:
        if len(trees) > 1:
            print(f"\n{tree}")
        result.setdefault("phases", {})[str(tree)] = show_phases(tree, model, options.rounds)
        show_imports(tree, model, options.imports)
    if options.json:
        options.json.write_text(json.dumps(result, indent=1))


def _starter() -> str:
    code = (
        "from mini_sglang.backend.loading.source import resolve_model\n"
        "from mini_sglang.config import Settings\n"
        "print(resolve_model(Settings.resolve({}, {})).path)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile("w+") as out:
        subprocess.run([sys.executable, "-P", "-c", code], env=environment, stdout=out, check=True)
        out.seek(0)
        return out.read().strip()


if __name__ == "__main__":
    main()
