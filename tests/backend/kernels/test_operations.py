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
from tests.backend.kernels.sequences import tiles

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
@pytest.mark.parametrize("width", [16, 48, 576])
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


HEADS, KV_HEADS, LAYERS = 6, 2, 2


def pool(slots: int, head_dim: int, dtype: torch.dtype = torch.float32) -> KVPool:
    """Full of bits that no test writes."""
    kv = KVPool(
        num_layers=LAYERS,
        num_pages=slots,
        page_size=1,
        kv_heads=KV_HEADS,
        head_dim=head_dim,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    kv.data.fill_(-1)
    return kv


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_rotate_and_store(kernels: NativeKernels, count: int, head_dim: int) -> None:
    rotations = Rotations(torch.linspace(1, 0.01, head_dim // 2), 1.3, torch.float32)
    turns = rotations.at(torch.arange(count) * 7, count * 7)
    slots = torch.randperm(count + 9, generator=torch.Generator().manual_seed(3))[:count]
    norm = rows(HEADS + KV_HEADS, head_dim, 6)
    for turning, head_norm in ((turns, None), (None, None), (turns, norm), (None, norm)):
        qkvs, pools = [], []
        for operations in both(kernels):
            kv = pool(count + 9, head_dim)
            qkv = rows(count, (HEADS + 2 * KV_HEADS) * head_dim, 4).view(count, -1, head_dim)
            operations.rotate_and_store(qkv, head_norm, turning, kv, 1, slots)
            qkvs.append(qkv)
            pools.append(kv.data)
        near(*qkvs)
        near(*pools)
        assert torch.equal(pools[0][1][slots], qkvs[0].flatten(1)[:, HEADS * head_dim :])
        assert (pools[0][0] == -1).all() and int((pools[0][1] != -1).any(1).sum()) == count


def stored(kernels: NativeKernels, kv: KVPool, keys_and_values: Tensor, slots: Tensor) -> Tensor:
    """What the kernels keep of ``[T, 2 * KV_HEADS, head_dim]``: rows of layer 1 at ``slots``, as bytes."""
    count = len(keys_and_values)
    queries = torch.zeros(count, HEADS, kv.head_dim)
    both(kernels)[0].rotate_and_store(torch.cat([queries, keys_and_values], 1), None, None, kv, 1, slots)
    kept = kv.rows(1).view(torch.uint8)
    others = [slot for slot in range(len(kept)) if slot not in slots.tolist()]
    untouched = pool(len(kept), kv.head_dim, kv.dtype).rows(1).view(torch.uint8)
    assert torch.equal(kept[others], untouched[others])
    assert torch.equal(kv.rows(0).view(torch.uint8), untouched)
    return kept[slots]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_a_tiled_pool_has_the_numbers_of_another_in_its_own_order(
    kernels: NativeKernels, head_dim: int, dtype: torch.dtype
) -> None:
    slots = torch.randperm(64, generator=torch.Generator().manual_seed(3))[:37]
    keys_and_values = rows(37, 2 * KV_HEADS * head_dim, 5).view(37, -1, head_dim)
    plain = pool(64, head_dim, dtype)
    stored(kernels, plain, keys_and_values, slots)
    shape = {
        "num_layers": LAYERS,
        "num_pages": 2,
        "page_size": 32,
        "kv_heads": KV_HEADS,
        "head_dim": head_dim,
    }
    tiled = KVPool(**shape, dtype=dtype, device=torch.device("cpu"), tiled=True)
    tiled.data.fill_(-1)
    queries = torch.zeros(37, HEADS, head_dim)
    fused = torch.cat([queries, keys_and_values], 1)
    both(kernels)[0].rotate_and_store(fused, None, None, tiled, 1, slots)
    expected = tiles(plain, plain.rows(1).view(torch.uint8))
    assert torch.equal(tiled.rows(1).view(torch.uint8).view(4, -1), expected)
    assert (tiled.rows(0) == -1).all()


def hard_numbers(count: int, head_dim: int) -> Tensor:
    """Of every size, halfway between two of 16 bits, too large and too small for them, infinite."""
    generator = torch.Generator().manual_seed(8)
    numbers = torch.randn(count, 2 * KV_HEADS, head_dim, generator=generator)
    numbers *= 10.0 ** torch.randint(-9, 6, (count, 2 * KV_HEADS, head_dim), generator=generator)
    some = torch.randint(0, 1 << 16, (count, 2 * KV_HEADS, head_dim), generator=generator)
    ties = {
        torch.float16: (some.short().view(torch.float16).float(), 0x1000),
        torch.bfloat16: (some.short().view(torch.bfloat16).float(), 0x8000),
    }
    for place, (exact, half) in enumerate(ties.values()):
        bits = (exact.nan_to_num(1.0, 1.0, 1.0).view(torch.int32) + half).view(torch.float32)
        numbers[:, place] = bits[:, place]
    flat = numbers.view(-1)
    ends = [0.0, -0.0, 65504.0, 65519.9, 65520.0, -65520.0, 3.4e38, 2.0**-24, 2.0**-25, 1.0001 * 2.0**-25]
    flat[: len(ends)] = torch.tensor(ends)
    flat[20:23] = torch.tensor([torch.inf, -torch.inf, 1e-42])
    return numbers


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_keys_and_values_are_rounded_as_torch_rounds(
    kernels: NativeKernels, dtype: torch.dtype, head_dim: int, count: int
) -> None:
    numbers = hard_numbers(count, head_dim)
    slots = torch.randperm(count + 9, generator=torch.Generator().manual_seed(3))[:count]
    kept = stored(kernels, pool(count + 9, head_dim, dtype), numbers, slots)
    assert torch.equal(kept, numbers.to(dtype).flatten(1).view(torch.uint8))
    numbers[1, 2, 5] = torch.nan
    kept = stored(kernels, pool(count + 9, head_dim, dtype), numbers, slots).view(dtype)
    expected = numbers.to(dtype).flatten(1)
    assert kept[1].isnan().sum() == 1
    assert torch.equal(kept.nan_to_num(7.0), expected.nan_to_num(7.0))


def from_bytes(kept: Tensor, head_dim: int) -> tuple[Tensor, Tensor]:
    """The numbers ``[T, 2 * KV_HEADS, head_dim]`` of rows of an int8 pool, and their scales."""
    numbers = 2 * KV_HEADS * head_dim
    codes = kept[:, :numbers].view(torch.int8).view(len(kept), -1, head_dim)
    scales = kept[:, numbers:].contiguous().view(torch.float32)
    assert scales.shape == codes.shape[:2]
    return codes.float() * scales[..., None], scales


@pytest.mark.parametrize("count", [3, 300])
@pytest.mark.parametrize("head_dim", [16, 48, 128])
def test_keys_and_values_in_8_bits_are_within_half_a_step(
    kernels: NativeKernels, head_dim: int, count: int
) -> None:
    generator = torch.Generator().manual_seed(count)
    numbers = torch.randn(count, 2 * KV_HEADS, head_dim, generator=generator)
    numbers *= 10.0 ** torch.randint(-20, 20, (count, 2 * KV_HEADS, 1), generator=generator)
    numbers[0, 1] = 0
    numbers[1, 0] = -0.0
    numbers[2, 3] = 1e-42  # below the normal numbers
    numbers[2, 2, 1:] = 0
    numbers[1, 2] = torch.where(torch.arange(head_dim) % 2 == 0, 2.5, -2.5)
    slots = torch.randperm(count + 9, generator=generator)[:count]
    kept = stored(kernels, pool(count + 9, head_dim, torch.int8), numbers, slots)
    back, scales = from_bytes(kept, head_dim)
    largest = numbers.abs().amax(-1)
    assert torch.equal(scales, torch.where(largest < 2.0**-100, 0.0, largest / 127))
    step = scales[..., None].double()
    assert ((back.double() - numbers.double()).abs() <= step * (0.5 + 1e-4) + 2.0**-100).all()
    assert torch.equal(back[0, 1], torch.zeros(head_dim)) and torch.equal(back[1, 0], torch.zeros(head_dim))
    torch.testing.assert_close(back[1, 2], numbers[1, 2], rtol=1e-6, atol=0)
    assert (kept[:, : 2 * KV_HEADS * head_dim].view(torch.int8) != -128).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_head_in_8_bits_that_is_not_finite_stays_so_and_alone(kernels: NativeKernels, bad: float) -> None:
    numbers = rows(5, 2 * KV_HEADS * 32, 9).view(5, 2 * KV_HEADS, 32)
    slots = torch.arange(5)
    clean, _ = from_bytes(stored(kernels, pool(9, 32, torch.int8), numbers, slots), 32)
    for place in (0, 7, 31):
        broken = numbers.clone()
        broken[3, 1, place] = bad
        back, _ = from_bytes(stored(kernels, pool(9, 32, torch.int8), broken, slots), 32)
        assert not back[3, 1].isfinite().any()
        back[3, 1] = clean[3, 1]
        assert torch.equal(back, clean)


@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("width", [16, 80, 1536])
def test_silu_and_mul(kernels: NativeKernels, count: int, width: int) -> None:
    gate_up = rows(count, 2 * width, 5) * 5
    native, twin = both(kernels)
    near(native.silu_and_mul(gate_up.clone()), twin.silu_and_mul(gate_up.clone()))


def test_silu_of_the_ends_of_the_scale(kernels: NativeKernels) -> None:
    gate = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 86.0, -86.0, 3e38, torch.nan])
    between = torch.tensor([-80.0, -60.0, -30.0, -5.0, 5.0, 30.0, 60.0, 87.0])
    gate_up = torch.cat((gate, between, torch.full((16,), 2.0)))[None]
    native, twin = (operations.silu_and_mul(gate_up.clone()) for operations in both(kernels))
    torch.testing.assert_close(native, twin, rtol=5e-7, atol=1e-37, equal_nan=True)
    # Beyond -87 the exponential is 0.
    gate_up = torch.cat((torch.full((16,), -3e38), torch.ones(16)))[None]
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
        ((568, 1536, 64), torch.float32, False),
        ((576, 1528, 64), torch.float32, False),
        ((48, 112, 16), torch.float32, True),
        ((576, 1536, 24), torch.float32, False),
    ],
)
def test_which_models_fit(sizes: tuple[int, int, int], dtype: torch.dtype, fits: bool) -> None:
    assert NativeOperations.fit(*sizes, dtype) is fits
