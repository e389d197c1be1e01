"""The table of benchmarks/levers.py: every setting is a lever that is measured, or none for a reason."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest

from mini_sglang.config import Settings, setting_fields

ROOT = Path(__file__).parents[1]
BENCHMARKS, WORKERS = ROOT / "benchmarks", ROOT / "mini_sglang" / "bench" / "workers"
SECTIONS = ("Model and device", "Caches", "Scheduling", "Decode speed")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (BENCHMARKS, WORKERS):
        monkeypatch.syspath_prepend(str(folder))


def test_every_setting_of_these_sections_is_measured_or_says_why_not() -> None:
    from lever_table import NOT_LEVERS, ROWS

    measured = {name for row in ROWS for name in row.names}
    wanted = {spec.name for spec in setting_fields() if spec.metadata["section"] in SECTIONS}
    assert wanted - measured - set(NOT_LEVERS) == set(), "add a row to benchmarks/lever_table.py"
    assert not set(NOT_LEVERS) & measured and all(NOT_LEVERS.values())
    assert set(NOT_LEVERS) <= wanted


def test_every_row_can_be_run() -> None:
    """Its settings are accepted, its two sides differ, and its workload takes what it is given."""
    from lever_table import FIGURES, ROWS, SECTIONS
    from lever_worker import workload

    for row in ROWS:
        for side in (row.off, row.on):
            given = dict(row.given) | (dict(side) if row.request else {})
            inspect.signature(workload(row.work)).bind(None, turn=1, **given)
            if not row.request:
                Settings.resolve({**row.base, **side}, {})
        assert row.off != row.on and row.says and row.section in SECTIONS
        assert row.figures and set(row.figures) <= set(FIGURES)


def test_a_verdict_needs_every_round() -> None:
    from levers import verdict

    assert verdict([1.2, 1.1, 1.3]) == "pays"
    assert verdict([1.2, 0.99, 1.3]) == verdict([1.04, 1.02, 1.03]) == "no difference shown"
    assert verdict([0.8, 0.9, 0.7]) == "**does not pay here**"


def test_a_failure_is_told_without_the_paths_of_the_machine() -> None:
    from levers import why

    from mini_sglang.bench.process import PeerError

    said = "lever: its process (/usr/bin/python) ended with status 1: a.b.ModelLoadError: /tmp/x/y.gguf ends."
    assert why(PeerError(said)) == "…/y.gguf ends."


def test_the_workloads_give_the_figures_of_their_rows(tmp_path: Path) -> None:
    from lever_table import ROWS
    from lever_worker import Lever

    from tests.tiny_folders import tiny_folder

    small = {
        "burst": {"requests": 3, "prompt": 8, "new": 4, "spread": True},
        "returning": {"prefixes": 2, "length": 40, "question": 3, "new": 2, "order": [0, 1, 0]},
        "long_beside": {"streams": 2, "prompt": 8, "new": 400, "long": 200},
        "urgent": {"waiting": 3, "prompt": 8, "new": 4, "priority": 9},
    }
    settings = {
        "dtype": "fp32", "num_threads": 1, "kv_token_budget": 8192, "prefill_chunk_size": 16,
    }  # fmt: skip
    folder = tiny_folder(tmp_path / "tiny", max_position_embeddings=2048)
    lever = Lever({"model": str(folder), "settings": settings})
    for name, given in small.items():
        figures = getattr(lever, name)(turn=1, **given)
        wanted = {figure for row in ROWS if row.work == name for figure in row.figures}
        assert wanted <= set(figures) and all(value >= 0 for value in figures.values())
    again = lever.returning(turn=2, **small["returning"])
    assert again["cached"] == pytest.approx(32 / 129), "the third request finds the first one's pages"
