"""What products fetch for the attention after them: the KV that it reads, against a brute-force twin."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.kernels import build
from mini_sglang.backend.kernels.jobs import Attention, Entry, Job, Product, SequenceTable
from mini_sglang.backend.kv.pool import TILE, KVPool

Ahead = Callable[..., list[list[int]]]
LINE = 64
STEP = 1000


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("ahead") / "ahead.so"
    source = Path(__file__).with_name("kv_ahead.cpp")
    compiler = build._find_compiler(os.environ)
    build._run([*compiler, *build._FLAGS, "-shared", "-I", str(build.SOURCES), str(source), "-o", str(path)])
    return ctypes.CDLL(str(path))


@pytest.fixture(scope="module")
def ahead(driver: ctypes.CDLL) -> Ahead:
    """Of each thread the distances of the lines it fetches, in order, in so many steps or a share of them."""
    function = driver.lines_ahead
    function.restype = ctypes.c_int64
    sizes = [ctypes.c_int64] * 6
    places_of = [ctypes.c_void_p, ctypes.c_void_p]
    function.argtypes = [ctypes.c_void_p, ctypes.c_bool, ctypes.c_void_p, ctypes.c_int, *sizes, *places_of]

    def lines_ahead(
        job: Attention,
        threads: int,
        limit: int,
        steps: int,
        done: float = 1,
        before: Attention | None = None,
        same_step: bool = False,
        sequences: tuple[int, int] = (0, 1000),
    ) -> list[list[int]]:
        lines, counts = np.zeros(1 << 18, np.int64), np.zeros(threads, np.int64)
        places = lines.ctypes.data, counts.ctypes.data
        planned, each = threads * steps * STEP, round(steps * done) * STEP
        other = None if before is None else ctypes.addressof(before)
        sizes = *sequences, limit, planned, each, STEP
        total = function(other, same_step, ctypes.addressof(job), threads, *sizes, *places)
        assert total == counts.sum()
        return [part.tolist() for part in np.split(lines[:total], np.cumsum(counts)[:-1])]

    return lines_ahead


class Step:
    """Sequences of some new rows, on pages in any order, and which bytes of the pool they read."""

    def __init__(
        self,
        parts: list[tuple[int, int]],
        page_size: int,
        window: int | None,
        dtype: torch.dtype,
        tiled: bool,
    ) -> None:
        pages = [-(-length // page_size) for _, length in parts]
        count = sum(pages)
        self.kv = KVPool(
            num_layers=1,
            num_pages=count,
            page_size=page_size,
            kv_heads=1,
            head_dim=16,
            dtype=dtype,
            device=torch.device("cpu"),
            tiled=tiled,
        )
        order = np.random.default_rng(count).permutation(count)
        table = np.zeros((len(parts), max(pages)), np.int64)
        for row, first, number in zip(table, accumulate(pages, initial=0), pages, strict=False):
            row[:number] = order[first : first + number]
        self.table = SequenceTable()
        self.table.set(table, [0, *accumulate(rows for rows, _ in parts)], [length for _, length in parts])
        query = torch.zeros(1, 1, 16)
        self.job = Attention.of(self.table, self.kv, 0, query, torch.zeros(1, 16), window)
        self.row_bytes = self.kv.rows(0)[0].nbytes
        each = TILE if tiled else 1
        # In the order of sequences and positions: the first byte of each row, or tile, that is read.
        self.read: list[int] = []
        for (rows, length), row in zip(parts, table, strict=True):
            low = 0 if window is None else max(0, length - rows + 1 - window)
            # What a chunk itself writes is in the caches.
            for position in range(low // each * each, length if rows == 1 else length - rows, each):
                slot = row[position // page_size] * page_size + position % page_size
                self.read.append(int(slot) * self.row_bytes)
        self.size = each * self.row_bytes


@st.composite
def steps(draw: st.DrawFn) -> Step:
    lengths = draw(st.lists(st.integers(1, 150), min_size=1, max_size=6))
    parts = [(draw(st.integers(1, length)), length) for length in lengths]
    tiled = draw(st.booleans())
    dtypes = [torch.bfloat16, torch.int8] if tiled else [torch.float32, torch.bfloat16, torch.int8]
    page_size = draw(st.sampled_from([16, 32] if tiled else [1, 5, 16]))
    window = draw(st.none() | st.integers(1, 60))
    return Step(parts, page_size, window, draw(st.sampled_from(dtypes)), tiled)


@given(steps(), st.integers(1, 4), st.integers(40, 400))
def test_all_that_attention_reads_is_fetched_once_and_nothing_else(
    ahead: Ahead, step: Step, threads: int, steps_each: int
) -> None:
    found = ahead(step.job, threads, 1 << 30, steps_each)
    lines = [line for part in found for line in part]
    wanted = {byte for first in step.read for byte in range(first, first + step.size)}
    fetched = [byte for line in lines for byte in range(line, line + LINE)]
    assert wanted <= set(fetched)
    assert len(lines) == len(set(lines))
    # Beyond what is read at most the rest of a line for each run.
    assert all(line in wanted for line in lines)


@given(steps(), st.integers(1, 3))
def test_what_is_fetched_first_is_attended_first(ahead: Ahead, step: Step, threads: int) -> None:
    found = ahead(step.job, threads, 1 << 30, 100)
    places = {first + byte: number for number, first in enumerate(step.read) for byte in range(step.size)}
    order = [places[line] for part in found for line in part]
    assert order == sorted(order)


@given(steps(), st.integers(0, 7))
def test_a_part_of_the_sequences_has_its_own(ahead: Ahead, step: Step, cut: int) -> None:
    whole, first, last = (
        ahead(step.job, 1, 1 << 30, 100, sequences=some)[0] for some in ((0, 7), (0, cut), (cut, 7))
    )
    assert first + last == whole


@given(steps(), steps(), st.none() | st.integers(1, 60))
def test_what_was_planned_before_changes_nothing(
    ahead: Ahead, step: Step, other: Step, window: int | None
) -> None:
    query = torch.zeros(1, 1, 16)
    layer = Attention.of(step.table, step.kv, 0, query, torch.zeros(1, 16), window)
    expected = ahead(step.job, 2, 1 << 30, 100)
    assert ahead(step.job, 2, 1 << 30, 100, before=layer, same_step=True) == expected
    assert ahead(step.job, 2, 1 << 30, 100, before=other.job) == expected


@given(steps(), st.integers(1, 3), st.integers(0, 1 << 15))
def test_no_thread_fetches_more_than_its_part_of_the_cache(
    ahead: Ahead, step: Step, threads: int, limit: int
) -> None:
    whole = ahead(step.job, threads, 1 << 30, 100)
    part = ahead(step.job, threads, limit, 100)
    for some, every in zip(part, whole, strict=True):
        assert len(some) * LINE <= limit // threads
        assert some == every[: len(some)]


@pytest.mark.parametrize("threads", [1, 3])
def test_lines_are_spread_evenly_over_the_multiplications(ahead: Ahead, threads: int) -> None:
    step = Step([(1, 960)], 16, None, torch.float32, False)
    whole = [len(part) for part in ahead(step.job, threads, 1 << 30, 100)]
    assert sum(whole) == 960 * 128 // LINE
    for share in (0.1, 0.5, 0.9):
        for done, lines in zip(ahead(step.job, threads, 1 << 30, 100, share), whole, strict=True):
            assert abs(len(done) - share * lines) <= 1


def test_products_fetch_for_the_attention_after_them(driver: ctypes.CDLL) -> None:
    first, second = (Step([(1, 200)], 16, None, torch.float32, False) for _ in range(2))
    small, large = Product(n=32, k=64), Product(n=128, k=64)
    jobs: list[Job] = [small, first.job, small, large, second.job, large]
    entries = (Entry * len(jobs))(*map(Entry.of, jobs))
    function = driver.looked_ahead
    function.restype = ctypes.c_void_p
    sizes = [ctypes.c_int64] * 3
    function.argtypes = [ctypes.c_void_p, *sizes, ctypes.c_void_p]

    def looked_ahead(index: int, rows: int) -> tuple[int | None, int]:
        rate = ctypes.c_int64()
        base = function(entries, len(jobs), index, rows, ctypes.byref(rate))
        return base, rate.value

    base, rate = looked_ahead(0, 8)
    assert base == first.kv.rows(0).data_ptr() and rate > 0
    base, slower = looked_ahead(1, 8)
    # The same KV over five times the multiplications.
    assert base == second.kv.rows(0).data_ptr() and abs(5 * slower - rate) <= 5
    assert looked_ahead(1, 16)[1] == pytest.approx(slower / 2, abs=1)
    # After the last attention nobody waits for KV, and products of few rows wait for memory themselves.
    assert looked_ahead(4, 8) == (None, 0)
    assert looked_ahead(0, 7) == (None, 0)
