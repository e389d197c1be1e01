"""The compiled operations between the products against their torch twins, and themselves in other company."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.operations import Operations, TorchOperations
from mini_sglang.backend.models.rope import Rotations

EPS = 1e-5
# Rows enough for one thread, and for the threads to share.
ROWS = [1, 2, 5, 300]


def both(kernels: NativeKernels) -> tuple[Operations, Operations]:
    return NativeOperations(kernels, EPS), TorchOperations(EPS)


def rows(count: int, width: int, seed: int) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed)) * 3


def near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("width", [8, 24, 576])
def test_norm_adds_and_norms(kernels: NativeKernels, count: int, width: int) -> None:
    hidden, delta, weight = rows(count, width, 0), rows(count, width, 1), rows(1, width, 2)[0]
    for change in (None, delta):
        sums, outs = [], []
        for operations in both(kernels):
            sums.append(hidden.clone())
            outs.append(operations.norm(sums[-1], change, weight))
        assert torch.equal(*sums)
        near(*outs)


def test_norm_of_small_large_and_broken_rows(kernels: NativeKernels) -> None:
    hidden = torch.stack([torch.full((16,), value) for value in (0.0, 1e-12, 1e15, torch.nan, torch.inf, 1)])
    native, twin = (operations.norm(hidden.clone(), None, torch.ones(16)) for operations in both(kernels))
    torch.testing.assert_close(native, twin, rtol=2e-6, atol=0, equal_nan=True)


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_rotate_and_store(kernels: NativeKernels, count: int, head_dim: int) -> None:
    heads, kv_heads, layers = 6, 2, 2
    rotations = Rotations(torch.linspace(1, 0.01, head_dim // 2), 1.3, torch.float32)
    turns = rotations.at(torch.arange(count) * 7, count * 7)
    slots = torch.randperm(count + 9, generator=torch.Generator().manual_seed(3))[:count]
    norm = rows(heads + kv_heads, head_dim, 6)
    for turning, head_norm in ((turns, None), (None, None), (turns, norm), (None, norm)):
        qkvs, pools = [], []
        for operations in both(kernels):
            kv = KVPool(
                num_layers=layers,
                num_pages=count + 9,
                page_size=1,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=torch.float32,
                device=torch.device("cpu"),
            )
            kv.data.fill_(-1)
            qkv = rows(count, (heads + 2 * kv_heads) * head_dim, 4).view(count, -1, head_dim)
            operations.rotate_and_store(qkv, head_norm, turning, kv, 1, slots)
            qkvs.append(qkv)
            pools.append(kv.data)
        near(*qkvs)
        near(*pools)
        assert torch.equal(pools[0][1][slots], qkvs[0].flatten(1)[:, heads * head_dim :])
        assert (pools[0][0] == -1).all() and int((pools[0][1] != -1).any(1).sum()) == count


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("width", [8, 40, 1536])
def test_silu_and_mul(kernels: NativeKernels, count: int, width: int) -> None:
    gate_up = rows(count, 2 * width, 5) * 5
    native, twin = both(kernels)
    near(native.silu_and_mul(gate_up.clone()), twin.silu_and_mul(gate_up.clone()))


def test_silu_of_the_ends_of_the_scale(kernels: NativeKernels) -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 86.0, -86.0, 3e38, torch.nan])
    gate_up = torch.cat((gate, torch.full((8,), 2.0)))[None]
    native, twin = (operations.silu_and_mul(gate_up.clone()) for operations in both(kernels))
    torch.testing.assert_close(native, twin, rtol=1e-6, atol=1e-37, equal_nan=True)
    # Beyond -87 the exponential is 0.
    gate_up = torch.cat((torch.full((8,), -3e38), torch.ones(8)))[None]
    assert (both(kernels)[0].silu_and_mul(gate_up).abs() <= 1e-30).all()


@settings(max_examples=25, deadline=None)
@given(count=st.integers(2, 70), first=st.integers(0, 68), size=st.integers(1, 70))
def test_a_row_does_not_depend_on_the_others(
    kernels: NativeKernels, count: int, first: int, size: int
) -> None:
    some = slice(min(first, count - 1), min(first, count - 1) + size)
    operations = both(kernels)[0]
    hidden, delta, weight = rows(count, 640, 0), rows(count, 640, 1), rows(1, 640, 2)[0]
    whole = operations.norm(hidden.clone(), delta, weight)
    part = operations.norm(hidden[some].clone(), delta[some].clone(), weight)
    assert torch.equal(part, whole[some])
    gate_up = rows(count, 1280, 3)
    part = operations.silu_and_mul(gate_up[some].clone())
    assert torch.equal(part, operations.silu_and_mul(gate_up)[some])


@pytest.mark.parametrize(
    ("sizes", "dtype", "fits"),
    [
        ((576, 1536, 64), torch.float32, True),
        ((576, 1536, 64), torch.bfloat16, False),
        ((570, 1536, 64), torch.float32, False),
        ((576, 1530, 64), torch.float32, False),
        ((576, 1536, 24), torch.float32, False),
    ],
)
def test_which_models_fit(sizes: tuple[int, int, int], dtype: torch.dtype, fits: bool) -> None:
    assert NativeOperations.fit(*sizes, dtype) is fits
