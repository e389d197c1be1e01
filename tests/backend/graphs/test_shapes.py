"""Which steps are recorded."""

from __future__ import annotations

import pytest

from mini_sglang.backend.graphs.shapes import (
    SHORT_PROMPT,
    decode_sizes,
    prompt_sizes,
    shapes,
    split_levels,
)


def test_sizes_of_decodes() -> None:
    assert decode_sizes(1) == [1] and decode_sizes(3) == [1, 2, 3] and decode_sizes(4) == [1, 2, 4]
    assert decode_sizes(40) == [1, 2, 4, 8, 16, 24, 32, 40]
    assert decode_sizes(256)[-9:] == [64, 80, 96, 112, 128, 160, 192, 224, 256]
    assert len(decode_sizes(256)) == 19


@pytest.mark.parametrize("most", [8, 33, 64, 100, 256, 1000])
def test_padding_is_a_quarter_or_seven_rows_at_most(most: int) -> None:
    sizes = decode_sizes(most)
    assert sizes == sorted(set(sizes)) and sizes[-1] == most
    for count in range(1, most + 1):
        padded = min(size for size in sizes if size >= count)
        assert padded - count <= max(7, count // 4)


def test_sizes_of_prompts() -> None:
    assert prompt_sizes(1) == [] and prompt_sizes(9) == [9] and prompt_sizes(20) == [16, 20]
    assert prompt_sizes(512) == [16, 32, 64, 128, 192, 256, 320, 384, 448, 512]
    assert prompt_sizes(2048)[-3:] == [1792, 1920, 2048]


@pytest.mark.parametrize("most", [2, 31, 33, 64, 65, 700])
def test_no_prompt_is_recorded_across_the_border_of_short_ones(most: int) -> None:
    """Beyond it another kernel runs, for all rows of a recording."""
    sizes = prompt_sizes(most)
    assert sizes[-1] == most and all(b > SHORT_PROMPT for b in sizes if b > SHORT_PROMPT)
    assert most <= SHORT_PROMPT or SHORT_PROMPT in sizes


def test_the_border_is_that_of_the_attention() -> None:
    from mini_sglang.backend.attention import triton

    assert SHORT_PROMPT == triton._SHORT


def test_few_sequences_have_few_levels_and_many_have_many() -> None:
    assert split_levels(8, 1) == [1] and split_levels(8, 64) == [1, 64]
    assert split_levels(8 * 64, 64) == [1, 8, 16, 32, 64]
    assert split_levels(8 * 256, 64) == [1, 2, 4, 8, 16, 32, 64]
    for most in (2, 3, 17, 64):
        for programs in (1, 100, 10_000):
            levels = split_levels(programs, most)
            assert levels == sorted(set(levels)) and levels[0] == 1 and levels[-1] == most


def test_shapes_come_from_the_largest_down_and_hold_every_step() -> None:
    found = shapes(64, 512, 40_960, 256, 64, 8)
    assert [shape.rows for shape in found] == sorted((shape.rows for shape in found), reverse=True)
    assert len(found) == len(set(found))
    for rows in range(1, 65):
        for length in (1, 256, 257, 5_000, 40_960):
            assert any(s.decodes and s.rows >= rows and s.positions >= length for s in found)
    assert all(shape.positions <= 40_960 for shape in found)
    assert {s.positions for s in found if not s.decodes and s.rows > SHORT_PROMPT} == {40_960}
    assert not shapes(0, 0, 4096, 256, 64, 8)
