"""Checkpoints in fp8 as DeepSeek and Qwen publish them: e4m3 with a scale per block of rows and columns."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.loading.parts import Part
from mini_sglang.errors import ModelLoadError, shorten

# Of a matrix's name, in the place of nothing.
SCALE_SUFFIX = "_scale_inv"


def is_fp8(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` says that its weights are e4m3 in blocks."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method") == "fp8"


def fp8_block(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    """Rows and columns that share a scale in a checkpoint that ``is_fp8``.

    Raises:
        ModelLoadError: it has no such blocks.
    """
    settings = config["quantization_config"]
    block, form = settings.get("weight_block_size"), settings.get("fmt", "e4m3")
    if form != "e4m3":
        raise ModelLoadError(
            f"The weights of {folder} are fp8 of the format {shorten(form)}; it must be e4m3."
        )
    if (
        not isinstance(block, list)
        or len(block) != 2
        or any(type(size) is not int or size < 1 for size in block)
    ):
        raise ModelLoadError(
            f"The weights of {folder} are fp8 with weight_block_size {shorten(block)}; it must be the rows "
            "and columns that share a scale, such as [128, 128]."
        )
    return block[0], block[1]


def dequantize_blocks(
    codes: Tensor, scales: Tensor, block: tuple[int, int], part: Part | None, dtype: torch.dtype
) -> Tensor:
    """A matrix of e4m3 codes, or a part of it, as numbers.

    Args:
        codes: float8_e4m3fn ``[N, K]``.
        scales: a floating type, ``[N / block rows, K / block columns]``, both rounded up.
        dtype: of the result; computed in float32 and rounded once.

    Raises:
        ValueError: the shape of ``scales``.
    """
    wanted = tuple(-(-size // step) for size, step in zip(codes.shape, block, strict=True))
    if tuple(scales.shape) != wanted:
        raise ValueError(f"the shape {list(scales.shape)}; it must be {list(wanted)}")
    ranges = [(0, size) for size in codes.shape]
    if part is not None:
        ranges[part.dim] = part.start, part.stop
    (top, bottom), (left, right) = ranges
    rows, columns = block
    out = torch.empty(bottom - top, right - left, dtype=dtype)
    column_block = torch.arange(left, right) // columns
    wide = scales.float()
    # A row of blocks at a time: nothing larger stands in float32.
    start = top
    while start < bottom:
        stop = min(start // rows * rows + rows, bottom)
        numbers = codes[start:stop, left:right].float()
        out[start - top : stop - top] = numbers.mul_(wide[start // rows, column_block])
        start = stop
    return out
