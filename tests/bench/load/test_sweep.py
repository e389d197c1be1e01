"""When a server counts as full."""

from __future__ import annotations

from typing import Any

import pytest

from mini_sglang.bench.load.arrivals import planned
from mini_sglang.bench.load.figures import row
from mini_sglang.bench.load.generator import Load
from mini_sglang.bench.load.sweep_cli import followed, saturated
from mini_sglang.errors import InvalidValueError
from tests.bench.load.requests import request
from tests.bench.load.test_generator import EACH, FIRST, Server, open_loop, single

ALONE = FIRST + 2 * EACH


def told(load: Load, max_ttft: float | None = None) -> str | None:
    found: dict[str, Any] = {**row(load), "followed": followed(load, ALONE)}
    return saturated(found, max_ttft)


@pytest.mark.parametrize(("places", "full"), [(1, True), (2, True), (4, False), (8, False)])
def test_a_server_of_known_capacity_is_full_below_it(places: int, full: bool) -> None:
    # 0.75 s each, four a second: 3 are in flight on average where there is no queue.
    times = planned(4.0, 3, 200, None)
    assert (told(open_loop(Server(places), times, single(200))) is not None) is full


def test_a_server_without_a_queue_follows_exactly() -> None:
    load = open_loop(Server(), planned(20.0, 1, 50, None), single(50))
    assert followed(load, ALONE) == pytest.approx(1.0)


def test_failed_answers_do_not_count_as_following() -> None:
    good = [request(n, planned=float(n), end=n + 2.0) for n in range(8)]
    bad = [request(n, planned=float(n), end=float(n), error="status 429", output_tokens=None) for n in (8, 9)]
    load = Load([*good, *bad], duration=11.0)
    assert followed(load, 2.0) == pytest.approx(0.8)
    why = saturated({**row(load), "followed": followed(load, 2.0)}, None)
    assert why is not None and "80% of what was offered" in why and "2 of 10 failed" in why


def test_a_late_first_token_is_a_reason_of_its_own() -> None:
    load = open_loop(Server(), [0.0, 4.0], single(2))
    assert told(load) is None
    assert told(load, 600.0) is None
    assert told(load, 400.0) == "its p99 time to first token is 500 ms, over 400"


def test_one_late_first_token_in_fifty_is_too_many() -> None:
    late = {7, 40}
    load = Load(
        [request(n, planned=float(n), times=(n + (0.9 if n in late else 0.1), n + 1.0)) for n in range(100)],
        duration=101.0,
    )
    found = {**row(load), "followed": 1.0}
    why = saturated(found, 500.0)
    assert why is not None and why.startswith("its p99 time to first token is 9")
    assert saturated(found, 1000.0) is None


def test_answers_that_end_early_are_no_lag_of_the_server() -> None:
    load = Load(
        [request(n, planned=float(n), end=n + 2.0, asked_tokens=500) for n in range(9)], duration=10.0
    )
    assert followed(load, 2.0) == pytest.approx(1.0)


def test_nothing_follows_nothing() -> None:
    assert followed(Load(), 1.0) is None


def test_rates_that_do_not_rise_are_refused() -> None:
    from mini_sglang.bench.load.sweep_cli import main

    for words, name in (
        (["--rates", "2,1"], "--rates"),
        (["--rates", "1,inf"], "--rates"),
        (["--rates", "0"], "--rates"),
        (["--factor", "1"], "--factor"),
        (["--max-ttft", "0"], "--max-ttft"),
        (["--seconds", "nan"], "--seconds"),
    ):
        with pytest.raises(InvalidValueError, match=name):
            main(["--url", "http://127.0.0.1:1", *words])
