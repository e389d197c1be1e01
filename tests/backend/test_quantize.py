"""Quantisation: error bounds of every block, with the gguf package reading the bytes."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quant import dequantize
from mini_sglang.backend.quantize import quantize
from tests.backend.test_quant import IDS, random_blocks

Q4_1, Q8_0 = GGML_TYPES[IDS["Q4_1"]], GGML_TYPES[IDS["Q8_0"]]
KINDS = pytest.mark.parametrize("kind", [Q8_0, Q4_1], ids=lambda kind: kind.name)

_RNG = np.random.default_rng(0)
_NORMAL = _RNG.standard_normal((24, 96))
MATRICES = {
    "a layer's": _NORMAL * 0.02,
    "large": _NORMAL * 9000,
    "below float16's normal numbers": _NORMAL * 3e-6,
    "below float16's smallest": _NORMAL * 1e-9,
    "heavy tails": _RNG.standard_t(2, (24, 96)),
    "far from zero": 5 + _NORMAL * 0.01,
    "one outlier in a block": np.where(np.arange(96) % 32 == 5, 100.0, _NORMAL),
    "one sign": np.abs(_NORMAL),
    "constant": np.full((24, 96), -0.3),
    "zero": np.zeros((24, 96)),
    "two values": np.sign(_NORMAL),
    "whole steps": np.round(_NORMAL * 4),
}
# Around 2**-1, where rounding is at its coarsest and finest within one block, and everything float16 holds.
FINITE = st.one_of(st.floats(-1, 1, width=32), st.floats(-60000, 60000, width=32))


def encoded(values: np.ndarray, kind_id: int) -> tuple[np.ndarray, np.ndarray]:
    """Our blocks ``[n, block_bytes]`` and the numbers that the gguf package reads in them, ``[n, 32]``."""
    kind = GGML_TYPES[kind_id]
    rows = quantize(torch.from_numpy(values.astype(np.float32)), kind).numpy()
    decoded = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind_id))
    assert decoded.shape == values.shape
    return rows.reshape(-1, kind.block_bytes), decoded.reshape(-1, 32).astype(np.float64)


def half(blocks: np.ndarray, start: int) -> np.ndarray:
    return blocks[:, start : start + 2].copy().view(np.float16).astype(np.float64)


def check_q8_0(values: np.ndarray) -> None:
    blocks, decoded = encoded(values, IDS["Q8_0"])
    exact = values.astype(np.float32).reshape(-1, 32).astype(np.float64)
    scale, codes = half(blocks, 0), blocks[:, 2:].view(np.int8)
    assert (scale >= 0).all() and codes.min() >= -127
    # The step is the finest that reaches the largest number, but for its own rounding to float16.
    ideal = np.abs(exact).max(1, keepdims=True) / 127
    assert (scale <= ideal * 1.001 + 2**-24).all()
    assert (np.abs(decoded - exact) <= scale * 0.50001 + 1e-30).all()


def plain_q4_1(exact: np.ndarray) -> np.ndarray:
    """Squared error of each block with the minimum and maximum as ends, float16 as in a block."""
    low, high = exact.min(1, keepdims=True), exact.max(1, keepdims=True)
    scale, minimum = (v.astype(np.float16).astype(np.float64) for v in ((high - low) / 15, low))
    with np.errstate(invalid="ignore", divide="ignore"):
        codes = np.where(scale > 0, np.rint((exact - minimum) / scale), 0).clip(0, 15)
    return ((codes * scale + minimum - exact) ** 2).sum(1)


def check_q4_1(values: np.ndarray) -> None:
    blocks, decoded = encoded(values, IDS["Q4_1"])
    exact = values.astype(np.float32).reshape(-1, 32).astype(np.float64)
    scale, minimum = half(blocks, 0), half(blocks, 2)
    assert (scale >= 0).all()
    # Each number has the nearest code: half a step, and beyond the ends the way to the end.
    outside = np.maximum(minimum - exact, exact - minimum - 15 * scale).clip(0)
    noise = 1e-6 * np.abs(exact).max(1, keepdims=True) + 1e-30
    assert (np.abs(decoded - exact) <= np.maximum(scale / 2, outside) + noise).all()
    error = ((decoded - exact) ** 2).sum(1)
    # The choice between the two is made in float32, which moves each difference by up to the noise.
    assert (np.sqrt(error) <= np.sqrt(plain_q4_1(exact)) + np.sqrt(32) * noise[:, 0]).all()
    # Which is within half a step of the range, where float16 has the fineness for it.
    span = exact.max(1) - exact.min(1)
    rounding = np.abs(exact).max(1) * 2**-11 + 15 * (span / 15 * 2**-11 + 2**-25) + 2**-25
    assert (np.sqrt(error / 32) <= span / 30 + rounding).all()


@pytest.mark.parametrize("name", MATRICES)
def test_error_bounds(name: str) -> None:
    check_q8_0(MATRICES[name])
    check_q4_1(MATRICES[name])


@given(arrays.arrays(np.float32, (2, 32), elements=FINITE))
def test_error_bounds_of_any_numbers(values: np.ndarray) -> None:
    check_q8_0(values)
    check_q4_1(values)


@pytest.mark.parametrize("draw", ["standard_normal", "laplace"])
def test_the_fit_is_near_the_best_of_all_lines(draw: str) -> None:
    rng = np.random.default_rng(3)
    exact = (rng.laplace(size=(40, 32)) if draw == "laplace" else rng.standard_normal((40, 32))) * 0.02
    _, decoded = encoded(exact, IDS["Q4_1"])
    ours = ((decoded - exact) ** 2).sum()
    low, span = exact.min(1, keepdims=True), np.ptp(exact, 1, keepdims=True)
    best = np.full(40, np.inf)
    for start in np.linspace(-0.05, 0.15, 41):
        for width in np.linspace(0.75, 1.1, 71):
            scale, minimum = span * width / 15, low + span * start
            codes = np.rint((exact - minimum) / scale).clip(0, 15)
            best = np.minimum(best, ((codes * scale + minimum - exact) ** 2).sum(1))
    assert ours < 1.07 * best.sum()
    assert ours < 0.85 * plain_q4_1(exact).sum()


@pytest.mark.parametrize("name", ["Q8_0", "Q4_1"])
def test_numbers_that_blocks_hold_exactly_come_back(name: str) -> None:
    kind = GGML_TYPES[IDS[name]]
    blocks = random_blocks(kind, 16, 128)
    flat = blocks.reshape(-1, kind.block_bytes)
    if name == "Q8_0":
        flat[:, 2:][flat[:, 2:] == 128] = 0  # -128 is not used
        flat[:, 2] = 127
    else:
        flat[:, :2] = np.abs(flat[:, :2].copy().view(np.float16)).view(np.uint8)
        flat[:, 4] = 0xF0  # the codes 0 and 15
    numbers = dequantize(torch.from_numpy(blocks), kind, torch.float32)
    assert torch.equal(dequantize(quantize(numbers, kind), kind, torch.float32), numbers)


@KINDS
def test_the_result_depends_on_neither_threads_nor_chunks_nor_the_type(kind: GGMLType) -> None:
    values = torch.randn(301, 416, generator=torch.Generator().manual_seed(0)).bfloat16()
    before = values.clone()
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(quantize(values, kind))
            with torch.inference_mode():
                found.append(quantize(values.float(), kind))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(blocks, found[0]) for blocks in found)
    assert torch.equal(values, before)
    wide = values.float()
    quantize(wide, kind)
    assert torch.equal(wide, before.float())


@KINDS
def test_no_rows(kind: GGMLType) -> None:
    assert quantize(torch.empty(0, 64), kind).shape == (0, 2 * kind.block_bytes)


@KINDS
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf, 1e8, -1e8])
def test_a_number_that_no_block_holds_is_refused(kind: GGMLType, number: float) -> None:
    values = torch.randn(3, 64)
    values[1, 40] = number
    with pytest.raises(ValueError, match="not finite or too large"):
        quantize(values, kind)
