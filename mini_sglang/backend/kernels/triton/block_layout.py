"""ggml's blocks repacked for Triton's kernels: codes in one tensor, scales in others, every value kept.

A row's codes lie in units of 64 columns, so that a kernel reads a tile of bytes once and takes its columns
apart without moving anything between threads:

- 8 bits: 64 bytes, one a column;
- 4 bits: 32 bytes, byte j with column j in its low half and column 32 + j in its high half;
- 5 and 6 bits: 48 bytes, of which byte j of the first 16 has the low halves of columns j and 16 + j, of the
  second 16 those of columns 32 + j and 48 + j, and of the last 16 the two high bits of all four.

The last unit of a row is filled up with zeros. Scales stand with the rows of the matrix side by side, which
is how a tile of them is read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.quant import six_bit_scales

UNIT = 64
# Columns that share a second scale, where there is one.
SUPER = 256
# Rows are repacked this many weights at a time.
_CHUNK_WEIGHTS = 1 << 24
# Rows that scales are filled up to, so that a vector of them begins at a whole 16 bytes.
_ALIGNED = 16


@dataclass(frozen=True, slots=True)
class BlockFormat:
    """A weight is ``(code - offset) * scale + minimum``.

    Attributes:
        bits: that a code takes here; more than it has in Q5_0, Q5_1 and Q5_K.
        group: columns that share a scale.
        minimum: whether a group has one; else it is 0.
        nested: whether ``scale`` and ``minimum`` are products of a group's own and of one that ``SUPER``
            columns share.
    """

    bits: int
    offset: int
    group: int
    minimum: bool
    nested: bool


FORMATS: Mapping[str, BlockFormat] = MappingProxyType(
    {
        "Q8_0": BlockFormat(8, 0, 32, False, False),
        "Q4_0": BlockFormat(4, 8, 32, False, False),
        "Q4_1": BlockFormat(4, 0, 32, True, False),
        "Q5_0": BlockFormat(6, 16, 32, False, False),
        "Q5_1": BlockFormat(6, 0, 32, True, False),
        "Q4_K": BlockFormat(4, 0, 32, True, True),
        "Q5_K": BlockFormat(6, 0, 32, True, True),
        "Q6_K": BlockFormat(6, 32, 16, False, True),
    }
)


class Planes(NamedTuple):
    """A repacked matrix of N rows; U units a row, P rows filled up to a multiple of 16.

    Attributes:
        codes: uint8 (int8 for codes of 8 bits) ``[N, U * bits * 8]``.
        scales: of each group, ``[U * 64 / group, P]``: float16, or for nested ones uint8 or int8.
        minima: as ``scales``; empty where there are none.
        supers: float16 ``[U * 64 / 256 rounded up, P]``; empty where nothing is nested.
        super_minima: as ``supers``, with the sign that makes a minimum of it.
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor
    supers: Tensor
    super_minima: Tensor


class _Read(NamedTuple):
    """Rows of blocks taken apart: codes ``[R, K]``, the others ``[R, groups]`` and ``[R, supers]``."""

    codes: Tensor
    scales: Tensor
    minima: Tensor | None = None
    supers: Tensor | None = None
    super_minima: Tensor | None = None


