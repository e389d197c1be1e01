"""Dequantisation, bit for bit against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

from mini_sglang.backend import quant
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType

IDS = {kind.name: number for number, kind in GGML_TYPES.items()}
# Where each format has its float16 scales.
SCALES = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
}


def random_blocks(kind: GGMLType, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Random bytes with scales like a model's, as uint8 ``[rows, bytes_per_row]``."""
    rng = np.random.default_rng(seed)
    if not kind.quantized:
        values = torch.from_numpy(rng.standard_normal((rows, columns)).astype(np.float32))
        return values.to(quant.FLOATS[kind.name]).view(torch.uint8).numpy()
    count = rows * columns // kind.block_size
    blocks = rng.integers(0, 256, (count, kind.block_bytes), dtype=np.uint8)
    for at in SCALES[kind.name]:
        scales = rng.uniform(-0.02, 0.02, count).astype(np.float16)
        blocks[:, at : at + 2] = scales.view(np.uint8).reshape(count, 2)
    return blocks.reshape(rows, -1)


def reference(blocks: np.ndarray, kind: GGMLType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType(IDS[kind.name]))


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_float32_is_bit_equal(kind: GGMLType) -> None:
    # Several chunks, the last of them not full.
    blocks = random_blocks(kind, rows=131, columns=512)
    ours = quant.dequantize(torch.from_numpy(blocks), kind, torch.float32)
    assert ours.shape == (131, 512)
    np.testing.assert_array_equal(ours.numpy().view(np.uint32), reference(blocks, kind).view(np.uint32))


@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_any_bytes_decode_as_in_the_reference(kind: GGMLType) -> None:
    shape = (64, 512 // kind.block_size * kind.block_bytes)
    blocks = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    ours = quant.dequantize(torch.from_numpy(blocks), kind, torch.float32).numpy()
    np.testing.assert_array_equal(ours, reference(blocks, kind))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", GGML_TYPES.values(), ids=lambda kind: kind.name)
def test_half_precision_is_float32_rounded_once(kind: GGMLType, dtype: torch.dtype) -> None:
    blocks = torch.from_numpy(random_blocks(kind, rows=70, columns=512))
    expected = quant.dequantize(blocks, kind, torch.float32).to(dtype)
    assert torch.equal(quant.dequantize(blocks, kind, dtype), expected)


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_what_the_gguf_package_quantises_comes_back(name: str) -> None:
    values = np.random.default_rng(2).standard_normal((8, 64)).astype(np.float32)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType(IDS[name]))
    ours = quant.dequantize(torch.from_numpy(blocks), GGML_TYPES[IDS[name]], torch.float32).numpy()
    bits = int(name[1])
    assert np.abs(ours - values).max() < 4 * np.abs(values).max() / (1 << bits)


def test_chunks_stay_below_the_size_that_torch_splits_between_threads() -> None:
    assert quant._CHUNK_WEIGHTS < 32768
    assert all(quant._CHUNK_WEIGHTS % kind.block_size == 0 for kind in GGML_TYPES.values())


def test_no_rows() -> None:
    kind = GGML_TYPES[8]
    assert quant.dequantize(torch.empty(0, 34, dtype=torch.uint8), kind, torch.float32).shape == (0, 32)
