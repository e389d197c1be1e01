"""The compiled attention against a softmax in float64, and its promise: the same bits in any company."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.kernels.library import NativeKernels
from tests.backend.kernels.sequences import KV_DTYPES, Part, Sequence, attend
from tests.backend.kernels.twins import VARIANTS
from tests.backend.test_attention import DECODES, FORMS, SCENES, Scene

DTYPES = pytest.mark.parametrize("dtype", KV_DTYPES, ids=str)
SHAPES = [(9, 3, 64), (4, 4, 16), (14, 2, 64), (32, 1, 16), (8, 2, 128), (2, 1, 256), (6, 2, 48)]
# Below, at and beyond one span of 512 positions, and several.
LONG = (511, 512, 513, 1100, 2050)


@pytest.mark.parametrize("window", [None, 1, 7, 32, 100])
@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("sequences", SCENES.values(), ids=SCENES)
def test_equals_the_twin(
    kernels: NativeKernels, sequences: list[tuple[int, int]], page_size: int, window: int | None
) -> None:
    for shuffle in (False, True):
        Scene(sequences, page_size, shuffle).check(window, NativeAttention(kernels))


def test_a_scale_of_its_own(kernels: NativeKernels) -> None:
    Scene(SCENES["mixed"], 4, True).check(7, NativeAttention(kernels), FORMS["scale"])


def test_a_sequence_of_nan_leaves_its_neighbours_alone(kernels: NativeKernels) -> None:
    scene = Scene(DECODES, 16, True)
    scene.rows[1].fill_(torch.nan)
    scene.queries[1].fill_(torch.nan)
    out = scene.attend(None, NativeAttention(kernels))
    assert [bool(part.isnan().any()) for part in out] == [False, True, False, False, False]


def rounds(kernels: NativeKernels, sequence: Sequence) -> str:
    """To what queries and weights are rounded; see ``Sequence.attended``."""
    if sequence.dtype not in kernels.tiled_dtypes:
        return ""
    return "whole" if sequence.dtype == torch.int8 else "bfloat16"


def check(
    kernels: NativeKernels, out: Tensor, sequence: Sequence, rows: list[int], window: int | None
) -> None:
    expected, slack = sequence.attended(rows, window, rounds(kernels, sequence))
    assert ((out - expected).abs() <= slack).all()


@DTYPES
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_softmax_of_the_stored_numbers(
    kernels: NativeKernels, shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    sequence = Sequence(shape, 150, 9, dtype)
    for window in (None, 40):
        out = attend(kernels, [(sequence, 0, 150)], 16, window, seed=4)[0]
        check(kernels, out, sequence, list(range(150)), window)


@DTYPES
@pytest.mark.parametrize("window", [None, 50, 600, 1000])
def test_equals_a_softmax_over_several_spans(
    kernels: NativeKernels, window: int | None, dtype: torch.dtype
) -> None:
    shape = (4, 2, 16)
    sequences = [Sequence(shape, length, length, dtype) for length in LONG]
    chunks: list[Part] = [(s, len(s.query) - 40, len(s.query)) for s in sequences]
    for sequence, out in zip(sequences, attend(kernels, chunks, 16, window, 5), strict=True):
        length = len(sequence.query)
        check(kernels, out, sequence, list(range(length - 40, length)), window)
    # One decode has its spans shared out; many read all heads of a span together.
    for many in (sequences[-1:], sequences):
        decodes: list[Part] = [(s, len(s.query) - 1, len(s.query)) for s in many]
        for sequence, out in zip(many, attend(kernels, decodes, 16, window, 6), strict=True):
            check(kernels, out, sequence, [len(sequence.query) - 1], window)


@DTYPES
@pytest.mark.parametrize("window", [None, 50])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_has_the_same_bits_in_a_chunk_as_a_decode_and_among_others(
    kernels: NativeKernels, shape: tuple[int, int, int], window: int | None, dtype: torch.dtype
) -> None:
    sequences = [Sequence(shape, length, i, dtype) for i, length in enumerate((131, 40, 7, 96, 1, 64))]
    whole = [attend(kernels, [(s, 0, len(s.query))], 16, window, seed=1)[0] for s in sequences]
    assert all(bool(out.isfinite().all()) for out in whole)
    decodes: list[Part] = [(s, len(s.query) - 1, len(s.query)) for s in sequences]
    for page_size in (1, 16, 48):
        for out, expected in zip(attend(kernels, decodes, page_size, window, 2), whole, strict=True):
            assert torch.equal(out[-1], expected[-1])
        for start, stop in pairwise([0, 1, 30, 33, 97, 131]):
            mixed: list[Part] = [*decodes[1:4], (sequences[0], start, stop), *decodes[4:]]
            assert torch.equal(attend(kernels, mixed, page_size, window, 3)[3], whole[0][start:stop])


@DTYPES
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("window", [None, 50, 511, 512, 513, 1000, 1600])
def test_a_row_of_several_spans_has_the_same_bits_however_it_is_computed(
    library: Path, variant: str, window: int | None, dtype: torch.dtype
) -> None:
    shape = (6, 2, 16)
    sequences = [Sequence(shape, length, length, dtype) for length in LONG]
    decodes: list[Part] = [(s, len(s.query) - 1, len(s.query)) for s in sequences]
    results: list[list[Tensor]] = []
    for threads in (1, 2, 3):
        kernels = NativeKernels(library, threads, variant)
        results.append([attend(kernels, [decode], 16, window, 7)[0] for decode in decodes])
        results.append(attend(kernels, decodes, 16, window, 8))
        # Rows before and after it, and neighbours of other lengths.
        rows = (1, 2, 7, 40, 64)
        chunks: list[Part] = [
            (s, len(s.query) - count, len(s.query)) for s, count in zip(sequences, rows, strict=True)
        ]
        results.append([out[-1:] for out in attend(kernels, chunks, 1, window, 9)])
        mixed = [chunks[3], decodes[4], decodes[0], chunks[1], decodes[2]]
        outs = attend(kernels, mixed, 16, window, 10)
        results.append([outs[place][-1:] for place in (2, 3, 4, 0, 1)])
    for result in results:
        for out, expected in zip(result, results[0], strict=True):
            assert bool(out.isfinite().all()) and torch.equal(out, expected)


@pytest.mark.parametrize("page_size", [1, 16])
def test_every_row_of_a_long_chunk_is_the_decode_at_its_place(kernels: NativeKernels, page_size: int) -> None:
    sequence = Sequence((2, 1, 16), 1100, 3, torch.float16)
    for window in (None, 530):
        (whole,) = attend(kernels, [(sequence, 0, 1100)], page_size, window, 1)
        for rows in (range(505, 550), range(1020, 1030)):
            decodes: list[Part] = [(sequence, row, row + 1) for row in rows]
            out = torch.cat(attend(kernels, decodes, page_size, window, 2))
            assert torch.equal(out, whole[rows.start : rows.stop])
            for row in (rows[0], rows[-1]):
                (one,) = attend(kernels, [(sequence, row, row + 1)], page_size, window, 3)
                assert torch.equal(one[0], whole[row])


@DTYPES
def test_a_long_sequence_of_nan_leaves_its_neighbours_alone(
    kernels: NativeKernels, dtype: torch.dtype
) -> None:
    sequences = [Sequence((4, 2, 16), length, length, dtype) for length in (1100, 40, 2050)]
    decodes: list[Part] = [(s, len(s.query) - 1, len(s.query)) for s in sequences]
    clean = attend(kernels, decodes, 16, None, 1)
    for place in (0, 700, 1099):
        broken = Sequence((4, 2, 16), 1100, 1100, dtype)
        kv = torch.randn(1100, 2, 2, 16)
        kv[place] = torch.nan
        broken.keep(kv)
        outs = attend(kernels, [(broken, 1099, 1100), *decodes[1:]], 16, None, 1)
        assert outs[0].isnan().all()
        for out, expected in zip(outs[1:], clean[1:], strict=True):
            assert torch.equal(out, expected)
        # Positions outside of the window, and those to come, are not read.
        for parts in ([(broken, 1099, 1100)], [(broken, 1090, 1100)]):
            (out,) = attend(kernels, parts, 16, 300, 1)
            assert bool(out.isnan().any()) == (place == 1099)
        (out,) = attend(kernels, [(broken, 650, 660)], 16, 600, 1)
        assert bool(out.isfinite().all())


@DTYPES
def test_extreme_scores(kernels: NativeKernels, dtype: torch.dtype) -> None:
    for length in (70, 1100):
        sequence = Sequence((2, 1, 16), length, 5, dtype)
        sequence.query *= 1e4
        (out,) = attend(kernels, [(sequence, length - 3, length)], 16, None, seed=4)
        rounded = rounds(kernels, sequence)
        expected, slack = sequence.attended(list(range(length - 3, length)), None, rounded)
        assert ((out - expected).abs() <= slack + 1e-3 * (1 + expected.abs())).all()
        kv = sequence.exact.float()
        kv[:, 0] = 0
        sequence.keep(kv)
        for first in (length - 3, length - 1):
            (out,) = attend(kernels, [(sequence, first, length)], 16, None, seed=4)
            check(kernels, out[-1:], sequence, [length - 1], None)


@pytest.mark.parametrize(
    "heads, kv_heads, head_dim, dtype, taken",
    [
        (9, 3, 64, torch.float32, True),
        (9, 3, 64, torch.bfloat16, False),
        (4, 4, 8, torch.float32, False),
        (4, 4, 24, torch.float32, False),
        (4, 4, 256, torch.float32, True),
        (4, 4, 512, torch.float32, False),
        (32, 1, 64, torch.float32, True),
        (64, 1, 64, torch.float32, False),
    ],
)
def test_what_it_does_not_take_is_left_to_torch(
    heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, taken: bool
) -> None:
    assert NativeAttention.fit(heads, kv_heads, head_dim, dtype) is taken
