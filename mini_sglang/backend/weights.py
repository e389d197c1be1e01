"""The weight matrices a model multiplies by: dense, in ggml's blocks, or several stacked.

All have the shape ``[out_features, in_features]`` of ``torch.nn.Linear``. They multiply with torch's
operators until ``accelerate`` hands them the compiled kernels.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quant import dequantize
from mini_sglang.errors import ModelLoadError

if TYPE_CHECKING:
    from mini_sglang.backend.kernels.jobs import Embed, Product
    from mini_sglang.backend.kernels.library import NativeKernels

# Rows of a quantised matrix are made dense this many weights at a time, 4 MiB in float32.
_CHUNK_WEIGHTS = 1 << 20
_DENSE_TYPES: Mapping[torch.dtype, GGMLType] = MappingProxyType(
    {torch.float32: GGML_TYPES[0], torch.float16: GGML_TYPES[1], torch.bfloat16: GGML_TYPES[30]}
)


class Weight(ABC):
    """A matrix of ``out_features`` rows and ``in_features`` columns.

    Attributes:
        shape: ``(out_features, in_features)``.
        dtype: the compute dtype, that of ``x`` in ``linear`` and of the result of ``rows``.
    """

    shape: tuple[int, int]
    dtype: torch.dtype

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes the matrix holds in memory."""

    @abstractmethod
    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias``: ``[..., in_features]`` to ``[..., out_features]``, in the dtype of ``x``."""

    def products(self) -> list[Product] | None:
        """What ``linear`` has the compiled kernels do in float32, from the first rows to the last.

        ``None`` where it is not theirs alone. ``n`` of each is its share of ``out_features``.
        """
        return None

    def lookup(self) -> Embed | None:
        """A job of the compiled kernels that does what ``rows`` does; without ``ids`` and ``out``."""
        return None

    @abstractmethod
    def rows(self, ids: Tensor) -> Tensor:
        """The rows ``ids`` (integers ``[...]``), as an embedding: ``[..., in_features]``."""

    @abstractmethod
    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The whole matrix as one dense tensor ``[out_features, in_features]``."""

    @abstractmethod
    def to(self, device: torch.device) -> Weight:
        """The same matrix on another device."""


class DenseWeight(Weight):
    """A tensor ``[out_features, in_features]`` already in the compute dtype."""

    def __init__(self, tensor: Tensor) -> None:
        out_features, in_features = tensor.shape
        self.tensor = tensor
        self.shape = (out_features, in_features)
        self.dtype = tensor.dtype

    @property
    def nbytes(self) -> int:
        return self.tensor.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, self.tensor, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.tensor)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.tensor.to(dtype)

    def to(self, device: torch.device) -> DenseWeight:
        return DenseWeight(self.tensor.to(device))


