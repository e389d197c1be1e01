"""Plain twins of the quantised product: the exact arithmetic in numpy, and the bound of its error."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quant import dequantize

Array = NDArray[np.float32]
FORMATS = {kind.name: kind for kind in (GGML_TYPES[i] for i in (2, 3, 8, 12, 14))}


def runnable_variants(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets that this CPU has, by what the system says of it."""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    avx2 = {"avx2", "fma", "f16c"}
    vnni = avx2 | {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_vnni"}
    needs = {"avx2": avx2, "avx512vnni": vnni, "avx512bf16": vnni | {"avx512_bf16"}}
    return ["generic", *(name for name, needed in needs.items() if needed <= flags)]


VARIANTS = runnable_variants()


def random_matrix(kind: GGMLType, rows: int, columns: int, rng: np.random.Generator) -> torch.Tensor:
    """Blocks of random bits with finite scales of either sign, uint8 ``[rows, bytes_per_row]``."""
    blocks = rng.integers(0, 256, (rows * columns // kind.block_size, kind.block_bytes), dtype=np.uint8)
    scales = {"Q4_0": [0], "Q8_0": [0], "Q4_1": [0, 2], "Q4_K": [0, 2], "Q6_K": [208]}[kind.name]
    for start in scales:
        values = (rng.standard_normal(len(blocks)) * 0.02).astype(np.float16)
        blocks[:, start : start + 2] = values[:, None].view(np.uint8)
    return torch.from_numpy(blocks.reshape(rows, -1))


def quantize_rows(x: Array) -> tuple[NDArray[np.int32], Array]:
    """``x`` ``[M, K]`` to integers ``[M, K / 32, 32]`` and their scales ``[M, K / 32]``."""
    parts = x.reshape(len(x), -1, 32)
    largest = np.abs(parts).max(-1, keepdims=True)
    usable = np.where(largest < 2.0**-100, np.float32(np.inf), largest)
    q = np.rint(parts * (np.float32(127) / usable)).astype(np.int32)
    scale = np.where(largest < 2.0**-100, np.float32(0), largest / np.float32(127))
    return q, scale[..., 0]


def codes_and_scales(blocks: torch.Tensor, kind: GGMLType) -> tuple[NDArray[np.int32], Array, Array]:
    """Of a matrix: integers ``[N, K / 32, 32]``, scales ``[N, K / 32, 2]`` (one for each 16) and minima.

    Taken from the dequantised numbers of the same blocks with scales of 1 and minima of 0, and so on: the
    layout is that of ``quant.dequantize``, which its own test holds against ggml.
    """
    rows = len(blocks)
    raw = blocks.reshape(-1, kind.block_bytes).numpy()
    ones = raw.copy()
    one, zero = (np.float16(v).reshape(1).view(np.uint8) for v in (1, 0))
    place = 208 if kind.name == "Q6_K" else 0
    d = raw[:, place : place + 2].copy().view(np.float16).astype(np.float32)
    ones[:, place : place + 2] = one
    m = np.zeros_like(d)
    if kind.name in ("Q4_1", "Q4_K"):
        m = raw[:, 2:4].copy().view(np.float16).astype(np.float32)
        ones[:, 2:4] = zero
    codes = ones.copy()
    if kind.name == "Q4_K":
        codes[:, 4:8], codes[:, 8:12], codes[:, 12:16] = 1, 0, 1  # all scales 1, all minima 0
    elif kind.name == "Q6_K":
        codes[:, 192:208] = 1
    per_block = kind.block_size // 32

    def numbers(part: NDArray[np.uint8]) -> Array:
        dense = dequantize(torch.from_numpy(part.reshape(rows, -1)), kind, torch.float32)
        return dense.numpy().reshape(rows, -1, 32)

    q = numbers(codes).astype(np.int32)
    scales, minima = np.ones((rows, q.shape[1], 2), np.float32), np.ones(q.shape[:2], np.float32)
    if kind.name == "Q4_K":
        low, high, packed = raw[:, 4:8], raw[:, 8:12], raw[:, 12:16]
        sub = np.concatenate([low & 63, packed & 15 | low >> 2 & 48], 1).reshape(rows, -1)
        minima = np.concatenate([high & 63, packed >> 4 | high >> 2 & 48], 1).reshape(rows, -1)
        scales = np.repeat(sub[..., None], 2, -1)
    elif kind.name == "Q6_K":
        scales = raw[:, 192:208].view(np.int8).reshape(rows, -1, 2)
    d, m = (np.repeat(v.reshape(rows, -1), per_block, 1) for v in (d, m))
    return q, d[..., None] * scales.astype(np.float32), m * minima.astype(np.float32)


def exact_product(x: Array, blocks: torch.Tensor, kind: GGMLType, bias: Array | None) -> Array:
    """What the kernels compute, bit for bit: integer dots per block, then float32 in the order of blocks."""
    q, x_scale = quantize_rows(x)
    w, scale, minimum = codes_and_scales(blocks, kind)
    total = np.zeros((len(x), len(w)), np.float32)
    for b in range(w.shape[1]):
        first = (q[:, None, b, :16] * w[None, :, b, :16]).sum(-1).astype(np.float32)
        last = (q[:, None, b, 16:] * w[None, :, b, 16:]).sum(-1).astype(np.float32)
        sums = q[:, b].sum(-1).astype(np.float32)[:, None]
        if kind.name == "Q6_K":
            block = scale[:, b, 0] * first + scale[:, b, 1] * last
        else:
            block = scale[:, b, 0] * (first + last)
        if kind.name == "Q4_1":
            block = block + minimum[:, b] * sums
        elif kind.name == "Q4_K":
            block = block - minimum[:, b] * sums
        total = total + block * x_scale[:, b, None]
    return total if bias is None else total + bias


def true_product(x: Array, blocks: torch.Tensor, kind: GGMLType, bias: Array | None) -> tuple[Array, Array]:
    """The product in float64 with the dequantised matrix, and how far int8 activations may be from it."""
    dense = dequantize(blocks, kind, torch.float32).numpy().astype(np.float64)
    wide = x.astype(np.float64)
    product = wide @ dense.T + (0 if bias is None else bias)
    half_step = np.abs(wide).reshape(len(x), -1, 32).max(-1) / 254
    weights = np.abs(dense).reshape(len(dense), -1, 32).sum(-1)
    rounding = 1e-5 * (np.abs(wide) @ np.abs(dense).T + np.abs(product))
    return product, half_step @ weights.T * 1.01 + rounding + 1e-12
