"""Products of few rows in Triton, interpreted, against float32 in torch, and where they are taken."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.kernels.triton import few_rows
from mini_sglang.backend.kernels.triton.few_rows import FEW_ROWS, fits, product
from mini_sglang.backend.kernels.triton.launch import FewRowsLaunch, few_rows_launch
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.models.operations import TorchOperations
from mini_sglang.backend.weights import DenseWeight, StackedWeight
from tests.backend.harness import greedy, load
from tests.backend.tiny_models import save_tiny_model

EPS = 1e-5
DTYPES = (torch.float16, torch.bfloat16)
# The interpreter cuts a bfloat16 off where a GPU rounds, once for each rounding.
TOLERANCE = {torch.float16: 4e-3, torch.bfloat16: 4e-2}
# Features (a pair's where they are gated) and columns: less than a tile, whole tiles, several and not whole.
SHAPES = ((1, 8), (5, 40), (16, 512), (21, 1064))
# None is the rule's.
TILES = (None, FewRowsLaunch(8, 512, 2))


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param is not None:
        monkeypatch.setattr(few_rows, "few_rows_launch", lambda *sizes: request.param)


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def near(actual: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual.float(), expected, rtol=tolerance, atol=tolerance)


def weights(features: int, columns: int, dtype: torch.dtype) -> tuple[DenseWeight, Tensor]:
    """A matrix whose products are around 1, and a bias."""
    matrix = random((features, columns), 1, dtype, columns**-0.5)
    return DenseWeight(matrix), random((features,), 2, dtype)


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "columns"), SHAPES)
def test_products_and_sums(features: int, columns: int, dtype: torch.dtype) -> None:
    weight, bias = weights(features, columns, dtype)
    # Rows of a wider tensor.
    x = random((FEW_ROWS, columns + 8), 3, dtype)[:, :columns]
    for rows in range(1, FEW_ROWS + 1):
        expected = F.linear(x[:rows].float(), weight.tensor.float(), bias.float())
        near(product(x[:rows], weight, bias), expected)
        near(product(x[:rows], weight, None), expected - bias.float())
        hidden = random((FEW_ROWS + 1, features), 4, dtype)
        before = hidden.clone()
        assert product(x[:rows], weight, bias, residual=hidden[:rows]).data_ptr() == hidden.data_ptr()
        near(hidden[:rows], before[:rows].float() + expected)
        assert torch.equal(hidden[rows:], before[rows:])


@pytest.mark.usefixtures("tiles")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("features", "columns"), SHAPES)
def test_norms_and_gates(features: int, columns: int, dtype: torch.dtype) -> None:
    weight, bias = weights(2 * features, columns, dtype)
    norm = 1 + random((columns,), 5, dtype, 0.2)
    # A row's size is its own.
    x = random((FEW_ROWS, columns), 3, dtype) * torch.tensor([[3.0], [0.05]]).to(dtype)
    before = x.clone()
    for rows in range(1, FEW_ROWS + 1):
        normed = F.rms_norm(x[:rows].float(), (columns,), norm.float(), EPS)
        both = F.linear(normed, weight.tensor.float(), bias.float())
        near(product(x[:rows], weight, bias, norm, EPS), both)
        gate, up = both.chunk(2, -1)
        near(product(x[:rows], weight, bias, norm, EPS, gated=True), F.silu(gate) * up)
    assert torch.equal(x, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_and_beside_others(dtype: torch.dtype) -> None:
    weight, bias = weights(10, 1064, dtype)
    norm = random((1064,), 5, dtype)
    x = random((FEW_ROWS, 1064), 3, dtype)
    for gated in (False, True):
        alone = torch.cat([product(row, weight, bias, norm, EPS, gated) for row in x.split(1)])
        for rows in range(2, FEW_ROWS + 1):
            assert torch.equal(product(x[:rows], weight, bias, norm, EPS, gated), alone[:rows])


def test_numbers_that_are_none() -> None:
    """They stay in their row and in their feature."""
    weight, _ = weights(20, 40, torch.bfloat16)
    weight.tensor[7, 3] = torch.inf
    x = random((2, 40), 3, torch.bfloat16)
    x[1, 5] = torch.nan
    out = product(x, weight, None)
    assert out[1].isnan().all() and out[0, 7].isinf()
    near(out[0, :7], F.linear(x[0].float(), weight.tensor[:7].float()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, FEW_ROWS, FEW_ROWS + 1])
def test_operations_of_a_layer(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer's products after one another: the residual too is what torch's operators make of it."""
    monkeypatch.setattr(few_rows, "few_rows_launch", lambda *sizes: FewRowsLaunch(16, 64, 1))
    ours, torch_s = TritonOperations(EPS), TorchOperations(EPS)
    gate_up, _ = weights(2 * 48, 64, dtype)
    down, bias = weights(64, 48, dtype)
    norm = 1 + random((64,), 5, dtype, 0.2)
    found = []
    for ops in (ours, torch_s):
        hidden = random((rows, 64), 6, dtype)
        delta = ops.linear_add(random((rows, 48), 7, dtype), down, bias, hidden)
        assert (delta is None) == (ops is ours and rows <= FEW_ROWS)
        inner = ops.norm_gated(hidden, delta, norm, gate_up, None)
        delta = ops.linear_add(inner, down, None, hidden)
        found.append((ops.norm_linear(hidden, delta, norm, gate_up, None), hidden))
    for actual, expected in zip(*found, strict=True):
        near(actual, expected.float())


