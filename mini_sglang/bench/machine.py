"""What machine this is and what it can do at most, for a report."""

from __future__ import annotations

import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from mini_sglang.bench.process import Process

FLAGS = (
    "avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx_vnni", "amx_bf16", "asimddp", "i8mm", "bf16",
)  # fmt: skip


QUIET = 0.15
"""Cores that others may keep busy; with more, threads that wait for each other by spinning crawl."""
REST = 0.4
"""Seconds before each answer; Intel's OpenMP spins for 0.2 after its last work."""


def busy_seconds() -> float:
    """What all cores have worked so far, for anyone; stolen time counts, waiting does not."""
    times = psutil.cpu_times()
    names = ("user", "nice", "system", "irq", "softirq", "steal")
    return float(sum(getattr(times, name, 0.0) for name in names))


def rest(wait: float) -> None:
    """Let threads that spin go to sleep; then wait for other processes, at most ``wait`` seconds."""
    end = time.perf_counter() + wait
    time.sleep(REST)
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(REST)
        if busy_seconds() - busy < QUIET * REST:
            break


def machine() -> dict[str, Any]:
    """CPU, cores this process may use, instruction sets that matter here, memory, system and Python."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    info = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = info.get("flags", info.get("Features", "")).split()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": usable_cores(),
        "flags": ",".join(flag for flag in FLAGS if flag in flags),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Limits:
    """What the machine itself can do, measured beside what is held against it.

    ``bandwidth_gb_s``: reading memory. ``matrix_gflop_s``: a bf16 matrix product. ``threads``: with how many.
    """

    bandwidth_gb_s: float
    matrix_gflop_s: float
    threads: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def machine_line(limits: Limits | None) -> str:
    """The machine and what it can do, in one line."""
    about = machine()
    line = f"Machine: {about['cpu']}, {about['cores']} cores, {about['memory_gb']} GB"
    if limits is None:
        return f"{line}."
    reads, multiplies = f"{limits.bandwidth_gb_s:.1f} GB/s", f"{limits.matrix_gflop_s:.0f} GFLOP/s"
    return f"{line}; reads {reads}, multiplies {multiplies} in bf16."


def measure_limits(threads: int) -> Limits:
    """Measured in a process of its own, so that nothing of ours stays behind in it.

    Raises:
        PeerError: the process failed.
    """
    process = Process("limits", sys.executable, {"threads": threads})
    try:
        bandwidth = process.ask(do="bandwidth")["answer"]
        return Limits(bandwidth, process.ask(do="matrix")["answer"], threads)
    finally:
        process.close()
