"""The rows of load at a size for CI: the code of ``python -m benchmarks.reliability load``, on one server."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from benchmarks.reliability import endurance, leaving, load, overload, slow_readers, streams
from benchmarks.reliability.report import CI, Row
from benchmarks.reliability.server import Server, serving

ROWS = {
    "L1": streams.measure,
    "L3": overload.measure,
    "L4": endurance.measure,
    "F3": leaving.measure,
    "F4": slow_readers.measure,
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """Small enough to be overloaded, and with enough patience for a busy machine."""
    settings = {
        "max_batch_size": 16, "max_inflight_per_engine": 16, "max_queue": 32, "kv_token_budget": 1 << 14,
        "write_timeout": 2.0, "read_timeout": 3.0,
    }  # fmt: skip
    with serving(probe=True, **settings) as found:
        yield found


def test_every_row_is_here() -> None:
    assert ROWS.keys() == load.ROWS.keys()


@pytest.mark.parametrize("name", ROWS)
def test_row(server: Server, name: str) -> None:
    measure: Callable[..., Row] = ROWS[name]
    row = measure(server, CI)
    assert row.name == name and len(row.checks) > 5
    assert not row.failures(timed=False), row.failures(timed=False)