def test_a_delta_is_added_before() -> None:
    weight, _ = weights(40, 64, torch.bfloat16)
    norm, delta = random((64,), 5, torch.bfloat16), random((2, 64), 6, torch.bfloat16)
    for gated in (False, True):
        found = []
        for ops in (TritonOperations(EPS), TorchOperations(EPS)):
            hidden = random((2, 64), 3, torch.bfloat16)
            call = ops.norm_gated if gated else ops.norm_linear
            found.append((call(hidden, delta, norm, weight, None), hidden))
        for actual, expected in zip(*found, strict=True):
            near(actual, expected.float())


def test_what_fits() -> None:
    weight, _ = weights(16, 64, torch.bfloat16)
    assert [fits(weight, rows) for rows in (0, 1, FEW_ROWS, FEW_ROWS + 1)] == [False, True, True, False]
    assert not fits(StackedWeight([weight, weight]), 1)
    assert not fits(DenseWeight(weight.tensor.float()), 1)
    assert not fits(DenseWeight(weight.tensor[:, :60].contiguous()), 1)
    assert not fits(DenseWeight(weight.tensor[:, :32]), 1)


@pytest.mark.parametrize("columns", [8, 576, 1024, 3072, 17408])
@pytest.mark.parametrize("features", [1, 5, 1024, 3072, 17408, 151936])
def test_tiles(features: int, columns: int) -> None:
    for gated in (False, True):
        launch = few_rows_launch(features, columns, gated)
        for size in (launch.block_n, launch.block_k, launch.warps):
            assert size > 0 and size & (size - 1) == 0
        # At least a load for every thread.
        assert launch.block_k >= 8 and launch.block_n * launch.block_k >= 256 * launch.warps


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_ids_of_the_plain_way(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a bias, and with norms of heads; prompts of more rows than are few, then decodes of few."""
    folder = save_tiny_model(tmp_path, family)
    prompts = [[(7 * i * i + 3 * i + s) % 190 + 5 for i in range(length)] for s, length in enumerate((2, 9))]
    # The interpreter takes as long for a small tile as for a large one.
    monkeypatch.setattr(few_rows, "few_rows_launch", lambda *sizes: FewRowsLaunch(64, 128, 4))
    calls = []

    def counting(x: Tensor, *args: object, **given: object) -> Tensor:
        calls.append(len(x))
        return product(x, *args, **given)  # type: ignore[arg-type]

    monkeypatch.setattr(few_rows, "product", counting)
    ids = greedy(load(folder, kernels="triton", dtype="fp16"), prompts, 4)
    assert calls and max(calls) <= FEW_ROWS
    taken = len(calls)
    monkeypatch.setattr(few_rows, "fits", lambda weight, rows: False)
    assert greedy(load(folder, kernels="triton", dtype="fp16"), prompts, 4) == ids
    assert len(calls) == taken
