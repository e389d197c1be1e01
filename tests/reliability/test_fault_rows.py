"""The rows of faults at a size for CI: the same code as ``python -m benchmarks.reliability faults``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.reliability import badfiles, deaths, endings
from benchmarks.reliability.report import Row
from benchmarks.reliability.server import tiny_folder
from benchmarks.reliability.witness import server_of


def held(row: Row, checks: int) -> None:
    assert len(row.checks) >= checks
    assert not row.failures(timed=False), row.failures(timed=False)


def test_an_engine_that_is_killed_then_one_that_hangs_then_sigterm() -> None:
    """F1, F7 and F5, one after another on the same server."""
    row = Row("F1", "")
    # Long enough that all of them still run when both engines are seen to be full.
    with deaths.stage(row, 24, 1500, drain_timeout=3) as on:
        deaths.kill_one(row, on)
        deaths.hang_one(row, on)
        endings.drained(row, on.server, on.folder, 8)
    held(row, 25)


def test_the_parent_killed_leaves_nothing() -> None:
    row = Row("F5", "")
    with server_of(max_batch_size=8) as (server, folder):
        server.wait_ready()
        endings.orphaned(row, server, folder, 4)
    held(row, 3)


@pytest.fixture(scope="module")
def pristine() -> Iterator[Path]:
    with tiny_folder() as folder:
        yield folder


def test_serve_refuses_weights_of_which_no_token_can_be_made(pristine: Path) -> None:
    """F6, of which the rest is in ``test_bad_files`` and ``backend/loading``."""
    outcome, word = badfiles.folder_case("a weight that is NaN", "serve", pristine)
    assert not outcome.faults(word), outcome


def test_serve_leaves_no_part_of_a_model_on_a_full_disk(pristine: Path) -> None:
    outcome, word, cached = badfiles.full_disk("serve", pristine)
    assert not outcome.faults(word), outcome
    assert not cached
