"""Cache-aware routing against taking turns, over the real pool with real engines of a tiny model.

At full size: ``benchmarks/routing_bench.py``.
"""

from __future__ import annotations

from typing import Any

import pytest

from benchmarks.routing_bench import Outcome, Workload, compare, problems
from tests.tiny_folders import tiny_folder

PLAIN: dict[str, Any] = {"engine_isolation": "thread", "num_threads": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_folder(tmp_path_factory.mktemp("routing") / "tiny", max_position_embeddings=1024))


def test_cache_aware_routing_hits_more_and_starves_no_engine(model: str) -> None:
    """Eight prefixes do not fit into one engine's pool, four do."""
    load = Workload(groups=8, prefix=128, question=16, new=2, running=3)
    outcomes = compare(model, load, rounds=2, requests=36, **PLAIN)
    assert problems(outcomes, least_share=0.3) == []
    prompt_tokens = 2 * 36 * (128 + 16)
    assert [one.prompt_tokens for one in outcomes.values()] == [prompt_tokens, prompt_tokens]
    assert all(len(one.first_tokens) == 2 * 36 for one in outcomes.values())
    # All but the first of each prefix could find 128 of their 144 tokens: 79 % of all.
    assert 0.6 < outcomes["cache_aware"].hit_rate <= 0.8
    assert outcomes["cache_aware"].hit_rate > 1.2 * outcomes["rr"].hit_rate


def test_one_hot_prefix_keeps_both_engines_busy(model: str) -> None:
    load = Workload(groups=1, prefix=128, question=16, new=6, running=8)
    outcomes = compare(model, load, rounds=1, requests=60, max_batch_size=8, **PLAIN)
    (hot,) = [one for mode, one in outcomes.items() if mode == "cache_aware"]
    assert not hot.failures and min(hot.shares) > 0.2
    assert hot.hit_rate > 0.7


def test_what_must_hold_is_told_where_it_does_not() -> None:
    """The script's exit status is made of these."""
    good = Outcome(100, 50, [0.1], [], [0.5, 0.5])
    assert problems({"rr": Outcome(100, 40, [0.1], [], [0.5, 0.5]), "cache_aware": good}, 0.25) == []
    for wrong in (
        Outcome(100, 40, [0.1], [], [0.5, 0.5]),
        Outcome(100, 60, [0.1], [], [0.9, 0.1]),
        Outcome(100, 60, [0.1], ["it died"], [0.5, 0.5]),
    ):
        assert len(problems({"rr": Outcome(100, 40, [0.1], [], [0.5, 0.5]), "cache_aware": wrong}, 0.25)) == 1
