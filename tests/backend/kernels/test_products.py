"""The products of every format against float64, and themselves in other company."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGMLType
from tests.backend.kernels.twins import (
    BLOCKS,
    DENSE,
    FORMATS,
    VARIANTS,
    exact_product,
    pack,
    random_matrix,
    true_product,
)

KINDS = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)


def shape(kind: GGMLType, rng: np.random.Generator, wide: bool) -> tuple[int, int, int]:
    """M, N, K: odd ones too. ``wide`` gives a thread several groups of rows of W at a time."""
    largest = {1: 330, 32: 13, 256: 4}[kind.block_size]
    n = rng.integers(270, 420) if wide else rng.integers(1, 70)
    return int(rng.integers(1, 41)), int(n), int(rng.integers(1, largest)) * kind.block_size


def random_x(rows: int, columns: int, rng: np.random.Generator) -> np.ndarray:
    """Rows of very different sizes."""
    return (rng.standard_normal((rows, columns)) * 10.0 ** rng.integers(-3, 3, (rows, 1))).astype(np.float32)


@KINDS
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_products_are_float64_ones_but_for_the_rounding(
    kernels: NativeKernels, kind: GGMLType, wide: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    m, n, k = shape(kind, rng, wide)
    blocks, x = random_matrix(kind, n, k, seed), random_x(m, k, rng)
    bias = rng.standard_normal(n).astype(np.float32) if seed % 2 else None
    weight = pack(kernels, kind, blocks)
    assert weight.shape == (n, k)
    out = weight.linear(torch.from_numpy(x), None if bias is None else torch.from_numpy(bias)).numpy()
    exact, bound = exact_product(x, blocks, kind, bias, kernels.variant)
    assert (np.abs(out - exact) <= bound).all()
    product, bound = true_product(x, blocks, kind, bias)
    assert (np.abs(out - product) <= bound).all()


@KINDS
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(
    library: Path, variant: str, kind: GGMLType
) -> None:
    n, k = 331, 512 if kind.quantized else 333
    blocks, x = random_matrix(kind, n, k, 1), torch.from_numpy(random_x(530, k, np.random.default_rng(1)))
    bias = torch.linspace(-1, 1, n)
    results = []
    for threads in (1, 2, 3):
        kernels = NativeKernels(library, threads, variant)
        weight = pack(kernels, kind, blocks)
        # Panels are 4 or 16 rows, from 128 on 6, a slab is 512: these are below, at and above them.
        results += [weight.linear(x[:rows], bias) for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 16, 17, 40, 127)]
        results += [weight.linear(x[:rows], bias) for rows in (128, 131, 512, 513, 530)]
    whole = results[-1]
    for result in results:
        assert torch.equal(result, whole[: len(result)])
    for rows in (slice(13, 14), slice(50, 61), slice(255, 258), slice(500, 530)):
        assert torch.equal(weight.linear(x[rows], bias), whole[rows])
    # Nor on which other rows of the matrix share the call.
    for some in (slice(5, 9), slice(16, 48), slice(300, 331)):
        part = pack(kernels, kind, blocks[some])
        assert torch.equal(part.linear(x, bias[some]), whole[:, some])


@KINDS
@pytest.mark.parametrize("variant", VARIANTS)
def test_small_numbers_are_rounded_as_large_ones_are(library: Path, variant: str, kind: GGMLType) -> None:
    """Powers of two move no digit. With blocks, what is below 2^-100 is taken for zeros."""
    k = 512 if kind.quantized else 19
    weight = pack(NativeKernels(library, 1, variant), kind, random_matrix(kind, 21, k, 3))
    x = torch.randn(5, k, generator=torch.Generator().manual_seed(0))
    product = weight.linear(x)
    assert torch.equal(weight.linear(x * 2.0**-80), product * 2.0**-80)
    assert bool(weight.linear(x * 2.0**-110).any()) is not kind.quantized


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_x_shows_in_its_row_alone(
    kernels: NativeKernels, kind: GGMLType, bad: float
) -> None:
    k = 512 if kind.quantized else 19
    weight = pack(kernels, kind, random_matrix(kind, 21, k, 3))
    x = torch.randn(20, k, generator=torch.Generator().manual_seed(0))
    clean = weight.linear(x)
    x[2, k - 1] = bad
    x[17, 3] = bad
    out = weight.linear(x)
    others = [row for row in range(20) if row not in (2, 17)]
    assert not out[[2, 17]].isfinite().any() and torch.equal(out[others], clean[others])


@KINDS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_in_a_row_of_the_matrix_shows_in_its_column_alone(
    kernels: NativeKernels, kind: GGMLType, bad: float
) -> None:
    n, k = 21, 512 if kind.quantized else 19
    blocks = random_matrix(kind, n, k, 4)
    x = torch.randn(20, k, generator=torch.Generator().manual_seed(0))
    clean = pack(kernels, kind, blocks).linear(x)
    for row in (2, 20):
        if kind.quantized:
            last = blocks[row].view(-1, kind.block_bytes)[-1]
            last[208 if kind.name == "Q6_K" else 0 :][:2].view(torch.float16)[:] = bad
        else:
            blocks[row].view(DENSE[kind.name])[-1] = bad
    out = pack(kernels, kind, blocks).linear(x)
    others = [column for column in range(n) if column not in (2, 20)]
    assert not out[:, [2, 20]].isfinite().any() and torch.equal(out[:, others], clean[:, others])


@KINDS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(kernels: NativeKernels, kind: GGMLType, dtype: torch.dtype) -> None:
    weight = pack(kernels, kind, random_matrix(kind, 40, 256, 5), dtype)
    assert weight.dtype == dtype and weight.products() is None
    x = torch.randn(5, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    bias = torch.randn(40, generator=torch.Generator().manual_seed(1)).to(dtype)
    # Not contiguous, as a slice of a fused product is.
    wide = torch.cat([x, x], 1)[:, :256]
    expected = weight.linear(x.float(), bias.float()).to(dtype)
    assert expected.dtype == dtype and torch.equal(weight.linear(wide, bias), expected)


@KINDS
def test_no_rows_and_any_number_of_dimensions(kernels: NativeKernels, kind: GGMLType) -> None:
    k = kind.block_size * 2
    weight = pack(kernels, kind, random_matrix(kind, 9, k, 4))
    assert weight.linear(torch.empty(0, k)).shape == (0, 9)
    assert weight.linear(torch.zeros(2, 3, k)).abs().max() == 0
    # Neither aligned nor contiguous.
    x = torch.randn(1 + 3 * 2 * 2 * k, generator=torch.Generator().manual_seed(0))[1:].view(3, 2, 2 * k)
    out = weight.linear(x[..., :k])
    assert torch.equal(out.flatten(0, 1), weight.linear(x[..., :k].reshape(6, k).clone()))
    assert torch.equal(weight.linear(x[2, 1, :k]), out[2, 1])


@KINDS
def test_what_does_not_fit_is_refused(kernels: NativeKernels, kind: GGMLType) -> None:
    k = kind.block_size * 2
    weight = pack(kernels, kind, random_matrix(kind, 5, k, 0))
    with pytest.raises(ValueError, match=rf"\[5, {k}\]"):
        weight.linear(torch.zeros(2, k - 1))
    with pytest.raises(ValueError, match="bias"):
        weight.linear(torch.zeros(2, k), torch.zeros(4))


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
def test_extreme_codes_and_activations_do_not_overflow(kernels: NativeKernels, kind: GGMLType) -> None:
    n, k = 19, 512
    places = {"Q4_1": slice(0, 4), "Q4_K": slice(0, 4), "Q6_K": slice(208, 210)}
    place = places.get(kind.name, slice(0, 2))
    for fill in (0x00, 0x7F, 0x80, 0xFF):
        blocks = torch.full((n, k // kind.block_size * kind.block_bytes), fill, dtype=torch.uint8)
        scaled = random_matrix(kind, n, k, 2).view(-1, kind.block_bytes)
        blocks.view(-1, kind.block_bytes)[:, place] = scaled[:, place]
        weight = pack(kernels, kind, blocks)
        for x in (np.ones((9, k)), -np.ones((9, k)), np.where(np.arange(k) % 2, 1, -1) * np.ones((9, 1))):
            x = (x * 1e20).astype(np.float32)
            exact, bound = exact_product(x, blocks, kind, None, kernels.variant)
            assert (np.abs(weight.linear(torch.from_numpy(x)).numpy() - exact) <= bound).all()


@pytest.mark.parametrize("kind", BLOCKS.values(), ids=BLOCKS)
def test_next_to_nothing_times_blocks_is_nothing(kernels: NativeKernels, kind: GGMLType) -> None:
    weight = pack(kernels, kind, random_matrix(kind, 9, 256, 4))
    assert weight.linear(torch.full((3, 256), 1e-42)).abs().max() == 0


def test_bfloat16_rounds_x_where_the_cpu_multiplies_it_and_only_there(kernels: NativeKernels) -> None:
    kind = FORMATS["BF16"]
    one = torch.ones(1, 1)
    weight = pack(kernels, kind, one.bfloat16().view(torch.uint8))
    # Between two, to even: once down, once up.
    between = torch.tensor([[1 + 2.0**-8], [1 + 3 * 2.0**-8], [1 + 2.0**-8 + 2.0**-20], [-1 - 2.0**-8]])
    rounded = kernels.variant == "avx512bf16"
    assert torch.equal(weight.linear(between), between.bfloat16().float() if rounded else between)
    assert kernels.variant != "avx512bf16" or weight.linear(between)[1] == 1 + 2 * 2.0**-7


def test_a_forked_child_computes_and_ends(library: Path) -> None:
    kernels = NativeKernels(library, 3)
    weight = pack(kernels, FORMATS["Q8_0"], random_matrix(FORMATS["Q8_0"], 500, 64, 0))
    x = torch.randn(2, 64, generator=torch.Generator().manual_seed(0))
    expected = weight.linear(x)
    child = os.fork()
    if child == 0:
        # Neither pytest nor the interpreter may go on in the child.
        try:
            same = torch.equal(weight.linear(x), expected)
            kernels._finalizer()
        except BaseException:
            os._exit(2)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(weight.linear(x), expected)
