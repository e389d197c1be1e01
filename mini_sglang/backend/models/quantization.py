"""What ``QUANTIZATION`` makes of a checkpoint: which matrices become blocks or e4m3, and of which format."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.fp8 import ALIGNED, Fp8Weight
from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quantize import BLOCK_SIZE, quantize
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, Weight
from mini_sglang.errors import InvalidValueError, ModelLoadError

_CPU = torch.device("cpu")
_Q4_1, _Q8_0 = GGML_TYPES[3], GGML_TYPES[8]
# e4m3 with a scale per row, of which no number shares a block with others.
FP8 = GGMLType("F8_E4M3", 1, 1)
# Of the matrices in layers, and of the embedding and head: their errors reach the logits undiluted. None
# leaves them as they are.
FORMATS: Mapping[str, tuple[GGMLType, GGMLType | None]] = MappingProxyType(
    {"int8": (_Q8_0, _Q8_0), "int4": (_Q4_1, _Q8_0), "fp8": (FP8, None)}
)


def block_formats(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], setting: str
) -> dict[str, GGMLType]:
    """The format of each matrix that becomes blocks or e4m3; the others stay as in the checkpoint.

    Those are the matrices that are blocks already and those whose rows are not whole blocks; for e4m3 those
    that do not fit it.

    Args:
        shapes: of the model's tensors, by name.
        setting: the value of QUANTIZATION.

    Raises:
        InvalidValueError: no matrix is left to quantise.
    """
    if setting == "none":
        return {}
    inner, outer = FORMATS[setting]
    dense = {
        name: shape for name, shape in shapes.items() if len(shape) == 2 and not checkpoint.in_blocks(name)
    }
    if not dense:
        raise InvalidValueError(
            "QUANTIZATION", setting, "none: the model's matrices are in quantised blocks already"
        )
    formats = {}
    for name, shape in dense.items():
        kind = inner if ".layers." in name else outer
        if kind is not None and fits(shape, kind):
            formats[name] = kind
    if not formats:
        raise nothing_fits(setting)
    return formats


def fits(shape: tuple[int, ...], kind: GGMLType) -> bool:
    """Whether a matrix of this shape can have this format."""
    return Fp8Weight.fits(shape) if kind is FP8 else shape[1] % BLOCK_SIZE == 0


def nothing_fits(setting: str) -> InvalidValueError:
    """What to raise where a model has no matrix that ``fits``."""
    which = f"rows that are a multiple of {BLOCK_SIZE} long"
    if setting == "fp8":
        which = f"rows and columns that are a multiple of {ALIGNED}"
    return InvalidValueError("QUANTIZATION", setting, f"none: no matrix of the model has {which}")


def quantized_weight(
    checkpoint: Checkpoint,
    name: str,
    kind: GGMLType,
    dtype: torch.dtype,
    device: torch.device = _CPU,
) -> Weight:
    """A dense matrix of the checkpoint in blocks or e4m3, made from the numbers of the file.

    Args:
        dtype: that it is computed with; it changes no number.
        device: e4m3 is made there.

    Raises:
        ModelLoadError: it has a number that no block can hold.
    """
    try:
        return quantized(checkpoint.tensor(name, None), kind, dtype, device)
    except ValueError as error:
        raise ModelLoadError(f"The tensor {name} cannot be quantised: {error}.") from None


def quantized(dense: Tensor, kind: GGMLType, dtype: torch.dtype, device: torch.device) -> Weight:
    """A dense matrix in blocks, on the CPU, or in e4m3, on ``device``.

    Raises:
        ValueError: it has a number that no block can hold.
    """
    if kind is not FP8:
        return QuantizedWeight(quantize(dense.cpu(), kind), kind, dtype)
    if not fits(tuple(dense.shape), kind):
        # A rank's part of a matrix that as a whole does.
        return DenseWeight(dense.to(dtype))
    return Fp8Weight.of(dense.to(device), dtype)