class QuantizedWeight(Weight):
    """A matrix in ggml's blocks, kept as they are in the file.

    ``linear`` makes a few rows dense at a time; no dense copy of the matrix is kept.

    Attributes:
        blocks: uint8 ``[out_features, blocks_per_row * block_bytes]``.
        type: the block format.
    """

    def __init__(self, blocks: Tensor, type: GGMLType, dtype: torch.dtype) -> None:
        out_features, row_bytes = blocks.shape
        assert blocks.dtype == torch.uint8 and row_bytes % type.block_bytes == 0
        self.blocks = blocks
        self.type = type
        self.shape = (out_features, row_bytes // type.block_bytes * type.block_size)
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return self.blocks.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        out_features, in_features = self.shape
        step = max(1, _CHUNK_WEIGHTS // in_features)
        out = x.new_empty(*x.shape[:-1], out_features)
        for start in range(0, out_features, step):
            chunk = slice(start, start + step)
            dense = dequantize(self.blocks[chunk], self.type, x.dtype)
            out[..., chunk] = F.linear(x, dense, None if bias is None else bias[chunk])
        return out

    def rows(self, ids: Tensor) -> Tensor:
        picked = self.blocks.index_select(0, ids.reshape(-1))
        return dequantize(picked, self.type, self.dtype).view(*ids.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.blocks, self.type, dtype)

    def to(self, device: torch.device) -> QuantizedWeight:
        return QuantizedWeight(self.blocks.to(device), self.type, self.dtype)


class PackedWeight(Weight):
    """A ``DenseWeight`` or ``QuantizedWeight`` in the order in which the compiled kernels read it.

    ``linear`` rounds ``x`` as ``NativeKernels.multiply`` says.

    Args:
        weight: whose numbers are kept; its memory is not.
        dtype: the compute dtype.
    """

    def __init__(
        self, weight: DenseWeight | QuantizedWeight, kernels: NativeKernels, dtype: torch.dtype
    ) -> None:
        self._kernels = kernels
        self.type = weight.type if isinstance(weight, QuantizedWeight) else _DENSE_TYPES[weight.dtype]
        blocks = weight.blocks if isinstance(weight, QuantizedWeight) else _bytes_of(weight.tensor)
        self.packed = kernels.pack(blocks, self.type)
        self.shape = weight.shape
        self.dtype = dtype

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self._kernels.multiply(self.packed, self.type, self.shape, x, bias)

    def products(self) -> list[Product] | None:
        if self.dtype != torch.float32:
            return None
        return [self._kernels.product(self.packed, self.type, self.shape)]

    def lookup(self) -> Embed | None:
        if self.dtype != torch.float32:
            return None
        return self._kernels.lookup(self.packed, self.type, self.shape)

    def rows(self, ids: Tensor) -> Tensor:
        picked = self._kernels.unpack(self.packed, self.type, self.shape, ids.reshape(-1))
        return dequantize(picked, self.type, self.dtype).view(*ids.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self._blocks(), self.type, dtype)

    def to(self, device: torch.device) -> Weight:
        if device.type == "cpu":
            return self
        if not self.type.quantized:
            return DenseWeight(self.dequantize(self.dtype).to(device))
        return QuantizedWeight(self._blocks().to(device), self.type, self.dtype)

    def _blocks(self) -> Tensor:
        return self._kernels.unpack(self.packed, self.type, self.shape, torch.arange(self.shape[0]))


class StackedWeight(Weight):
    """Matrices of different formats on top of each other; each multiplies apart."""

    def __init__(self, parts: Sequence[Weight]) -> None:
        self.parts = tuple(parts)
        self.shape = (sum(part.shape[0] for part in parts), parts[0].shape[1])
        self.dtype = parts[0].dtype

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        sizes = [part.shape[0] for part in self.parts]
        biases = [None] * len(sizes) if bias is None else torch.split(bias, sizes)
        return torch.cat(
            [part.linear(x, part_bias) for part, part_bias in zip(self.parts, biases, strict=True)], -1
        )

    def products(self) -> list[Product] | None:
        products: list[Product] = []
        for part in self.parts:
            found = part.products()
            if found is None:
                return None
            products += found
        return products

    def rows(self, ids: Tensor) -> Tensor:
        out = torch.empty(*ids.shape, self.shape[1], dtype=self.dtype, device=ids.device)
        start = 0
        for part in self.parts:
            end = start + part.shape[0]
            inside = (ids >= start) & (ids < end)
            out[inside] = part.rows(ids[inside] - start)
            start = end
        return out

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return torch.cat([part.dequantize(dtype) for part in self.parts])

    def to(self, device: torch.device) -> StackedWeight:
        return StackedWeight([part.to(device) for part in self.parts])


def stack_rows(weights: Sequence[Weight]) -> Weight:
    """Put matrices on top of each other, for one product in the place of several (q, k, v; gate, up).

    Matrices of one format become one matrix (a copy); a mixture becomes a ``StackedWeight``. Either holds
    the same numbers as the parts, and its products are the parts' products side by side.

    Raises:
        ModelLoadError: the matrices differ in ``in_features``.
    """
    first = weights[0]
    if len(weights) == 1:
        return first
    if len({weight.shape[1] for weight in weights}) > 1:
        shapes = ", ".join(str(weight.shape) for weight in weights)
        raise ModelLoadError(f"Matrices of the shapes {shapes} cannot be stacked; they must be equally wide.")
    if len({weight.dtype for weight in weights}) == 1:
        if all(isinstance(weight, DenseWeight) for weight in weights):
            return DenseWeight(torch.cat([cast(DenseWeight, weight).tensor for weight in weights]))
        quantized = [weight for weight in weights if isinstance(weight, QuantizedWeight)]
        if len(quantized) == len(weights) and len({weight.type for weight in quantized}) == 1:
            # By numpy, which copies in this thread. torch would share out each of these hundreds of small
            # copies, and wait for its other threads, which takes long on a machine whose cores are busy.
            parts = [weight.blocks for weight in quantized]
            on_cpu = all(part.device.type == "cpu" for part in parts)
            blocks = torch.from_numpy(np.concatenate(parts)) if on_cpu else torch.cat(parts)
            return QuantizedWeight(blocks, quantized[0].type, first.dtype)
        # Imported here: it imports this module.
        from mini_sglang.backend.fp8 import Fp8Weight

        rounded = [weight for weight in weights if isinstance(weight, Fp8Weight)]
        if len(rounded) == len(weights):
            return Fp8Weight.stacked(rounded)
    return StackedWeight(weights)


def accelerate(
    weight: Weight, kernels: NativeKernels | None, dtype: torch.dtype | None = None, triton: bool = False
) -> Weight:
    """The same matrix, multiplied by the compiled kernels where they have its format and are faster.

    Args:
        weight: on the CPU if there are ``kernels``.
        dtype: the compute dtype, if not that of ``weight``.
        triton: whether Triton's kernels may run.
    """
    dtype = dtype or weight.dtype
    if isinstance(weight, StackedWeight):
        return StackedWeight([accelerate(part, kernels, dtype, triton) for part in weight.parts])
    if isinstance(weight, DenseWeight):
        type = _DENSE_TYPES.get(weight.dtype)
        if kernels is not None and type is not None and kernels.has_format(type):
            return PackedWeight(weight, kernels, dtype)
        return weight if weight.dtype == dtype else DenseWeight(weight.tensor.to(dtype))
    if isinstance(weight, QuantizedWeight):
        if kernels is not None and kernels.has_format(weight.type):
            return PackedWeight(weight, kernels, dtype)
        if triton:
            # Imported here: it imports this module.
            from mini_sglang.backend.kernels.triton.block_weight import TritonWeight

            if TritonWeight.has_format(weight.type):
                return TritonWeight.of(weight, dtype)
        return QuantizedWeight(weight.blocks, weight.type, dtype)
    if triton:
        from mini_sglang.backend.fp8 import Fp8Weight

        if isinstance(weight, Fp8Weight):
            return Fp8Weight(weight.codes, weight.scales, dtype, triton)
    return weight


def _bytes_of(tensor: Tensor) -> Tensor:
    """Rows of numbers as rows of bytes."""
    return tensor.contiguous().view(torch.uint8)
