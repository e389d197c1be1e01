"""Each matrix product beside torch's, and beside the memory bandwidth measured in the same run.

    python benchmarks/kernel_bench.py [--threads 2] [--rounds 9] [--variant avx2]

Weights are rotated through 128 MB, so that they come from memory as in a decode step. GB/s counts the bytes
of the weights, GFLOP/s two operations a weight and row; medians over the rounds (at least 0.1 s).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor

from mini_sglang.backend.device import choose_threads
from mini_sglang.backend.kernels.build import build_library
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, Weight, accelerate
from mini_sglang.config import Settings

POOL_BYTES = 128 << 20
ROWS = (1, 4, 16, 256)
FORMATS = [GGML_TYPES[number] for number in (2, 3, 8, 12, 14)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def read_bandwidth(kernels: NativeKernels, rounds: int) -> float:
    """GB/s of the better of two plain readers, the best round: torch's sum, and the float32 product."""
    block = torch.ones(POOL_BYTES // 4)
    matrix, x = accelerate(DenseWeight(block.view(-1, 4096)), kernels), torch.ones(1, 4096)
    readers: list[Callable[[], Tensor]] = [block.sum, lambda: matrix.linear(x)]
    return max(block.nbytes / seconds(reader, rounds, min) / 1e9 for reader in readers)


def seconds(
    work: Callable[[], Tensor], rounds: int, choose: Callable[[list[float]], float] = statistics.median
) -> float:
    # OpenMP's threads spin for a while after torch's last product.
    time.sleep(0.05)
    work()
    taken: list[float] = []
    end = time.perf_counter() + 0.1
    while len(taken) < rounds or time.perf_counter() < end:
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return choose(taken)


def products(weights: list[Weight], rows: int, columns: int) -> Callable[[], Tensor]:
    """A call that multiplies by the next of ``weights``."""
    turn, x = cycle(weights), torch.randn(rows, columns)
    return lambda: next(turn).linear(x.to(weights[0].dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--variant", default="")
    parser.add_argument("--shape", type=int, nargs=2, default=(1536, 2048), metavar=("N", "K"))
    args = parser.parse_args()

    threads = choose_threads(args.threads)
    torch.set_num_threads(threads)
    library = build_library(Settings.resolve().cache_path / "kernels", all_variants=bool(args.variant))
    kernels = NativeKernels(library, threads, args.variant)
    bandwidth = read_bandwidth(kernels, args.rounds)
    n, k = args.shape
    print(f"{kernels.variant}, {threads} threads, N={n}, K={k}, read bandwidth {bandwidth:.1f} GB/s")
    print(f"{'weights':10} {'rows':>5} {'GB/s':>8} {'% of read':>10} {'GFLOP/s':>9} {'torch GFLOP/s':>14}")
    generator = torch.Generator().manual_seed(0)
    plain: dict[str, Weight] = {str(d).removeprefix("torch."): dense(n, k, d, generator) for d in DTYPES}
    for kind in FORMATS:
        blocks = torch.zeros(n, k // kind.block_size * kind.block_bytes, dtype=torch.uint8)
        plain[kind.name] = QuantizedWeight(blocks.random_(0, 60, generator=generator), kind, torch.float32)
    for name, weight in plain.items():
        copies = max(2, POOL_BYTES // weight.nbytes)
        fast = [accelerate(again(weight), kernels, torch.float32) for _ in range(copies)]
        slow = [again(weight) for _ in range(copies)]
        for rows in ROWS:
            ours = seconds(products(fast, rows, k), args.rounds)
            torchs = seconds(products(slow, rows, k), max(2, args.rounds // 3))
            rate, work = weight.nbytes / ours / 1e9, 2e-9 * rows * n * k
            share = rate / bandwidth
            print(f"{name:10} {rows:5} {rate:8.1f} {share:10.0%} {work / ours:9.1f} {work / torchs:14.1f}")
    return 0


def dense(n: int, k: int, dtype: torch.dtype, generator: torch.Generator) -> DenseWeight:
    return DenseWeight(torch.randn(n, k, generator=generator).to(dtype))


def again(weight: Weight) -> Weight:
    """The same numbers elsewhere in memory."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(weight.blocks.clone(), weight.type, weight.dtype)
    return DenseWeight(weight.dequantize(weight.dtype).clone())


if __name__ == "__main__":
    raise SystemExit(main())
