"""``mini-sglang bench kernels``: each compiled kernel beside torch's, and beside what the machine gives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang.bench.machine import Limits, busy_seconds, measure_limits
from mini_sglang.bench.record import Record
from mini_sglang.cli.args import Parser
from mini_sglang.cli.terminal import Terminal
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError

if TYPE_CHECKING:
    from mini_sglang.bench.kernel_tasks import Task

LEAST_SECONDS = 0.1
"""How long each is run at least, however many rounds that makes."""
IDLE_SECONDS = 0.05

_DESCRIPTION = (
    "Times the compiled kernels: products of every format, attention over pages, what is between them. GB/s "
    "counts the bytes that a kernel has to read and write (of a product: its weights), rotated through 128 "
    "MB, so that they come from memory as in a step; norm, rotation and SiLU find theirs in the caches, as "
    "in a step. Medians over the rounds."
)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the table; the exit status."""
    terminal = Terminal()
    try:
        return _run(argv, terminal)
    except MiniSglangError as error:
        terminal.error(str(error))
        return 2


def _run(argv: Sequence[str] | None, terminal: Terminal) -> int:
    parser = Parser(prog="mini-sglang bench kernels", description=_DESCRIPTION)
    parser.add_argument("--threads", type=int, default=0, help="of the kernels and of torch; 0: all cores")
    parser.add_argument("--rounds", type=int, default=9, help="of each kernel, at least")
    parser.add_argument("--variant", default="", help="an instruction set rather than the best one: avx2, …")
    parser.add_argument(
        "--shape", type=int, nargs=2, metavar=("N", "K"), help="rows and columns of the products' matrix"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every round of every kernel there")
    options = parser.parse(argv)
    for field, value in (("--threads", options.threads + 1), ("--rounds", options.rounds)):
        if value < 1:
            least = 0 if field == "--threads" else 1
            raise InvalidValueError(field, getattr(options, field[2:]), f"an integer of at least {least}")

    import torch

    from mini_sglang.backend.device import choose_threads
    from mini_sglang.backend.kernels.build import BuildError, build_library
    from mini_sglang.backend.kernels.library import NativeKernels
    from mini_sglang.bench.kernel_tasks import Sizes, all_tasks

    sizes = Sizes(matrix=_matrix(options.shape)) if options.shape else Sizes()
    threads = choose_threads(options.threads)
    terminal.notice("measuring what the machine gives …")
    limits = measure_limits(threads)
    torch.set_num_threads(threads)
    try:
        library = build_library(
            Settings.resolve().cache_path / "kernels", terminal.notice, all_variants=bool(options.variant)
        )
        kernels = NativeKernels(library, threads, options.variant)
    except BuildError as error:
        raise MiniSglangError(f"The kernels cannot be timed: {error}.") from None
    settings = {
        "variant": kernels.variant,
        "threads": threads,
        "rounds": options.rounds,
        **{name: getattr(sizes, name) for name in Sizes.__dataclass_fields__},
    }
    record = Record("kernels", settings, versions={"torch": torch.__version__}, limits=limits)
    n, k = sizes.matrix
    lines = [
        f"{kernels.variant}, {threads} threads; products by a matrix of {n} by {k}",
        f"this machine: {limits.bandwidth_gb_s:.1f} GB/s read, "
        f"{limits.matrix_gflop_s:.0f} GFLOP/s in torch's bf16 products",
        HEADER,
    ]
    terminal.write("\n".join(lines) + "\n")
    for row, run in measure(all_tasks(kernels, sizes), limits, options.rounds):
        record.rows.append(row)
        record.runs.append(run)
        terminal.write(line(row) + "\n")
    others = statistics.median(run["others"] for run in record.runs)
    terminal.notice(f"Others kept {others:.1f} cores busy meanwhile (median); torch's figures suffer most.")
    if options.json:
        record.write(options.json)
    return 0


def measure(
    tasks: Iterable[Task], limits: Limits, rounds: int
) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """A row of the table and its run, of each task: ``seconds`` are medians in the one, all in the other.

    ``others`` are the cores that other processes kept busy in the meantime.
    """
    for task in tasks:
        begin, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        ours = timed(task.ours, rounds)
        torchs = timed(task.torchs, max(2, rounds // 3)) if task.torchs else None
        others = busy_seconds() - busy - (time.process_time() - own)
        name = {"kernel": task.kernel, "weights": task.weights, "rows": task.rows, "context": task.context}
        yield (
            {**name, **figures(task, ours, torchs, limits)},
            {
                **name,
                "seconds": ours,
                "torch_seconds": torchs,
                "others": max(0.0, others / (time.perf_counter() - begin)),
            },
        )


def figures(
    task: Task, ours: Sequence[float], torchs: Sequence[float] | None, limits: Limits
) -> dict[str, Any]:
    """What a row says, from the seconds of the rounds."""
    seconds = statistics.median(ours)
    twin = statistics.median(torchs) if torchs else None
    rate = task.bytes / seconds / 1e9
    return {
        "seconds": seconds,
        "torch_seconds": twin,
        "bytes": task.bytes,
        "gb_s": rate,
        "share": rate / limits.bandwidth_gb_s,
        "gflop_s": task.flop / seconds / 1e9 if task.flop else None,
        "torch_gflop_s": task.flop / twin / 1e9 if task.flop and twin else None,
    }


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Seconds of each call, after one that does not count."""
    # OpenMP's threads spin for a while after torch's last product.
    time.sleep(IDLE_SECONDS)
    work()
    taken: list[float] = []
    end = time.perf_counter() + LEAST_SECONDS
    while len(taken) < rounds or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return taken


HEADER = (
    f"{'kernel':22} {'weights':9} {'rows':>5} {'us':>9} {'torch us':>9} "
    f"{'GB/s':>7} {'% of read':>10} {'GFLOP/s':>9} {'torch GFLOP/s':>14}"
)


def line(row: dict[str, Any]) -> str:
    """A row as it is printed."""

    def number(name: str, form: str, scale: float = 1.0) -> str:
        return "-" if row[name] is None else format(row[name] * scale, form)

    return (
        f"{row['kernel']:22} {row['weights']:9} {row['rows']:5} {number('seconds', '.1f', 1e6):>9} "
        f"{number('torch_seconds', '.1f', 1e6):>9} {row['gb_s']:7.1f} {row['share']:10.0%} "
        f"{number('gflop_s', '.1f'):>9} {number('torch_gflop_s', '.1f'):>14}"
    )


def _matrix(shape: Sequence[int]) -> tuple[int, int]:
    n, k = shape
    if n < 1 or k < 256 or k % 256:
        raise InvalidValueError("--shape", (n, k), "a positive N and a positive multiple of 256 for K")
    return n, k


if __name__ == "__main__":
    raise SystemExit(main())
