"""Weight types against plain matrices of the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mini_sglang.backend import weights
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, StackedWeight, Weight, stack_rows
from mini_sglang.errors import ModelLoadError
from tests.backend.test_quant import random_blocks

Q4_0, Q8_0, Q6_K = GGML_TYPES[2], GGML_TYPES[8], GGML_TYPES[14]


def dense(rows: int, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> DenseWeight:
    """Small whole numbers: sums of their products are exact, whatever the order of summation."""
    generator = torch.Generator().manual_seed(seed)
    return DenseWeight(torch.randint(-9, 10, (rows, columns), generator=generator).to(dtype))


def quantized(rows: int, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weight:
    """Q8_0 with scales of 1, so whole numbers too."""
    rng = np.random.default_rng(seed)
    blocks = np.empty((rows * columns // 32, 34), dtype=np.uint8)
    blocks[:, :2] = np.float16(1).reshape(1).view(np.uint8)
    blocks[:, 2:] = rng.integers(-9, 10, (len(blocks), 32)).astype(np.int8).view(np.uint8)
    return QuantizedWeight(torch.from_numpy(blocks.reshape(rows, -1)), Q8_0, dtype)


def other_format(rows: int, columns: int = 64, seed: int = 0, dtype: torch.dtype = torch.float32) -> Weight:
    """Q4_0 with scales of 1."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // 32, 18), dtype=np.uint8)
    blocks[:, :2] = np.float16(1).reshape(1).view(np.uint8)
    return QuantizedWeight(torch.from_numpy(blocks.reshape(rows, -1)), Q4_0, dtype)


def whole(*shape: int) -> torch.Tensor:
    return torch.randint(-9, 10, shape, generator=torch.Generator().manual_seed(9)).float()


Maker = Callable[..., Weight]
KINDS: dict[str, Callable[[], Weight]] = {
    "dense": lambda: dense(24),
    "quantized": lambda: quantized(24),
    "stacked": lambda: StackedWeight([dense(10), quantized(8), other_format(6)]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lead", [(), (1,), (5,), (2, 3), (0,)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_is_the_product_with_the_dense_matrix(
    kind: str, lead: tuple[int, ...], with_bias: bool
) -> None:
    weight = KINDS[kind]()
    x, bias = whole(*lead, 64), whole(24) if with_bias else None
    expected = F.linear(x, weight.dequantize(torch.float32), bias)
    out = weight.linear(x, bias)
    assert out.shape == (*lead, 24) and out.dtype == x.dtype
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ids", [[], [3], [0, 23, 9, 9, 17], [[1, 2], [22, 0]]])
def test_rows_are_an_embedding(kind: str, ids: list[int]) -> None:
    weight = KINDS[kind]()
    index = torch.tensor(ids, dtype=torch.int64)
    expected = F.embedding(index, weight.dequantize(torch.float32))
    assert torch.equal(weight.rows(index), expected)


@pytest.mark.parametrize("chunk_weights", [1, 64, 300, 1 << 20])
def test_quantised_linear_in_chunks_of_rows(monkeypatch: pytest.MonkeyPatch, chunk_weights: int) -> None:
    monkeypatch.setattr(weights, "_CHUNK_WEIGHTS", chunk_weights)
    weight, x, bias = quantized(23), whole(3, 64), whole(23)
    assert torch.equal(weight.linear(x, bias), F.linear(x, weight.dequantize(torch.float32), bias))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_quantised_computes_in_the_dtype_of_x(dtype: torch.dtype) -> None:
    weight = QuantizedWeight(torch.from_numpy(random_blocks(Q6_K, 40, 256)), Q6_K, dtype)
    x = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)).to(dtype)
    out = weight.linear(x)
    assert out.dtype == dtype and weight.rows(torch.tensor([1])).dtype == dtype
    torch.testing.assert_close(out, F.linear(x, weight.dequantize(dtype)))


def test_a_quantised_weight_keeps_only_its_blocks() -> None:
    blocks = torch.from_numpy(random_blocks(Q6_K, 40, 512))
    weight = QuantizedWeight(blocks, Q6_K, torch.float32)
    assert weight.shape == (40, 512) and weight.nbytes == 40 * 2 * 210
    weight.linear(whole(1, 512))
    held = [value for value in vars(weight).values() if isinstance(value, torch.Tensor)]
    assert len(held) == 1 and held[0].data_ptr() == blocks.data_ptr()


@pytest.mark.parametrize(
    ("makers", "result"),
    [
        ((dense, dense, dense), DenseWeight),
        ((quantized, quantized, quantized), QuantizedWeight),
        ((quantized, quantized, other_format), StackedWeight),
        ((dense, quantized, dense), StackedWeight),
    ],
)
def test_stacked_rows_give_what_the_parts_give(makers: tuple[Maker, ...], result: type[Weight]) -> None:
    parts = [make(rows, seed=rows) for make, rows in zip(makers, (24, 8, 9), strict=True)]
    stacked = stack_rows(parts)
    assert type(stacked) is result
    assert stacked.shape == (41, 64)
    assert stacked.nbytes == sum(part.nbytes for part in parts)
    assert torch.equal(
        stacked.dequantize(torch.float32), torch.cat([part.dequantize(torch.float32) for part in parts])
    )
    x, bias = whole(5, 64), whole(41)
    expected = [
        part.linear(x, piece) for part, piece in zip(parts, torch.split(bias, [24, 8, 9]), strict=True)
    ]
    assert torch.equal(stacked.linear(x, bias), torch.cat(expected, -1))
    assert torch.equal(stacked.linear(x), torch.cat([part.linear(x) for part in parts], -1))
    ids = torch.tensor([[0, 40], [24, 31]])
    assert torch.equal(stacked.rows(ids), stacked.dequantize(torch.float32)[ids])


def test_stacking_one_weight_is_that_weight() -> None:
    weight = dense(3)
    assert stack_rows([weight]) is weight


def test_stacking_other_compute_dtypes_keeps_them_apart() -> None:
    stacked = stack_rows([dense(3), dense(3, dtype=torch.bfloat16)])
    assert isinstance(stacked, StackedWeight)


def test_stacking_other_widths_is_refused() -> None:
    with pytest.raises(ModelLoadError, match=r"\(3, 64\), \(3, 32\)"):
        stack_rows([dense(3), dense(3, 32)])


@pytest.mark.parametrize("kind", KINDS)
def test_moving_keeps_the_numbers(kind: str) -> None:
    weight = KINDS[kind]()
    moved = weight.to(torch.device("cpu"))
    assert type(moved) is type(weight)
    assert torch.equal(moved.dequantize(torch.float32), weight.dequantize(torch.float32))
