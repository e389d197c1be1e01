"""Which answers count, and the arithmetic of a row, exactly, with times that are given."""

from __future__ import annotations

from typing import Any

import pytest

from mini_sglang.bench.runs import Run, leading, read_reply, row, set_ratios
from mini_sglang.bench.sides import Side

SIDE = Side("fake", "Fake", "bf16", notes=("a caveat",))


def run(number: int, turn: int, seconds: float, **fields: Any) -> Run:
    given: dict[str, Any] = {"ids": [5, 6, 7, 8], "first": 0.25, "times": None, "wall": seconds, **fields}
    return Run("fake", "bf16", number, turn, prompt_tokens=9, seconds=seconds, **given)


def test_rate_is_all_ids_over_all_seconds_and_the_median_over_rounds() -> None:
    runs = [run(1, 1, 1.0), run(1, 2, 3.0), run(2, 1, 0.5), run(2, 2, 0.5), run(3, 1, 1.0), run(3, 2, 1.0)]
    made = row(SIDE, runs, None, start_seconds=2.5)
    assert made["valid"] and made["reason"] is None
    assert (made["tokens"], made["seconds"], made["tokens_per_s"]) == (8, 2.0, 4.0)
    assert made["spread"] == [2.0, 8.0]
    assert made["start_seconds"] == 2.5 and made["notes"] == ["a caveat"]


def test_first_id_and_gaps_come_from_the_ids_times() -> None:
    uneven = run(1, 1, 2.0, first=0.5, times=[0.5, 0.5, 0.75, 1.25])
    even = run(1, 2, 2.0, first=1.0, times=[1.0, 1.25, 1.5, 1.75])
    made = row(SIDE, [uneven, even], None)
    assert (made["ttft"], made["itl"]) == (0.75, 0.25)
    # Without times the last id came at the end.
    assert run(1, 1, 1.75, first=0.25).itl == 0.5


def test_figures_that_an_engine_does_not_show_are_none() -> None:
    made = row(SIDE, [run(1, 1, 1.0, first=None), run(2, 1, 1.0)], None)
    assert made["valid"] and made["ttft"] is None and made["itl"] is None
    assert made["agree"] is None and made["same_until"] is None


def test_agree_and_same_until_count_ids() -> None:
    runs = [
        run(1, 1, 1.0, choices=[5, 6, 7, 8]),
        run(1, 2, 1.0, choices=[5, 0, 7, 0]),
        run(2, 1, 1.0, choices=[0, 0, 0, 0]),
        run(2, 2, 1.0, choices=[5, 6, 7, 0]),
    ]
    made = row(SIDE, runs, None, answers=[[5, 6, 0, 8], [5, 6, 7, 8]])
    assert made["agree"] == 9 / 16
    assert made["same_until"] == 2 + 4
    runs[-1].choices = None
    assert row(SIDE, runs, None)["agree"] is None
    assert (leading([], [1]), leading([1, 2], [1, 2, 3]), leading([2], [1])) == (0, 2, 0)


def test_ratio_is_above_one_where_ours_is_faster_and_only_within_a_group() -> None:
    ours = row(Side("ours", "mini-sglang", "bf16"), [run(1, 1, 1.0)], None)
    slow = row(SIDE, [run(1, 1, 4.0)], None)
    fast = row(SIDE, [run(1, 1, 0.5)], None)
    elsewhere = row(Side("fake", "Fake", "gguf Q4_1"), [run(1, 1, 1.0)], None)
    broken = row(SIDE, [run(1, 1, 1.0)], "it died")
    set_ratios([ours, slow, fast, elsewhere, broken], "ours")
    assert [one["ratio"] for one in (ours, slow, fast, elsewhere, broken)] == [None, 4.0, 0.5, None, None]


def test_a_row_that_does_not_count_has_a_reason_and_no_figures() -> None:
    for made in (
        row(SIDE, [run(1, 1, 1.0)], "it died"),
        row(SIDE, [run(1, 1, 1.0), run(1, 2, 1.0, reason="it gave 3 ids where 4 were asked for")], None),
        row(SIDE, [], None),
    ):
        assert not made["valid"] and made["reason"]
        names = ("tokens", "seconds", "tokens_per_s", "ttft", "itl", "ratio", "agree", "same_until")
        assert all(made[name] is None for name in names)
    # Nor has a group whose ours does not count.
    ours, peer = row(Side("ours", "", "bf16"), [], "failed"), row(SIDE, [run(1, 1, 1.0)], None)
    set_ratios([ours, peer], "ours")
    assert peer["ratio"] is None


def test_a_machine_that_was_not_quiet_is_said_so() -> None:
    quiet = row(SIDE, [run(1, 1, 1.0, others=0.1), run(2, 1, 3.0, others=0.1)], None)
    assert not any("NOT QUIET" in note for note in quiet["notes"])
    busy = row(SIDE, [run(1, 1, 1.0, others=1.5), run(2, 1, 3.0, others=0.1)], None)
    assert busy["others"] == pytest.approx(0.45)
    assert any("NOT QUIET" in note and "0.45" in note and "1.50" in note for note in busy["notes"])


GOOD = {"ids": [[1, 2, 3]], "seconds": 1.0, "first": None, "times": [[0.25, 0.5, 1.0]]}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"ids": [[1, 2]]}, "2 ids where 3"),
        ({"ids": [[1, 2, 3, 4]]}, "4 ids where 3"),
        ({"ids": [[]]}, "0 ids where 3"),
        ({"ids": []}, "no ids"),
        ({"ids": [[1, 2, 3], [4, 5, 6]]}, "no ids"),
        ({"ids": [[1, "2", 3]]}, "no ids"),
        ({"ids": "123"}, "no ids"),
        ({"seconds": None}, "no time"),
        ({"seconds": float("nan")}, "no time"),
        ({"seconds": -1.0}, "no time"),
        ({"seconds": 2.5}, "2.500 s, where 2.000 s passed"),
        ({"seconds": 0.75}, "do not fit"),
        ({"times": [[0.25, 0.5]]}, "do not fit"),
        ({"times": [[0.5, 0.25, 1.0]]}, "do not fit"),
        ({"times": [[0.25, 0.5, None]]}, "no times"),
        ({"times": []}, "no times"),
        ({"times": None, "first": 1.5}, "first id's time"),
        ({"times": None, "first": "soon"}, "first id's time"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_for_does_not_count(change: dict[str, Any], reason: str) -> None:
    fields, why = read_reply({**GOOD, **change}, new=3, wall=2.0)
    assert why is not None and reason in why
    assert set(fields) == {"ids", "seconds", "first", "times"}


def test_an_answer_that_counts_is_taken_as_it_is() -> None:
    assert read_reply(GOOD, 3, 2.0) == (
        {"ids": [1, 2, 3], "seconds": 1.0, "first": 0.25, "times": [0.25, 0.5, 1.0]},
        None,
    )
    shown_at_the_end = {**GOOD, "times": None, "first": None}
    fields, why = read_reply(shown_at_the_end, 3, 2.0)
    assert why is None and fields["first"] is None and fields["times"] is None


def test_json_has_a_list_for_each_prompt() -> None:
    made = run(2, 1, 1.0, times=[0.25, 0.5, 0.75, 1.0]).as_json()
    assert made["ids"] == [[5, 6, 7, 8]] and made["times"] == [[0.25, 0.5, 0.75, 1.0]]
    assert made["prompt_tokens"] == [9] and made["valid"] is True and made["round"] == 2
    assert run(1, 1, 1.0, reason="no").as_json()["valid"] is False
