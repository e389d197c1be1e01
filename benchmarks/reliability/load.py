"""The rows of load: what many clients, too many clients and bad readers do to a server."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.reliability import endurance, leaving, overload, slow_readers, streams
from benchmarks.reliability.report import RowRun

ROWS: Mapping[str, RowRun] = {
    "L1": streams.run,
    "L3": overload.run,
    "L4": endurance.run,
    "F3": leaving.run,
    "F4": slow_readers.run,
}
