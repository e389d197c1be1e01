"""What adapters add: the kernels against float64 on every instruction set, the same bits row by row."""

from __future__ import annotations

import pytest
import torch

from mini_sglang.backend.kernels.adapters import NativeAdapters
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.lora.runs import Run, narrowed
from mini_sglang.backend.lora.store import TorchAdapters
from mini_sglang.backend.lora.weights import PLACES, AdapterWeights, Part, Place
from mini_sglang.types import Adapter

CPU = torch.device("cpu")
WIDTHS = (96, 33, 33)  # of the first place, q, k and v
K = 80


def weights(ranks: tuple[int, int, int], seed: int) -> AdapterWeights:
    """An adapter of one layer, which changes only its first place; rank 0 leaves a part out."""
    generator = torch.Generator().manual_seed(seed)
    parts: list[Part] = []
    first = 0
    for width, rank in zip(WIDTHS, ranks, strict=True):
        if rank:
            parts.append(Part(first, torch.randn(width, rank, generator=generator)))
        first += width
    down = torch.randn(sum(ranks), K, generator=generator)
    places = (Place(down, tuple(parts)), *[None] * (len(PLACES) - 1))
    return AdapterWeights(Adapter("a", "", ""), (places,), max(ranks))


ADAPTERS = [weights((8, 8, 8), 1), weights((3, 0, 21), 2), weights((0, 64, 1), 3)]


def exact(runs: list[Run], x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    y = y.double().clone()
    for first, stop, slot in runs:
        place = ADAPTERS[slot].places[0][0]
        assert place is not None
        middle, at = x[first:stop].double() @ place.down.double().T, 0
        for part in place.parts:
            n, rank = part.up.shape
            y[first:stop, part.first : part.first + n] += middle[:, at : at + rank] @ part.up.double().T
            at += rank
    return y


@pytest.mark.parametrize(
    "runs",
    [[(0, 1, 0)], [(0, 1, 1), (1, 2, 2), (2, 7, 0)], [(3, 4, 2), (9, 200, 1), (250, 300, 0)], []],
    ids=["one row", "decodes", "long ones", "none"],
)
def test_the_sum(kernels: NativeKernels, runs: list[Run]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(300, K, generator=generator), torch.randn(300, sum(WIDTHS), generator=generator)
    expected = exact(runs, x, y)
    native, twin = NativeAdapters(kernels, 1, 4), TorchAdapters(CPU, 4)
    results = []
    for math in (native, twin):
        for slot, adapter in enumerate(ADAPTERS):
            math.set(slot, math.prepare(adapter))
        math.begin(runs)
        out = y.clone()
        math.add(0, 0, x, out)
        math.add(0, 1, x, out)  # a place that none of them changes
        torch.testing.assert_close(out.double(), expected, atol=1e-3, rtol=1e-5)
        results.append(out)
    outside = torch.ones(300, dtype=torch.bool)
    for first, stop, _ in runs:
        outside[first:stop] = False
    assert torch.equal(results[0][outside], y[outside])
    # Each row by itself: the same bits, with the compiled kernels.
    for first, stop, slot in runs:
        for row in {first, (first + stop) // 2, stop - 1}:
            alone = y[row : row + 1].clone()
            native.begin([(0, 1, slot)])
            native.add(0, 0, x[row : row + 1], alone)
            assert torch.equal(alone[0], results[0][row])


def test_a_slot_that_was_emptied_adds_nothing(kernels: NativeKernels) -> None:
    native = NativeAdapters(kernels, 1, 1)
    native.set(0, native.prepare(ADAPTERS[0]))
    native.set(0, None)
    native.begin([(0, 2, 0)])
    y = torch.randn(2, sum(WIDTHS))
    before = y.clone()
    native.add(0, 0, torch.randn(2, K), y)
    assert torch.equal(y, before)


def test_rows_that_are_chosen_keep_their_adapters() -> None:
    runs = [(0, 2, 5), (4, 9, 7), (9, 10, 5)]
    assert narrowed(runs, None) == runs
    assert narrowed(runs, torch.tensor([1, 2, 4, 8, 9, 11])) == [(0, 1, 5), (2, 4, 7), (4, 5, 5)]
    assert narrowed(runs, torch.tensor([3])) == []
