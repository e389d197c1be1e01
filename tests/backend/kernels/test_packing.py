"""Packed matrices: the numbers come back as they were, and which matrices are packed."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.quant import dequantize
from mini_sglang.backend.weights import (
    DenseWeight,
    PackedWeight,
    QuantizedWeight,
    StackedWeight,
    Weight,
    accelerate,
    stack_rows,
)
from tests.backend.kernels.twins import DENSE, FORMATS, pack, plain, random_matrix

KINDS = pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
Q5_K, Q4_K = GGML_TYPES[13], GGML_TYPES[12]


@KINDS
def test_packing_keeps_every_bit(kernels: NativeKernels, kind: GGMLType) -> None:
    rng = np.random.default_rng(0)
    for rows, per_row in itertools.product((1, 15, 16, 17, 40), (1, 2, 3, 7)):
        size = (rows, per_row * kind.block_bytes)
        blocks = torch.from_numpy(rng.integers(0, 256, size, dtype=np.uint8))
        packed = kernels.pack(blocks, kind)
        shape = rows, per_row * kind.block_size
        assert torch.equal(kernels.unpack(packed, kind, shape, torch.arange(rows)), blocks)
        ids = torch.from_numpy(rng.integers(0, rows, 30))
        assert torch.equal(kernels.unpack(packed, kind, shape, ids), blocks[ids])


@KINDS
def test_packing_takes_no_more_memory_than_whole_groups(kernels: NativeKernels, kind: GGMLType) -> None:
    k = 512 if kind.quantized else 33
    blocks = random_matrix(kind, 32, k)
    # A scale and a minimum of 6 bits are kept in a byte each; an odd column of bfloat16 has a neighbour.
    spare = {"Q4_K": 4 * 2, "BF16": 2}.get(kind.name, 0) * 32
    assert pack(kernels, kind, blocks).nbytes == blocks.numel() + spare
    assert pack(kernels, kind, blocks[:17]).nbytes == blocks.numel() + spare


@KINDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_dequantize_and_to_give_the_numbers(
    kernels: NativeKernels, kind: GGMLType, dtype: torch.dtype
) -> None:
    k = 512 if kind.quantized else 37
    blocks = random_matrix(kind, 21, k)
    packed = pack(kernels, kind, blocks, dtype)
    assert (packed.type, packed.shape, packed.dtype) == (kind, (21, k), dtype)
    numbers = dequantize(blocks, kind, dtype)
    ids = torch.tensor([[20, 0], [7, 7]])
    assert torch.equal(packed.rows(ids), numbers[ids]) and packed.rows(ids).dtype == dtype
    assert packed.rows(torch.tensor([], dtype=torch.int64)).shape == (0, k)
    for other in (torch.float32, torch.bfloat16, torch.float16):
        assert torch.equal(packed.dequantize(other), dequantize(blocks, kind, other))
    assert packed.to(torch.device("cpu")) is packed
    moved = packed.to(torch.device("meta"))
    assert type(moved) is (QuantizedWeight if kind.quantized else DenseWeight)
    assert (moved.shape, moved.dtype) == ((21, k), dtype)
    for bad in (-1, 21):
        with pytest.raises(IndexError, match="from 0 to 20"):
            packed.rows(torch.tensor([0, bad]))


@KINDS
def test_a_view_that_is_neither_aligned_nor_contiguous_is_packed(
    kernels: NativeKernels, kind: GGMLType
) -> None:
    k = 256 if kind.quantized else 19
    blocks = random_matrix(kind, 5, k)
    memory = torch.zeros(5, blocks.shape[1] + 7, dtype=torch.uint8)
    memory[:, 7:] = blocks
    assert torch.equal(kernels.pack(memory[:, 7:], kind), kernels.pack(blocks, kind))
    if not kind.quantized:
        wide = torch.cat([blocks.view(DENSE[kind.name])] * 2, 1)[:, :k]
        packed = PackedWeight(DenseWeight(wide), kernels, torch.float32)
        assert torch.equal(packed.packed, kernels.pack(blocks, kind))


def test_which_formats_are_taken(kernels: NativeKernels) -> None:
    """The generic products serve where a matrix is to stay in blocks; a dense one torch multiplies faster."""
    taken = {kind.name for kind in GGML_TYPES.values() if kernels.has_format(kind)}
    in_blocks = {"Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q6_K"}
    assert kernels.fast == (kernels.variant != "generic")
    assert taken == (in_blocks | {"F32", "F16", "BF16"} if kernels.fast else in_blocks)
    assert kernels.fast_formats == (in_blocks if kernels.fast else set())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("compute", [None, torch.float32])
def test_dense_matrices_are_packed_or_get_the_compute_dtype(
    kernels: NativeKernels, dtype: torch.dtype, compute: torch.dtype | None
) -> None:
    weight = DenseWeight(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)).to(dtype))
    fast = accelerate(weight, kernels, compute)
    assert fast.dtype == (compute or dtype)
    assert type(fast) is (PackedWeight if kernels.fast and dtype != torch.float64 else DenseWeight)
    assert torch.equal(fast.dequantize(torch.float64), weight.tensor.double())
    alone = accelerate(weight, None, compute)
    assert type(alone) is DenseWeight and (alone is weight) == (compute in (None, dtype))


def test_blocks_are_packed_or_stay(kernels: NativeKernels) -> None:
    other, known = (plain(kind, random_matrix(kind, 8, 256)) for kind in (Q5_K, Q4_K))
    assert type(accelerate(known, kernels)) is PackedWeight
    for kept in (accelerate(other, kernels, torch.bfloat16), accelerate(known, None, torch.bfloat16)):
        assert type(kept) is QuantizedWeight and kept.dtype == torch.bfloat16
    assert accelerate(accelerate(known, kernels), kernels).dtype == torch.float32


def mixture() -> tuple[StackedWeight, list[Weight]]:
    kinds = [*FORMATS.values(), Q5_K]
    parts: list[Weight] = [plain(kind, random_matrix(kind, 7 + i, 256, i)) for i, kind in enumerate(kinds)]
    stacked = stack_rows(parts)
    assert isinstance(stacked, StackedWeight)
    return stacked, parts


@pytest.mark.parametrize("with_bias", [False, True])
def test_a_stack_of_every_format_multiplies_as_its_parts(kernels: NativeKernels, with_bias: bool) -> None:
    stacked, parts = mixture()
    fast = accelerate(stacked, kernels, torch.float32)
    assert isinstance(fast, StackedWeight) and fast.shape == stacked.shape and fast.dtype == torch.float32
    x = torch.randn(6, 256, generator=torch.Generator().manual_seed(1))
    bias = torch.linspace(-2, 2, fast.shape[0]) if with_bias else None
    pieces = [None] * len(parts) if bias is None else bias.split([part.shape[0] for part in parts])
    alone = [accelerate(part, kernels, torch.float32) for part in parts]
    expected = [part.linear(x, piece) for part, piece in zip(alone, pieces, strict=True)]
    assert torch.equal(fast.linear(x, bias), torch.cat(expected, 1))
    numbers = torch.cat([part.dequantize(torch.float32) for part in parts])
    assert torch.equal(fast.dequantize(torch.float32), numbers)
    ids = torch.arange(fast.shape[0]).flip(0)
    assert torch.equal(fast.rows(ids), numbers[ids])


def test_a_stack_gives_jobs_where_all_its_parts_do(kernels: NativeKernels) -> None:
    stacked, _ = mixture()
    assert accelerate(stacked, kernels, torch.float32).products() is None  # Q5_K is torch's
    known = StackedWeight([part for part in stacked.parts if getattr(part, "type", None) != Q5_K])
    jobs = accelerate(known, kernels, torch.float32).products()
    assert (jobs is not None) == kernels.fast
    if jobs is not None:
        assert [job.n for job in jobs] == [part.shape[0] for part in known.parts]
    assert accelerate(known, kernels, torch.bfloat16).products() is None


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
def test_lookup_gives_the_rows_to_the_bit(kernels: NativeKernels, kind: GGMLType) -> None:
    columns = 512 if kind.quantized else 37
    weight = pack(kernels, kind, random_matrix(kind, 37, columns))
    ids = torch.tensor([36, 0, 15, 16, 17, 31, 32, 36])
    job, out = weight.lookup(), torch.full((len(ids), columns), torch.nan)
    assert job is not None
    job.ids, job.out = ids.data_ptr(), out.data_ptr()
    kernels.run(job, len(ids))
    assert torch.equal(out, weight.rows(ids))
    assert pack(kernels, kind, random_matrix(kind, 37, columns), torch.bfloat16).lookup() is None
