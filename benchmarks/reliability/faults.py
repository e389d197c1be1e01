"""The rows of faults: engines that die, hang or fail, servers that are told to end, files that lie."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks.reliability import badfiles, deaths, endings, steps
from benchmarks.reliability.report import RowRun

ROWS: Mapping[str, RowRun] = {
    "F1": deaths.killed,
    "F2": steps.failing,
    "F5": endings.ended,
    "F6": badfiles.lying,
    "F7": deaths.hung,
}
