"""``QUANTIZATION=fp8``: matrices in e4m3 with a scale per row, multiplied by activations of the same kind."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mini_sglang.backend.device import choose_dtype
from mini_sglang.backend.weights import Weight
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

# The largest number of e4m3, which has no infinity.
LARGEST = 448.0
# Rows and columns of what the GPU multiplies are a multiple of it.
ALIGNED = 16
# The first compute capability whose tensor cores multiply e4m3.
_CAPABILITY = (8, 9)
# Below it a float32 quotient would no longer be exact enough to stay within e4m3.
_SMALLEST_SCALE = 1e-30


def refuse_fp8(settings: Settings, device: torch.device) -> None:
    """Refuse ``QUANTIZATION=fp8`` where nothing multiplies it.

    Raises:
        InvalidValueError: it names what there is instead.
    """
    if settings.quantization != "fp8":
        return
    why = f"the device is {device.type}"
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        why = f"this GPU has {major}.{minor}"
    if device.type != "cuda" or (major, minor) < _CAPABILITY:
        allowed = "none, int8 or int4 here: fp8 needs CUDA of compute capability 8.9 or above, and " + why
        raise InvalidValueError("QUANTIZATION", "fp8", allowed)
    if choose_dtype(settings.dtype, device) != torch.bfloat16:
        allowed = "auto or bf16 with QUANTIZATION=fp8, whose products are rounded to bf16"
        raise InvalidValueError("MODEL_DTYPE", settings.dtype, allowed)


def round_rows(values: Tensor) -> tuple[Tensor, Tensor]:
    """Rows ``[R, K]`` as e4m3 codes and float32 scales ``[R, 1]``, of which each maps its row's largest
    number to e4m3's. A row with a number that is not finite has a NaN among its codes.
    """
    wide = values.float()
    # By a number of the host CUDA would multiply by its reciprocal: off by the last bit, which decides ties.
    scales = (wide.abs().amax(1, keepdim=True) / wide.new_full((), LARGEST)).clamp_min(_SMALLEST_SCALE)
    return (wide / scales).to(torch.float8_e4m3fn), scales


class Fp8Weight(Weight):
    """A matrix of e4m3 numbers times a float32 scale per row.

    ``linear`` rounds each row of ``x`` in the same way before the product, which adds up in float32 at best
    (tensor cores may keep fewer bits) and is rounded to bfloat16 on a GPU. It waits for nothing: it can be
    captured in a CUDA graph.

    Attributes:
        codes: float8_e4m3fn ``[out_features, in_features]``.
        scales: float32 ``[out_features, 1]``.
        triton: whether a kernel of Triton's rounds ``x``; torch.compile makes one of its own.
    """

    def __init__(self, codes: Tensor, scales: Tensor, dtype: torch.dtype, triton: bool = False) -> None:
        out_features, in_features = codes.shape
        self.codes = codes
        self.scales = scales
        self.shape = (out_features, in_features)
        self.dtype = dtype
        self.triton = triton

    @classmethod
    def of(cls, dense: Tensor, dtype: torch.dtype) -> Fp8Weight:
        """A dense matrix rounded, on its device.

        Raises:
            ValueError: a number is not finite.
        """
        codes, scales = round_rows(dense)
        if not bool(scales.isfinite().all()):
            raise ValueError("a number is not finite")
        return cls(codes, scales, dtype)

    @classmethod
    def stacked(cls, weights: Sequence[Fp8Weight]) -> Fp8Weight:
        """Matrices on top of each other."""
        codes = torch.cat([weight.codes.view(torch.uint8) for weight in weights])
        scales = torch.cat([weight.scales for weight in weights])
        return cls(codes.view(torch.float8_e4m3fn), scales, weights[0].dtype)

    @staticmethod
    def fits(shape: tuple[int, ...]) -> bool:
        """Whether a matrix of this shape can be multiplied."""
        return all(size % ALIGNED == 0 for size in shape)

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        flat = x.reshape(-1, self.shape[1])
        if not len(flat):
            return x.new_empty((*x.shape[:-1], self.shape[0]))
        codes, scales = self._rounded(flat)
        # On a GPU scales per row have products in bfloat16 alone.
        result = torch.bfloat16 if x.is_cuda else x.dtype
        out = torch._scaled_mm(
            codes, self.codes.t(), scale_a=scales, scale_b=self.scales.t(), bias=bias, out_dtype=result
        )
        return out.to(x.dtype).view(*x.shape[:-1], self.shape[0])

    def _rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self.triton or torch.compiler.is_compiling():
            return round_rows(x)
        # Imported here: most models do without.
        from mini_sglang.backend.kernels.triton import operations

        return operations.round_rows(x if x.stride(1) == 1 else x.contiguous(), _SMALLEST_SCALE)

    def rows(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        codes = self.codes.view(torch.uint8).index_select(0, flat).view(torch.float8_e4m3fn)
        dense = codes.float() * self.scales.index_select(0, flat)
        return dense.to(self.dtype).view(*ids.shape, self.shape[1])

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return (self.codes.float() * self.scales).to(dtype)

    def to(self, device: torch.device) -> Fp8Weight:
        return Fp8Weight(self.codes.to(device), self.scales.to(device), self.dtype, self.triton)
