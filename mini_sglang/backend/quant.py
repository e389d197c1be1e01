"""Dequantisation of ggml's block formats in plain torch.

Each block holds 32 weights (256 for the K formats) with its own scales; the layouts are those of the
ggml project (ggml-common.h). Results are bit-equal in float32 to the reference in ggml's ``gguf`` package.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.loading.ggml_types import GGMLType

# Weights dequantised at a time, 127 KiB in float32: they stay in a core's cache, and below 32768 elements
# torch runs an operator on the calling thread. Some ten thousand small parallel regions would make a load
# many times slower on a machine whose cores are busy.
_CHUNK_WEIGHTS = 127 << 8


def dequantize(blocks: Tensor, kind: GGMLType, dtype: torch.dtype) -> Tensor:
    """Turn rows of blocks into numbers.

    Args:
        blocks: uint8 ``[rows, bytes_per_row]``, as stored in the file.
        dtype: of the result; computed in float32 and rounded once.

    Returns:
        ``[rows, bytes_per_row / block_bytes * block_size]`` on the device of ``blocks``.
    """
    rows, row_bytes = blocks.shape
    blocks_per_row = row_bytes // kind.block_bytes
    flat = blocks.reshape(rows * blocks_per_row, kind.block_bytes)
    out = torch.empty(len(flat), kind.block_size, dtype=dtype, device=blocks.device)
    if kind.block_size == 1:
        out.copy_(flat.view(FLOATS[kind.name]))
    else:
        decode = _DECODERS[kind.name]
        step = max(1, _CHUNK_WEIGHTS // kind.block_size)
        for start in range(0, len(flat), step):
            chunk = flat[start : start + step]
            if dtype == torch.float32:
                decode(chunk, out[start : start + step])
            else:
                exact = torch.empty(len(chunk), kind.block_size, device=blocks.device)
                decode(chunk, exact)
                out[start : start + step] = exact
    return out.view(rows, blocks_per_row * kind.block_size)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at byte ``start`` of each block, as float32 ``[n, 1]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _two_halves(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The two float16 that begin each block, as float32 ``[n, 1]`` each."""
    both = blocks[:, :4].contiguous().view(torch.float16).float()
    return both[:, :1], both[:, 1:]


def _nibbles(packed: Tensor, out: Tensor) -> None:
    """Low nibbles into the first half of ``out`` ``[..., 2, k]``, high ones into the second."""
    out[..., 0, :] = packed & 15
    out[..., 1, :] = packed >> 4


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """The 32 bits at byte ``start``, each worth 16, as uint8 ``[n, 2, 16]``."""
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    spread = blocks[:, start : start + 4, None] >> bits & 1
    return (spread << 4).view(-1, 2, 16)


def _q8_0(blocks: Tensor, out: Tensor) -> None:
    out.copy_(blocks[:, 2:].view(torch.int8))
    out.mul_(_half(blocks, 0))


def _q4_0(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 2:], out.view(-1, 2, 16))
    out.sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor, out: Tensor) -> None:
    _nibbles(blocks[:, 4:], out.view(-1, 2, 16))
    scale, minimum = _two_halves(blocks)
    out.mul_(scale).add_(minimum)


def _q5_0(blocks: Tensor, out: Tensor) -> None:
    pairs = out.view(-1, 2, 16)
    _nibbles(blocks[:, 6:], pairs)
    pairs.add_(_fifth_bits(blocks, 2))
    out.sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor, out: Tensor) -> None:
    pairs = out.view(-1, 2, 16)
    _nibbles(blocks[:, 8:], pairs)
    pairs.add_(_fifth_bits(blocks, 4))
    scale, minimum = _two_halves(blocks)
    out.mul_(scale).add_(minimum)


def six_bit_scales(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of a Q4_K or Q5_K block before what they share, uint8 ``[n, 8]`` each.

    Twelve bytes hold them in 6 bits: a byte of the first four is a scale with two high bits of a later one
    on top, the next four are the same for the minima, the last four hold the later ones' low bits.
    """
    low_scales, low_mins, packed = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = torch.cat([low_scales & 63, packed & 15 | low_scales >> 2 & 48], dim=1)
    mins = torch.cat([low_mins & 63, packed >> 4 | low_mins >> 2 & 48], dim=1)
    return scales, mins


def _scales_and_mins(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """The 8 scales and 8 minima of a Q4_K or Q5_K block, float32 ``[n, 8, 1]`` each."""
    scales, mins = six_bit_scales(blocks)
    scale, minimum = _two_halves(blocks)
    return (scale * scales).unsqueeze(-1), (minimum * mins).unsqueeze(-1)


def _q4_k(blocks: Tensor, out: Tensor) -> None:
    scales, mins = _scales_and_mins(blocks)
    _nibbles(blocks[:, 16:].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    out.view(-1, 8, 32).mul_(scales).sub_(mins)


def _q5_k(blocks: Tensor, out: Tensor) -> None:
    scales, mins = _scales_and_mins(blocks)
    _nibbles(blocks[:, 48:].view(-1, 4, 32), out.view(-1, 4, 2, 32))
    groups = out.view(-1, 8, 32)
    # Bit j of byte i belongs to weight i of group j.
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    groups.add_((blocks[:, None, 16:48] >> bits & 1) << 4)
    groups.mul_(scales).sub_(mins)


def _q6_k(blocks: Tensor, out: Tensor) -> None:
    halves = out.view(-1, 2, 4, 32)
    low = blocks[:, :128].view(-1, 2, 2, 32)
    high = blocks[:, 128:192].view(-1, 2, 1, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
    _nibbles(low.flatten(2), out.view(-1, 2, 2, 64))
    halves.add_((high >> shifts & 3) << 4)
    scales = _half(blocks, 208) * blocks[:, 192:208].view(torch.int8)
    out.view(-1, 16, 16).sub_(32).mul_(scales.unsqueeze(-1))


FLOATS: Mapping[str, torch.dtype] = MappingProxyType(
    {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
)
"""The formats that are no blocks, by their names in ggml."""

_DECODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = MappingProxyType(
    {
        "Q8_0": _q8_0,
        "Q4_0": _q4_0,
        "Q4_1": _q4_1,
        "Q5_0": _q5_0,
        "Q5_1": _q5_1,
        "Q4_K": _q4_k,
        "Q5_K": _q5_k,
        "Q6_K": _q6_k,
    }
)
