"""A matrix in blocks that Triton's kernels multiply with; its twin in torch: ``weights.QuantizedWeight``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.kernels.triton.available import interpreted
from mini_sglang.backend.kernels.triton.block_layout import FORMATS, UNIT, Planes, repack
from mini_sglang.backend.kernels.triton.launch import power_of_two
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.weights import QuantizedWeight, Weight

# From here on the matrix is made dense and multiplied by torch: a weight then takes some 4.6 bytes of
# traffic, which at the ratio of a GPU's arithmetic to its bandwidth costs what this many rows gain where
# torch multiplies twice as fast as the tiles.
_DENSE_ROWS = 512
# Weights that are dense at a time.
_CHUNK_WEIGHTS = 1 << 25
_SUM_BLOCK = 512


@dataclass(frozen=True, slots=True)
class ProductLaunch:
    """Tiles of ``multiply``.

    Attributes:
        exact: multiply codes and scale the sums, rather than make weights dense.
        units_at_once: walked between two waits for scales.
        units: that one program walks.
        parts: that a row's columns are divided into.
    """

    exact: bool
    block_m: int
    block_n: int
    units_at_once: int
    units: int
    parts: int
    warps: int
    stages: int


def product_launch(rows: int, features: int, units: int, itemsize: int = 2) -> ProductLaunch:
    """The launch for ``rows`` rows of ``x``.

    It is the same for all rows up to 16, from 17 to 64, and above: within each a row's sum has one order.
    Columns are split where there are too few features to keep a GPU busy; into at least 256 each.
    """
    if rows <= 16:
        exact, block_m, block_n, at_once, warps, stages, programs = True, 16, 64, 4, 4, 3, 512
        if features < 8192:
            block_n = 32
    elif rows <= 64:
        exact, block_m, block_n, at_once, warps, stages, programs = False, 64, 64, 1, 4, 3, 256
    else:
        exact, block_m, block_n, at_once, warps, stages, programs = False, 128, 64, 1, 4, 3, 128
    if itemsize > 2:
        # Twice the bytes in shared memory; without tensor cores the tiles lie in registers.
        stages = 2
        block_n = 32
    tiles = -(-features // block_n)
    parts = max(1, min(programs // tiles, units // 4))
    share = -(-units // parts)
    return ProductLaunch(exact, block_m, block_n, at_once, share, -(-units // share), warps, stages)


class TritonWeight(Weight):
    """A ``QuantizedWeight`` repacked for Triton's kernels, with the same numbers.

    ``linear`` takes ``x`` as it is, in any floating type, and adds up in float32. Up to 16 rows meet the
    exact weights; more meet weights in the type of ``x``. A row's bits do not depend on the number of rows,
    as long as it stays within 1 to 16, 17 to 64, or 65 to 512; beyond, and beyond 16 in float32, torch
    multiplies. Nothing waits for the device or depends on numbers: all of it can be captured in a CUDA graph.

    Attributes:
        type: the block format that the numbers came in.
    """

    def __init__(self, planes: Planes, type: GGMLType, shape: tuple[int, int], dtype: torch.dtype) -> None:
        self.planes = planes
        self.type = type
        self.shape = shape
        self.dtype = dtype

    @classmethod
    def of(cls, weight: QuantizedWeight, dtype: torch.dtype) -> TritonWeight:
        """Repacked on the device where ``weight`` is; its memory is not kept."""
        return cls(repack(weight.blocks, weight.type), weight.type, weight.shape, dtype)

    @staticmethod
    def has_format(type: GGMLType) -> bool:
        """Whether there are kernels for a block format."""
        return type.name in FORMATS

    @property
    def nbytes(self) -> int:
        return sum(plane.nbytes for plane in self.planes)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        # torch.compile cannot look into the launch, nor needs to.
        product = _multiply_op if torch.compiler.is_compiling() else multiply_blocks
        out: Tensor = product(x, list(self.planes), bias, self.type.name, self.shape[0])
        return out

    def rows(self, ids: Tensor) -> Tensor:
        chosen = _rows_op if torch.compiler.is_compiling() else rows_of_blocks
        out: Tensor = chosen(ids, list(self.planes), self.type.name, self.shape[1], self.dtype)
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return _dense(self.planes, self.type.name, 0, *self.shape, dtype)

    def to(self, device: torch.device) -> TritonWeight:
        planes = Planes(*(plane.to(device) for plane in self.planes))
        return TritonWeight(planes, self.type, self.shape, self.dtype)


def multiply_blocks(x: Tensor, planes: list[Tensor], bias: Tensor | None, name: str, features: int) -> Tensor:
    """``x @ W.T + bias``: ``[..., K]`` to ``[..., features]`` in the type of ``x``."""
    columns = x.shape[-1]
    flat = x.reshape(-1, columns)
    if flat.stride(1) != 1:
        flat = flat.contiguous()
    if len(flat) > _DENSE_ROWS or (len(flat) > 16 and x.dtype == torch.float32):
        out = _multiply_dense(flat, Planes(*planes), bias, name, features)
    else:
        out = _multiply_packed(flat, Planes(*planes), bias, name, features)
    return out.view(*x.shape[:-1], features)


def rows_of_blocks(ids: Tensor, planes: list[Tensor], name: str, columns: int, dtype: torch.dtype) -> Tensor:
    """The rows ``ids``, integers ``[...]``, as ``[..., columns]``."""
    flat = ids.reshape(-1).contiguous()
    return _dense(Planes(*planes), name, 0, len(flat), columns, dtype, flat).view(*ids.shape, columns)


def _multiply_packed(x: Tensor, planes: Planes, bias: Tensor | None, name: str, features: int) -> Tensor:
    from mini_sglang.backend.kernels.triton.block_kernels import add_parts, multiply

    rows, columns = x.shape
    out = x.new_empty((rows, features))
    if not out.numel():
        return out
    units = -(-columns // UNIT)
    launch = product_launch(rows, features, units, x.element_size())
    split = launch.parts > 1
    parts = x.new_empty((launch.parts, rows, features), dtype=torch.float32) if split else out
    multiply[(-(-rows // launch.block_m), -(-features // launch.block_n), launch.parts)](
        x,
        planes.codes,
        planes.scales,
        planes.minima,
        planes.supers,
        planes.super_minima,
        x if bias is None else bias,
        parts,
        rows,
        features,
        columns,
        units,
        launch.units,
        x.stride(0),
        planes.codes.stride(0),
        planes.scales.stride(0),
        **_format(name),
        BIAS=bias is not None,
        EXACT=launch.exact,
        SPLIT=split,
        BLOCK_M=launch.block_m,
        BLOCK_N=launch.block_n,
        UNITS=launch.units_at_once,
        WIDE=x.dtype == torch.bfloat16 and interpreted(),
        num_warps=launch.warps,
        num_stages=launch.stages,
    )
    if split:
        block = min(_SUM_BLOCK, power_of_two(features))
        add_parts[(rows, -(-features // block))](
            parts,
            x if bias is None else bias,
            out,
            rows,
            features,
            launch.parts,
            BIAS=bias is not None,
            BLOCK=block,
            num_warps=4,
        )
    return out


def _multiply_dense(x: Tensor, planes: Planes, bias: Tensor | None, name: str, features: int) -> Tensor:
    rows, columns = x.shape
    step = max(1, _CHUNK_WEIGHTS // columns)
    if step >= features:
        return F.linear(x, _dense(planes, name, 0, features, columns, x.dtype), bias)
    out = x.new_empty((rows, features))
    for start in range(0, features, step):
        stop = min(start + step, features)
        dense = _dense(planes, name, start, stop - start, columns, x.dtype)
        out[:, start:stop] = F.linear(x, dense, None if bias is None else bias[start:stop])
    return out


def _dense(
    planes: Planes,
    name: str,
    first: int,
    count: int,
    columns: int,
    dtype: torch.dtype,
    ids: Tensor | None = None,
) -> Tensor:
    """``count`` rows from ``first`` on, or those that ``ids`` name: ``[count, columns]``."""
    from mini_sglang.backend.kernels.triton.block_kernels import unpack

    out = torch.empty((count, columns), dtype=dtype, device=planes.codes.device)
    if not out.numel():
        return out
    # A decode's embedding is a few rows; a whole matrix is many.
    block = 1 if count < 16 else 16
    units = 4
    unpack[(-(-count // block), -(-columns // (units * UNIT)))](
        planes.codes if ids is None else ids,
        planes.codes,
        planes.scales,
        planes.minima,
        planes.supers,
        planes.super_minima,
        out,
        first,
        count,
        columns,
        planes.codes.stride(0),
        planes.scales.stride(0),
        **_format(name),
        CHOSEN=ids is not None,
        BLOCK_R=block,
        UNITS=units,
        num_warps=1 if block == 1 else 4,
    )
    return out


def _format(name: str) -> dict[str, Any]:
    form = FORMATS[name]
    return {
        "BITS": form.bits,
        "OFFSET": form.offset,
        "GROUP": form.group,
        "MINIMUM": form.minimum,
        "NESTED": form.nested,
    }


@torch.library.custom_op("mini_sglang::multiply_blocks", mutates_args=())
def _multiply_op(x: Tensor, planes: list[Tensor], bias: Tensor | None, name: str, features: int) -> Tensor:
    return multiply_blocks(x, planes, bias, name, features)


@_multiply_op.register_fake
def _(x: Tensor, planes: list[Tensor], bias: Tensor | None, name: str, features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


@torch.library.custom_op("mini_sglang::rows_of_blocks", mutates_args=())
def _rows_op(ids: Tensor, planes: list[Tensor], name: str, columns: int, dtype: torch.dtype) -> Tensor:
    return rows_of_blocks(ids, planes, name, columns, dtype)


@_rows_op.register_fake
def _(ids: Tensor, planes: list[Tensor], name: str, columns: int, dtype: torch.dtype) -> Tensor:
    return ids.new_empty((*ids.shape, columns), dtype=dtype)
