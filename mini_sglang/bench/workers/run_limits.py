"""What the machine gives: bytes read from memory, bf16 products by torch. Options: threads."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from worker_protocol import serve

READ_BYTES = 256 << 20
SIZES = ((1000, 576, 1536), (1024, 1024, 1024), (2048, 2048, 2048))
"""Rows, columns and depth of the products: one of the starter model's, and two that suit any library."""
REPEATS = 30


class Limits:
    def __init__(self, options: dict[str, Any]) -> None:
        self.threads = options["threads"]
        torch.set_num_threads(self.threads)
        self.block = torch.ones(READ_BYTES // 8, dtype=torch.int64)
        self.read = compiled_reader()
        reader = "a compiled loop" if self.read else "torch.sum, as there is no C++ compiler"
        self.about = {"versions": {"torch": torch.__version__}, "reader": reader}

    def bandwidth(self) -> float:
        """GB/s of the better of the readers, the best of the repeats."""
        best = fastest(self.block.sum)
        if self.read is not None:
            result = ctypes.c_uint64()
            arguments = (self.block.data_ptr(), READ_BYTES, self.threads, ctypes.byref(result))
            best = min(best, *(self.read(*arguments) for _ in range(REPEATS)))
        return READ_BYTES / best / 1e9

    def matrix(self) -> float:
        """GFLOP/s of torch's bf16 product at the size that is best for it, the best of the repeats."""
        return max(product_rate(*size) for size in SIZES)


def product_rate(rows: int, columns: int, depth: int) -> float:
    x = torch.randn(rows, depth).bfloat16()
    weight = torch.randn(columns, depth).bfloat16()
    return 2e-9 * rows * columns * depth / fastest(lambda: torch.nn.functional.linear(x, weight))


def fastest(work: Callable[[], object]) -> float:
    taken = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def compiled_reader() -> Callable[..., float] | None:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None:
        return None
    source = Path(__file__).with_name("read_memory.cpp")
    flags = ["-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "read_memory.so")
        if subprocess.run(
            [compiler, *flags, str(source), "-o", str(library)], capture_output=True
        ).returncode:
            return None
        read: Any = ctypes.CDLL(str(library)).read_memory
    read.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.POINTER(ctypes.c_uint64)]
    read.restype = ctypes.c_double
    return read  # type: ignore[no-any-return]


if __name__ == "__main__":
    serve(Limits)