def repack(blocks: Tensor, kind: GGMLType) -> Planes:
    """The planes of a matrix in blocks, on its device.

    Args:
        blocks: uint8 ``[N, bytes_per_row]``, as stored in a file.
        kind: one of ``FORMATS``.
    """
    form, read = FORMATS[kind.name], _READERS[kind.name]
    count, row_bytes = blocks.shape
    columns = row_bytes // kind.block_bytes * kind.block_size
    units = -(-columns // UNIT)
    step = max(1, _CHUNK_WEIGHTS // max(columns, 1))
    planes: Planes | None = None
    for start in range(0, max(count, 1), step):
        chunk = blocks[start : start + step]
        stop = start + len(chunk)
        found = read(chunk.reshape(-1, kind.block_bytes), len(chunk))
        codes = _PACKERS[form.bits](F.pad(found.codes, (0, units * UNIT - columns)).view(-1, units, UNIT))
        if planes is None:
            planes = _empty(count, units, form, codes, found)
        planes.codes[start:stop] = codes
        for plane, values in zip(planes[1:], found[1:], strict=True):
            if values is not None:
                plane[: values.shape[1], start:stop] = values.t()
    assert planes is not None
    return planes


def _empty(count: int, units: int, form: BlockFormat, codes: Tensor, like: _Read) -> Planes:
    """Planes of a whole matrix, all zeros."""
    rows = -(-count // _ALIGNED) * _ALIGNED
    heights = (units * UNIT // form.group,) * 2 + (-(-units * UNIT // SUPER),) * 2
    others = [
        codes.new_zeros((0,)) if values is None else values.new_zeros((height, rows))
        for height, values in zip(heights, like[1:], strict=True)
    ]
    return Planes(codes.new_zeros((count, codes.shape[1])), *others)


def _halves(blocks: Tensor, start: int, rows: int) -> Tensor:
    """The float16 at byte ``start`` of each block, ``[rows, blocks of a row]``."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).view(rows, -1)


def _q8_0(blocks: Tensor, rows: int) -> _Read:
    return _Read(blocks[:, 2:].contiguous().view(torch.int8).view(rows, -1), _halves(blocks, 0, rows))


def _nibbles(packed: Tensor, rows: int) -> Tensor:
    """Runs ``[..., k]`` of bytes as their low halves, then their high ones: codes ``[rows, K]``."""
    return torch.stack((packed & 15, packed >> 4), -2).reshape(rows, -1)


def _q4_0(blocks: Tensor, rows: int) -> _Read:
    return _Read(_nibbles(blocks[:, 2:], rows), _halves(blocks, 0, rows))


def _q4_1(blocks: Tensor, rows: int) -> _Read:
    return _Read(_nibbles(blocks[:, 4:], rows), _halves(blocks, 0, rows), _halves(blocks, 2, rows))


def _fifth_bits(packed: Tensor) -> Tensor:
    """Bytes ``[n, 4]`` of one bit a column, each worth 16: ``[n, 32]``."""
    bits = torch.arange(8, dtype=torch.uint8, device=packed.device)
    return ((packed[:, :, None] >> bits & 1) << 4).flatten(1)


def _q5_0(blocks: Tensor, rows: int) -> _Read:
    codes = _nibbles(blocks[:, 6:], len(blocks)) | _fifth_bits(blocks[:, 2:6])
    return _Read(codes.view(rows, -1), _halves(blocks, 0, rows))


def _q5_1(blocks: Tensor, rows: int) -> _Read:
    codes = _nibbles(blocks[:, 8:], len(blocks)) | _fifth_bits(blocks[:, 4:8])
    return _Read(codes.view(rows, -1), _halves(blocks, 0, rows), _halves(blocks, 2, rows))


def _q5_k(blocks: Tensor, rows: int) -> _Read:
    found = _q4_k(torch.cat((blocks[:, :16], blocks[:, 48:]), 1), rows)
    # Bit j of byte i belongs to column i of group j.
    bits = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(8, 1)
    high = (blocks[:, None, 16:48] >> bits & 1) << 4
    return found._replace(codes=found.codes | high.reshape(rows, -1))


def _q4_k(blocks: Tensor, rows: int) -> _Read:
    scales, minima = (values.reshape(rows, -1) for values in six_bit_scales(blocks))
    codes = _nibbles(blocks[:, 16:].reshape(-1, 4, 32), rows)
    return _Read(codes, scales, minima, _halves(blocks, 0, rows), -_halves(blocks, 2, rows))


def _q6_k(blocks: Tensor, rows: int) -> _Read:
    low = _nibbles(blocks[:, :128].reshape(-1, 2, 64), len(blocks)).view(-1, 2, 4, 32)
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(4, 1)
    high = (blocks[:, 128:192].reshape(-1, 2, 1, 32) >> shifts & 3) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).view(rows, -1)
    return _Read((low | high).view(rows, -1), scales, supers=_halves(blocks, 208, rows))


def _pack_8(codes: Tensor) -> Tensor:
    return codes.flatten(1)


def _pack_4(codes: Tensor) -> Tensor:
    return (codes[..., :32] | codes[..., 32:] << 4).flatten(1)


def _pack_6(codes: Tensor) -> Tensor:
    one, two, three, four = (codes[..., start : start + 16] for start in range(0, UNIT, 16))
    high = one >> 4 | two >> 4 << 2 | three >> 4 << 4 | four >> 4 << 6
    low = [left & 15 | (right & 15) << 4 for left, right in ((one, two), (three, four))]
    return torch.stack((*low, high), -2).flatten(1)


_READERS: Mapping[str, Callable[[Tensor, int], _Read]] = MappingProxyType(
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
_PACKERS: Mapping[int, Callable[[Tensor], Tensor]] = MappingProxyType({8: _pack_8, 4: _pack_4, 6: _pack_6})
