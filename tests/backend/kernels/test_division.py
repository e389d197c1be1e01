"""How a step is divided among the threads: all of it, evenly, whole sequences, only where it is worth it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from itertools import accumulate, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.kernels import build
from mini_sglang.backend.kernels.jobs import (
    FORMATS,
    Adapt,
    Attention,
    Entry,
    Job,
    Norm,
    Product,
    SequenceTable,
)
from mini_sglang.backend.kv.pool import KVPool

NONE, BY_ROWS, BY_SEQUENCES = range(3)
Ranges = list[list[int]]
Divide = Callable[..., tuple[int, Ranges]]
Parts = list[tuple[int, int]]
HEADS, DIM, WIDTH = 4, 16, 64
EVERYWHERE = 2**63 - 1


@pytest.fixture(scope="module")
def divide(tmp_path_factory: pytest.TempPathFactory) -> Divide:
    """For sequences of (rows, length): the kind, and of each thread its rows and sequences."""
    path = tmp_path_factory.mktemp("division") / "division.so"
    source = Path(__file__).with_name("division.cpp")
    compiler = build._find_compiler(os.environ)
    build._run([*compiler, *build._FLAGS, "-shared", "-I", str(build.SOURCES), str(source), "-o", str(path)])
    function = ctypes.CDLL(str(path)).divided
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    kv = KVPool(
        num_layers=1,
        num_pages=1,
        page_size=16,
        kv_heads=1,
        head_dim=DIM,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    query, out = torch.zeros(1, HEADS, DIM), torch.zeros(1, HEADS * DIM)

    def divided(
        parts: Parts,
        threads: int,
        layers: int = 2,
        more: list[Job] | None = None,
        products: int = 2,
        rows: int | None = None,
        format: str = "Q4_1",
    ) -> tuple[int, Ranges]:
        table = SequenceTable()
        starts = [0, *accumulate(count for count, _ in parts)]
        table.set(np.zeros((len(parts), 1), np.int64), starts, [length for _, length in parts])
        attention = Attention.of(table, kv, 0, query, out, None)
        product = Product(n=WIDTH, k=WIDTH, format=FORMATS[format])
        layer: list[Job] = [Norm(), *[product] * products, attention]
        jobs = [*layer * layers, *(more or [])]
        entries = (Entry * len(jobs))(*map(Entry.of, jobs))
        ranges = np.zeros((threads, 4), np.int64)
        given = starts[-1] if rows is None else rows
        kind = function(entries, len(jobs), given, threads, ranges.ctypes.data)
        return kind, ranges.tolist()

    return divided


def work(rows: int, length: int) -> float:
    """A multiplication with KV takes as long as 8 with weights in a decode, as 2 elsewhere (measured)."""
    return rows * (2 * WIDTH * WIDTH + 2 * HEADS * DIM * (length - rows // 2) * (8 if rows == 1 else 2))


@st.composite
def sequences(draw: st.DrawFn) -> Parts:
    alike = draw(st.booleans())
    low, high = draw(st.sampled_from([(1, 1), (1, 9), (60, 200)]))
    count = draw(st.integers(1, 40))
    if alike:
        rows = draw(st.integers(low, high))
        return [(rows, rows + draw(st.integers(0, 3)))] * count
    rows_of = draw(st.lists(st.integers(low, high), min_size=count, max_size=count))
    return [(rows, rows + draw(st.integers(0, 200))) for rows in rows_of]


@given(sequences(), st.integers(1, 5))
def test_every_row_is_one_thread_s(divide: Divide, parts: Parts, threads: int) -> None:
    kind, ranges = divide(parts, threads)
    rows = sum(count for count, _ in parts)
    starts = [0, *accumulate(count for count, _ in parts)]
    if threads == 1 or rows < 4 * threads**2:
        assert kind == NONE
    if kind == NONE:
        assert threads == 1 or rows < 128 * threads
        return
    assert ranges[0][0] == 0 and ranges[-1][1] == rows
    assert all(one[1] == other[0] for one, other in pairwise(ranges))
    if kind == BY_ROWS:
        assert rows >= 128 * threads
        assert all(abs((last - first) * threads - rows) <= 4 * threads for first, last, *_ in ranges)
        assert all(range[2:] == [0, EVERYWHERE] for range in ranges)
        return
    assert ranges[0][2] == 0 and ranges[-1][3] == len(parts)
    total = sum(work(*part) for part in parts)
    for first, last, first_sequence, last_sequence in ranges:
        assert (first, last) == (starts[first_sequence], starts[last_sequence]) and first < last
        its = sum(work(*part) for part in parts[first_sequence:last_sequence])
        assert its <= total / threads * (1 + 1 / 24) + threads


@given(st.integers(2, 6), st.integers(1, 12), st.integers(1, 30), st.integers(0, 300))
def test_sequences_that_are_alike_are(
    divide: Divide, threads: int, each: int, rows: int, before: int
) -> None:
    parts = [(rows, rows + before)] * (threads * each)
    kind, ranges = divide(parts, threads)
    if rows * each < 4 * threads:
        assert kind == NONE
        return
    assert kind == BY_SEQUENCES
    assert [range[3] - range[2] for range in ranges] == [each] * threads


@pytest.mark.parametrize(
    ("format", "least"), [("Q4_1", 16), ("Q8_0", 16), ("F16", 28), ("BF16", 28), ("F32", 56)]
)
def test_weights_of_more_bytes_take_more_rows(divide: Divide, format: str, least: int) -> None:
    assert divide([(1, 50)] * least, 2, format=format)[0] == BY_SEQUENCES
    assert divide([(1, 50)] * (least - 2), 2, format=format)[0] == NONE


def test_what_is_not_divided(divide: Divide) -> None:
    even = [(1, 50)] * 32
    assert divide(even, 2)[0] == BY_SEQUENCES
    # Adapters go by the rows that have them.
    assert divide(even, 2, more=[Adapt()])[0] == NONE
    # A product by itself is divided by its columns.
    assert divide(even, 2, layers=1, products=1)[0] == NONE
    # An attention for some of the rows, as after the last layer's.
    assert divide(even, 2, rows=40)[0] == NONE
    assert divide([(1, 4000), *even[:15]], 2)[0] == NONE
    assert divide([(300, 300)], 2)[0] == BY_ROWS
    assert divide([(250, 250)], 2)[0] == NONE
