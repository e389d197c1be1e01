"""Room in huge pages: aligned, one's own, and as large as asked for."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.huge_pages import Arena, advise_huge_pages, empty_in_huge_pages


@given(st.lists(st.one_of(st.integers(0, 300), st.just(20 << 20), st.just(40 << 20)), max_size=12))
def test_every_piece_is_aligned_and_nobody_elses(sizes: list[int]) -> None:
    arena = Arena()
    pieces = [arena.empty(size) for size in sizes]
    assert [len(piece) for piece in pieces] == sizes
    taken = sorted((piece.data_ptr(), piece.data_ptr() + len(piece)) for piece in pieces if len(piece))
    assert all(start % 64 == 0 for start, _ in taken)
    assert all(end <= start for (_, end), (start, _) in pairwise(taken))


def test_a_piece_outlives_its_arena() -> None:
    arena = Arena()
    piece = arena.empty(1000).fill_(7)
    del arena
    assert int(piece.sum()) == 7000


@pytest.mark.parametrize("count", [0, 100, 5 << 20])
def test_advice_changes_no_number(count: int) -> None:
    tensor = torch.arange(count, dtype=torch.int32).to(torch.uint8)
    before = tensor.clone()
    advise_huge_pages(tensor)
    assert torch.equal(tensor, before)


@pytest.mark.parametrize("shape", [(3, 5, 7), (1, 1), (2, 1 << 20, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_begins_where_a_huge_page_does(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    tensor, other = (empty_in_huge_pages(shape, dtype) for _ in range(2))
    assert tensor.data_ptr() % (2 << 20) == 0
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    tensor.fill_(3)
    other.fill_(4)
    assert bool((tensor == 3).all()) and bool((other == 4).all())
