"""The operations between the products in Triton, interpreted, against their twin in torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
from torch import Tensor
from triton.runtime import interpreter

from mini_sglang.backend.fp8 import Fp8Weight
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.kv.layered import LayeredKVPool, LayerShape
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.operations import TorchOperations
from mini_sglang.backend.models.rope import Rotations
from mini_sglang.backend.weights import accelerate

EPS = 1e-5
TRITON, TORCH = TritonOperations(EPS), TorchOperations(EPS)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Units in the last place. The interpreter cuts a bfloat16 off where a GPU rounds, once for each rounding.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 2e-3, torch.bfloat16: 2.5e-2}
CPU = torch.device("cpu")


def random(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)


def near(actual: Tensor, expected: Tensor, size: float = 1.0) -> None:
    """``size`` is that of what was added up."""
    tolerance = TOLERANCE[actual.dtype]
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * size, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 48, 100, 576, 1500])
def test_norm_adds_and_norms(width: int, dtype: torch.dtype) -> None:
    weight = random((width,), 2, dtype)
    for rows in (1, 5):
        for delta in (None, random((rows, width), 1, dtype)):
            hidden = random((rows, width), 0, dtype)
            twin = hidden.clone()
            near(TRITON.norm(hidden, delta, weight), TORCH.norm(twin, delta, weight))
            assert torch.equal(hidden, twin) or dtype == torch.bfloat16
            near(hidden, twin)


def test_norm_of_small_large_and_broken_rows() -> None:
    hidden = torch.stack([torch.full((16,), value) for value in (0.0, 1e-12, 1e15, torch.nan, 1)])
    near(TRITON.norm(hidden.clone(), None, torch.ones(16)), TORCH.norm(hidden.clone(), None, torch.ones(16)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(1, 1, 64), (6, 2, 80), (4, 4, 16), (7, 1, 128), (8, 2, 256)]
)
def test_norm_of_heads_rotation_and_kv(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([9, 0, 31, 17])
    rotations = Rotations(1.0 / 100.0 ** (torch.arange(0, head_dim, 2) / head_dim), 1.1, dtype)
    turns = rotations.at(torch.tensor([0, 3, 700, 41]), 701)
    norm = random((heads + kv_heads, head_dim), 1, dtype)
    for head_norm, rotation in ((norm, turns), (None, turns), (norm, None), (None, None)):
        qkvs, pools = [], []
        for operations in (TRITON, TORCH):
            kv = KVPool(
                num_layers=2,
                num_pages=2,
                page_size=16,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=CPU,
            )
            kv.data.fill_(torch.nan)
            qkv = random((4, heads + 2 * kv_heads, head_dim), 0, dtype)
            operations.rotate_and_store(qkv, head_norm, rotation, kv, 1, slots)
            qkvs.append(qkv)
            pools.append(kv.data)
        near(*qkvs, size=4.0)
        near(*pools, size=4.0)
        written = pools[0][1].isnan().logical_not().any(1).nonzero()[:, 0]
        assert written.tolist() == sorted(slots.tolist()) and pools[0][0].isnan().all()


def test_rows_of_padding_write_no_kv() -> None:
    kv = LayeredKVPool(
        [LayerShape(2, 16, 16), LayerShape(2, 16, 16)],
        num_pages=2,
        page_size=4,
        dtype=torch.float32,
        device=CPU,
    )
    kv.data.fill_(torch.nan)
    qkv = random((3, 8, 16), 0, torch.float32)
    TRITON.rotate_and_store(qkv, None, None, kv, 1, torch.tensor([5, -1, 2]))
    keys, values = kv.keys_values(1, kv.rows(1))
    assert torch.equal(keys[5], qkv[0, 4:6]) and torch.equal(values[2], qkv[2, 6:])
    assert kv.data.isnan().logical_not().sum() == 2 * 2 * 2 * 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 16, 1000, 1500])
def test_silu_and_mul(width: int, dtype: torch.dtype) -> None:
    gate_up = random((3, 2 * width), 0, dtype)
    gate_up[0, 0] = -200.0
    near(TRITON.silu_and_mul(gate_up.clone()), TORCH.silu_and_mul(gate_up.clone()))


def to_e4m3(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
    """As a GPU converts; the interpreter cuts off."""
    assert values.dtype == np.float32
    return torch.from_numpy(values.copy()).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_e4m3(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = Fp8Weight.of(random((32, 112), 1, torch.float32), dtype)
    fused = accelerate(weight, None, triton=True)
    x = random((7, 112), 0, dtype)
    x[1], x[2] = 0.0, x[2] * 1e-4
    x[3, 5], x[4, 6] = torch.nan, torch.inf
    wide = torch.zeros(7, 130, dtype=dtype)
    wide[:, 5:117] = x
    own = interpreter._convert_float

    def convert(values: np.ndarray, source: object, target: object, mode: object) -> np.ndarray:
        chosen = to_e4m3 if target == triton.language.float8e4nv else own
        return chosen(values, source, target, mode)

    monkeypatch.setattr(interpreter, "_convert_float", convert)
    for rows in (x, wide[:, 5:117], x.t().contiguous().t()):
        with np.errstate(invalid="ignore"):
            found = fused.linear(rows)
        expected = weight.linear(x)
        assert torch.equal(found[:3], expected[:3]) and torch.equal(found[5:], expected[5:])
        assert found[3:5].isnan().all()
