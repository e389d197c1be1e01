"""The compiled attention against the brute-force twin, and its promise: the same bits in any company."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.kernels.jobs import Attention, SequenceTable
from mini_sglang.backend.kernels.library import NativeKernels
from tests.backend.test_attention import DECODES, SCENES, Scene


@pytest.mark.parametrize("window", [None, 1, 7, 32, 100])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("sequences", SCENES.values(), ids=SCENES)
def test_equals_the_twin(
    kernels: NativeKernels, sequences: list[tuple[int, int]], page_size: int, window: int | None
) -> None:
    for shuffle in (False, True):
        Scene(sequences, page_size, shuffle).check(window, NativeAttention(kernels))


def test_a_sequence_of_nan_leaves_its_neighbours_alone(kernels: NativeKernels) -> None:
    scene = Scene(DECODES, 16, True)
    scene.rows[1].fill_(torch.nan)
    scene.queries[1].fill_(torch.nan)
    out = scene.attend(None, NativeAttention(kernels))
    assert [bool(part.isnan().any()) for part in out] == [False, True, False, False, False]


class Sequence:
    """Keys, values and queries of every position of one sequence, for steps of any cut."""

    def __init__(self, heads: int, kv_heads: int, head_dim: int, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kv_heads = kv_heads
        self.kv = torch.randn(length, 2 * kv_heads * head_dim, generator=generator) * 2
        self.query = torch.randn(length, heads, head_dim, generator=generator) * 2


def attend(
    kernels: NativeKernels,
    parts: list[tuple[Sequence, int, int]],
    page_size: int,
    window: int | None,
    seed: int,
) -> list[Tensor]:
    """One step: of each sequence the positions from first to last, its pages scattered over a pool of NaN."""
    counts = [-(-last // page_size) for _, _, last in parts]
    order = np.random.default_rng(seed).permutation(sum(counts))
    pool = torch.full((sum(counts) * page_size, parts[0][0].kv.shape[1]), torch.nan)
    pages = np.zeros((len(parts), max(counts)), dtype=np.int64)
    taken = 0
    for row, count, (sequence, _, last) in zip(pages, counts, parts, strict=True):
        row[:count] = order[taken : taken + count]
        taken += count
        slots = (row[:count, None] * page_size + np.arange(page_size)).ravel()[:last]
        pool[torch.from_numpy(slots)] = sequence.kv[:last]
    rows = [last - first for _, first, last in parts]
    table = SequenceTable()
    table.set(pages, [0, *accumulate(rows)], [last for _, _, last in parts])
    query = torch.cat([sequence.query[first:last] for sequence, first, last in parts])
    kv = pool.view(len(pool), 2, parts[0][0].kv_heads, -1)
    out = query.new_empty(len(query), query[0].numel())
    kernels.run(Attention.of(table, kv, query, out, page_size, window), len(query))
    return list(out.split(rows))


SHAPES = [(9, 3, 64), (4, 4, 16), (14, 2, 64), (32, 1, 8), (8, 2, 128), (2, 1, 256), (6, 2, 40)]


@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_a_chunk_as_a_decode_and_among_others(
    kernels: NativeKernels, shape: tuple[int, int, int], window: int | None
) -> None:
    sequences = [Sequence(*shape, length, seed) for seed, length in enumerate((131, 40, 7, 96, 1, 64))]
    whole = [
        attend(kernels, [(sequence, 0, len(sequence.kv))], 16, window, seed=1)[0] for sequence in sequences
    ]
    assert all(bool(out.isfinite().all()) for out in whole)
    decodes = [(sequence, len(sequence.kv) - 1, len(sequence.kv)) for sequence in sequences]
    for page_size in (1, 16):
        for out, expected in zip(attend(kernels, decodes, page_size, window, 2), whole, strict=True):
            assert torch.equal(out[-1], expected[-1])
        first = sequences[0]
        cuts = [0, 1, 30, 33, 97, 131]
        for start, stop in pairwise(cuts):
            mixed = [*decodes[1:4], (first, start, stop), *decodes[4:]]
            out = attend(kernels, mixed, page_size, window, 3)[3]
            assert torch.equal(out, whole[0][start:stop])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_softmax_in_float64(kernels: NativeKernels, shape: tuple[int, int, int]) -> None:
    heads, kv_heads, head_dim = shape
    sequence = Sequence(*shape, length=150, seed=9)
    keys, values = sequence.kv.view(-1, 2, kv_heads, head_dim).double().unbind(1)
    shared = torch.arange(heads) // (heads // kv_heads)
    scores = torch.einsum("qhd,khd->hqk", sequence.query.double(), keys[:, shared]) * head_dim**-0.5
    scores.masked_fill_(torch.ones(150, 150).triu(1).bool(), -torch.inf)
    expected = torch.einsum("hqk,khd->qhd", scores.softmax(-1), values[:, shared]).flatten(1)
    out = attend(kernels, [(sequence, 0, 150)], 16, None, seed=4)[0]
    torch.testing.assert_close(out, expected.float(), rtol=2e-5, atol=2e-5)


def test_extreme_scores(kernels: NativeKernels) -> None:
    sequence = Sequence(2, 1, 8, length=70, seed=5)
    sequence.query *= 1e4
    out = attend(kernels, [(sequence, 0, 70)], 16, None, seed=4)[0]
    scores = (sequence.query[-1].double() @ sequence.kv[:, :8].double().T) * 8**-0.5
    expected = scores.softmax(-1) @ sequence.kv[:, 8:].double()
    torch.testing.assert_close(out[-1], expected.flatten().float(), rtol=1e-4, atol=1e-4)
    sequence.kv[:, :8] = 0
    out = attend(kernels, [(sequence, 0, 70)], 16, None, seed=4)[0]
    torch.testing.assert_close(out[-1, :8], sequence.kv[:, 8:].mean(0))


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, dtype, taken",
    [
        (9, 3, 64, torch.float32, True),
        (9, 3, 64, torch.bfloat16, False),
        (4, 4, 20, torch.float32, False),
        (4, 4, 512, torch.float32, False),
        (64, 1, 64, torch.float32, False),
    ],
)
def test_what_it_does_not_take_is_left_to_torch(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, taken: bool
) -> None:
    assert NativeAttention.fit(heads, kv_heads, head_dim, dtype) is taken
