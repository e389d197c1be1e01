"""Twins of the compiled products in float64, with bounds of their error, and random matrices."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quant import dequantize
from mini_sglang.backend.weights import DenseWeight, PackedWeight, QuantizedWeight
from tests.backend.test_quant import random_blocks

Array = NDArray[np.float32]
Exact = NDArray[np.float64]
DENSE = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
FORMATS = {kind.name: kind for kind in GGML_TYPES.values() if kind.name not in ("Q5_0", "Q5_1", "Q5_K")}
BLOCKS = {name: kind for name, kind in FORMATS.items() if kind.quantized}
# Of a sum in float32, for each of its terms.
UNIT = 2.0**-24


def runnable_variants(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """The instruction sets that this CPU has, by what the system says of it."""
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    avx2 = {"avx2", "fma", "f16c"}
    vnni = avx2 | {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_vnni"}
    needs = {"avx2": avx2, "avx512vnni": vnni, "avx512bf16": vnni | {"avx512_bf16"}}
    return ["generic", *(name for name, needed in needs.items() if needed <= flags)]


VARIANTS = runnable_variants()


def random_matrix(kind: GGMLType, rows: int, columns: int, seed: int = 0) -> torch.Tensor:
    """Random bits with finite scales of either sign, or normal numbers; uint8 ``[rows, bytes_per_row]``."""
    return torch.from_numpy(random_blocks(kind, rows, columns, seed))


def plain(
    kind: GGMLType, blocks: torch.Tensor, dtype: torch.dtype = torch.float32
) -> DenseWeight | QuantizedWeight:
    """Dense numbers keep their own dtype; ``dtype`` is that of a matrix in blocks."""
    if kind.quantized:
        return QuantizedWeight(blocks, kind, dtype)
    return DenseWeight(blocks.view(DENSE[kind.name]))


def pack(
    kernels: NativeKernels, kind: GGMLType, blocks: torch.Tensor, dtype: torch.dtype = torch.float32
) -> PackedWeight:
    """The matrix for the kernels, with the compute dtype ``dtype``."""
    return PackedWeight(plain(kind, blocks, dtype), kernels, dtype)


def rounds_x(variant: str, kind: GGMLType) -> bool:
    """Whether the kernels round ``x`` to bfloat16 for this format."""
    return variant == "avx512bf16" and kind.name == "BF16"


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


def exact_product(
    x: Array, blocks: torch.Tensor, kind: GGMLType, bias: Array | None, variant: str
) -> tuple[Exact, Exact]:
    """``x @ W.T + bias`` with ``x`` rounded as the kernels round it, and the bound of their error after that.

    With blocks every product of integers is exact, and what is left is the sum of the blocks in float32;
    with dense numbers it is the sum of all products.
    """
    if kind.quantized:
        product, size, terms = _exact_blocks(x, blocks, kind)
    else:
        dense = dequantize(blocks, kind, torch.float32).numpy().astype(np.float64)
        rounded = torch.from_numpy(x).bfloat16().float().numpy() if rounds_x(variant, kind) else x
        wide = rounded.astype(np.float64)
        product, size, terms = wide @ dense.T, np.abs(wide) @ np.abs(dense).T, dense.shape[1]
    if bias is not None:
        product, size = product + bias, size + np.abs(bias)
    # The instruction for bfloat16 takes numbers below the normal ones as zeros.
    return product, (terms + 6) * UNIT * size + terms * 2.0**-125


def _exact_blocks(x: Array, blocks: torch.Tensor, kind: GGMLType) -> tuple[Exact, Exact, int]:
    q, x_scale = quantize_rows(x)
    w, scale, minimum = codes_and_scales(blocks, kind)
    sign = -1 if kind.name == "Q4_K" else 1 if kind.name == "Q4_1" else 0
    product = np.zeros((len(x), len(w)))
    size = np.zeros_like(product)
    for b in range(w.shape[1]):
        of_x = x_scale[:, b, None].astype(np.float64)
        parts = [sign * minimum[:, b].astype(np.float64) * q[:, b].sum(-1)[:, None] * of_x]
        for half in (0, 1):
            columns = slice(16 * half, 16 * half + 16)
            dots = q[:, b, columns] @ w[:, b, columns].T
            parts.append(scale[:, b, half].astype(np.float64) * dots * of_x)
        product += sum(parts)
        size += sum(np.abs(part) for part in parts)
    return product, size, w.shape[1]


def true_product(x: Array, blocks: torch.Tensor, kind: GGMLType, bias: Array | None) -> tuple[Exact, Exact]:
    """The product in float64 with the dequantised matrix, and how far rounding ``x`` may lead from it.

    That is half a step of 8 bits for blocks, and half a unit of bfloat16 for dense numbers.
    """
    dense = dequantize(blocks, kind, torch.float32).numpy().astype(np.float64)
    wide = x.astype(np.float64)
    product = wide @ dense.T + (0 if bias is None else bias)
    size = np.abs(wide) @ np.abs(dense).T
    rounding = 1e-5 * (size + np.abs(product)) + 1e-12
    if not kind.quantized:
        return product, rounding + (size * 2.0**-8 if kind.name == "BF16" else 0)
    half_step = np.abs(wide).reshape(len(x), -1, 32).max(-1) / 254
    weights = np.abs(dense).reshape(len(dense), -1, 32).sum(-1)
    return product, half_step @ weights.T * 1.01 + rounding
