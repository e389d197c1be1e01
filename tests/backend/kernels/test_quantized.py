"""The quantised products against an exact twin, float64, and themselves in other company."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.quant import dequantize
from mini_sglang.backend.weights import (
    DenseWeight,
    PackedWeight,
    QuantizedWeight,
    StackedWeight,
    accelerate,
)
from tests.backend.kernels.twins import FORMATS, VARIANTS, exact_product, random_matrix, true_product

KINDS = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def shape(kind_size: int, rng: np.random.Generator, wide: bool) -> tuple[int, int, int]:
    """M, N, K: odd ones too. ``wide`` gives a thread several groups of rows of W at a time."""
    columns = int(rng.integers(1, 13 if kind_size == 32 else 4)) * kind_size
    return int(rng.integers(1, 41)), int(rng.integers(270, 420) if wide else rng.integers(1, 70)), columns


@KINDS
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", range(6))
def test_products_are_the_twins_to_the_bit_and_near_the_truth(
    kernels: NativeKernels, kind: object, wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    m, n, k = shape(kind.block_size, rng, wide)
    blocks = random_matrix(kind, n, k, rng)
    x = (rng.standard_normal((m, k)) * 10.0 ** rng.integers(-3, 3, (m, 1))).astype(np.float32)
    bias = rng.standard_normal(n).astype(np.float32) if seed % 2 else None
    weight = PackedWeight(QuantizedWeight(blocks, kind, torch.float32), kernels)
    out = weight.linear(torch.from_numpy(x), None if bias is None else torch.from_numpy(bias)).numpy()
    np.testing.assert_array_equal(out, exact_product(x, blocks, kind, bias))
    product, bound = true_product(x, blocks, kind, bias)
    assert (np.abs(out - product) <= bound).all()


@KINDS
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(library: Path, kind: object) -> None:
    rng = np.random.default_rng(1)
    blocks = random_matrix(kind, 300, 512, rng)
    x = torch.from_numpy(rng.standard_normal((600, 512)).astype(np.float32))
    results = []
    for variant in VARIANTS:
        for threads in (1, 2, 3):
            kernels = NativeKernels(library, threads, variant)
            weight = PackedWeight(QuantizedWeight(blocks, kind, torch.float32), kernels)
            # A slab is 256 rows: these are below, at and above it.
            results += [weight.linear(x[:rows]) for rows in (1, 2, 3, 7, 8, 40, 256, 257, 600)]
    for result in results:
        assert torch.equal(result, results[-1][: len(result)])
    assert torch.equal(weight.linear(x[255:258]), results[-1][255:258])
    assert torch.equal(weight.linear(x[590:]), results[-1][590:])


@KINDS
@pytest.mark.parametrize("rows", [1, 8, 21])
def test_packing_keeps_every_bit(kernels: NativeKernels, kind: object, rows: int) -> None:
    blocks = torch.from_numpy(
        np.random.default_rng(rows).integers(0, 256, (rows, 3 * kind.block_bytes), dtype=np.uint8)
    )
    packed = kernels.pack(blocks, kind)
    ids = torch.randint(0, rows, (30,), generator=torch.Generator().manual_seed(0))
    unpacked = kernels.unpack(packed, kind, (rows, 3 * kind.block_size), ids)
    assert torch.equal(unpacked, blocks[ids])


@KINDS
def test_rows_and_dequantize_are_those_of_the_blocks(kernels: NativeKernels, kind: object) -> None:
    blocks = random_matrix(kind, 21, 512, np.random.default_rng(0))
    plain = QuantizedWeight(blocks, kind, torch.float32)
    packed = PackedWeight(plain, kernels)
    ids = torch.tensor([[20, 0], [7, 7]])
    assert torch.equal(packed.rows(ids), plain.rows(ids))
    assert torch.equal(packed.dequantize(torch.float16), dequantize(blocks, kind, torch.float16))
    assert packed.shape == plain.shape and packed.to(torch.device("cpu")) is packed
    assert packed.rows(torch.tensor([], dtype=torch.int64)).shape == (0, 512)
    for bad in (-1, 21):
        with pytest.raises(IndexError):
            packed.rows(torch.tensor([0, bad]))


@KINDS
def test_extreme_codes_and_activations_do_not_overflow(kernels: NativeKernels, kind: object) -> None:
    n, k = 9, 512
    rng = np.random.default_rng(2)
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        blocks = torch.full((n, k // kind.block_size * kind.block_bytes), fill, dtype=torch.uint8)
        scaled = random_matrix(kind, n, k, rng).view(-1, kind.block_bytes)
        places = {"Q4_1": slice(0, 4), "Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}
        place = places.get(kind.name, slice(0, 2))
        blocks.view(-1, kind.block_bytes)[:, place] = scaled[:, place]
        for x in (np.ones((3, k)), -np.ones((3, k)), np.where(np.arange(k) % 2, 1, -1) * np.ones((3, 1))):
            x = (x * 1e20).astype(np.float32)
            out = PackedWeight(QuantizedWeight(blocks, kind, torch.float32), kernels).linear(
                torch.from_numpy(x)
            )
            np.testing.assert_array_equal(out.numpy(), exact_product(x, blocks, kind, None))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_shows_in_its_row_alone(kernels: NativeKernels, bad: float) -> None:
    kind = FORMATS["Q4_1"]
    weight = PackedWeight(
        QuantizedWeight(random_matrix(kind, 9, 96, np.random.default_rng(3)), kind, torch.float32), kernels
    )
    x = torch.randn(4, 96, generator=torch.Generator().manual_seed(0))
    clean = weight.linear(x)
    x[2, 70] = bad
    out = weight.linear(x)
    assert out[2].isnan().all() and torch.equal(out[[0, 1, 3]], clean[[0, 1, 3]])


def test_nothing_and_next_to_nothing(kernels: NativeKernels) -> None:
    kind = FORMATS["Q8_0"]
    weight = PackedWeight(
        QuantizedWeight(random_matrix(kind, 9, 64, np.random.default_rng(4)), kind, torch.float32), kernels
    )
    assert weight.linear(torch.empty(0, 64)).shape == (0, 9)
    assert weight.linear(torch.zeros(2, 3, 64)).abs().max() == 0
    assert weight.linear(torch.full((64,), 1e-42)).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(kernels: NativeKernels, dtype: torch.dtype) -> None:
    kind = FORMATS["Q4_0"]
    blocks = random_matrix(kind, 40, 256, np.random.default_rng(5))
    weight = PackedWeight(QuantizedWeight(blocks, kind, dtype), kernels)
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Not contiguous, as a slice of a fused product is.
    wide = torch.cat([x, x], 1)[:, :256]
    expected = weight.linear(x.float(), bias.float()).to(dtype)
    assert expected.dtype == dtype and torch.equal(weight.linear(wide, bias), expected)


def test_which_weights_are_accelerated(kernels: NativeKernels) -> None:
    q5_k, q4_k = GGML_TYPES[13], GGML_TYPES[12]
    other = QuantizedWeight(torch.zeros(8, q5_k.block_bytes, dtype=torch.uint8), q5_k, torch.float32)
    known = QuantizedWeight(torch.zeros(8, q4_k.block_bytes, dtype=torch.uint8), q4_k, torch.float32)
    stacked = accelerate(StackedWeight([known, other]), kernels)
    assert isinstance(stacked, StackedWeight)
    assert [type(part) for part in stacked.parts] == [PackedWeight, QuantizedWeight]
    assert accelerate(other, None) is other
    wide = DenseWeight(torch.randn(4, 8, dtype=torch.float64))
    assert accelerate(wide, kernels) is wide
