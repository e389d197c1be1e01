"""What ``QUANTIZATION`` makes of a checkpoint: which matrices become blocks, and of which format."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quantize import BLOCK_SIZE, quantize
from mini_sglang.backend.weights import QuantizedWeight
from mini_sglang.errors import InvalidValueError, ModelLoadError

_Q4_1, _Q8_0 = GGML_TYPES[3], GGML_TYPES[8]
# Of the matrices in layers, and of the embedding and head: their errors reach the logits undiluted.
FORMATS: Mapping[str, tuple[GGMLType, GGMLType]] = MappingProxyType(
    {"int8": (_Q8_0, _Q8_0), "int4": (_Q4_1, _Q8_0)}
)


def block_formats(
    checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]], setting: str
) -> dict[str, GGMLType]:
    """The format of each matrix that becomes blocks; the others stay as they are in the checkpoint.

    Those are the matrices that are blocks already and those whose rows are not whole blocks.

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
        name: shape[1] for name, shape in shapes.items() if len(shape) == 2 and not checkpoint.in_blocks(name)
    }
    if not dense:
        raise InvalidValueError(
            "QUANTIZATION", setting, "none: the model's matrices are in quantised blocks already"
        )
    formats = {
        name: inner if ".layers." in name else outer
        for name, columns in dense.items()
        if columns % BLOCK_SIZE == 0
    }
    if not formats:
        allowed = f"none: no matrix of the model has rows that are a multiple of {BLOCK_SIZE} long"
        raise InvalidValueError("QUANTIZATION", setting, allowed)
    return formats


def quantized_weight(
    checkpoint: Checkpoint, name: str, kind: GGMLType, dtype: torch.dtype
) -> QuantizedWeight:
    """A dense matrix of the checkpoint in blocks, made from the numbers of the file whatever ``dtype`` is.

    Args:
        dtype: that it is computed with.

    Raises:
        ModelLoadError: it has a number that no block can hold.
    """
    try:
        blocks = quantize(checkpoint.tensor(name, None), kind)
    except ValueError as error:
        raise ModelLoadError(f"The tensor {name} cannot be quantised: {error}.") from None
    return QuantizedWeight(blocks, kind, dtype)
