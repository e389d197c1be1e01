"""A run's figures against a second way to work them out."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.load.figures import goals, hit_rates, meets, percentile, row, spread, tpot
from mini_sglang.bench.load.generator import Load
from mini_sglang.errors import InvalidValueError
from tests.bench.load.requests import request

SECONDS = st.floats(0, 1e6, allow_nan=False)


@given(st.lists(SECONDS, min_size=1, max_size=40), st.floats(0, 1))
def test_percentiles_are_numpys(values: list[float], share: float) -> None:
    assert percentile(sorted(values), share) == pytest.approx(np.percentile(values, share * 100), abs=1e-9)


@given(st.lists(SECONDS, min_size=1, max_size=40))
def test_a_percentile_lies_between_the_values_that_so_many_are_below(values: list[float]) -> None:
    found = spread(values)
    assert found is not None
    for share in (50, 90, 99):
        place = (len(values) - 1) * share / 100
        below = sorted(values)[math.floor(place)]
        above = sorted(values)[math.ceil(place)]
        assert below <= found[f"p{share}"] <= above or math.isclose(found[f"p{share}"], above)


def test_nothing_has_no_spread() -> None:
    assert spread([]) is None


def test_the_figures_of_a_run() -> None:
    requests = [
        # Planned at 0, sent half a second late; 3 tokens, of which two come together.
        request(
            0, sent=0.5, times=(1.0, 1.5, 1.5), end=1.75, output_tokens=3, asked_tokens=3, cached_tokens=4
        ),
        request(1, planned=1.0, sent=1.0, times=(2.0,), end=2.0, output_tokens=1, asked_tokens=2),
        request(2, planned=1.0, sent=1.0, times=(1.25,), end=4.0, output_tokens=None, error="reset"),
    ]
    found = row(Load(requests, duration=4.0, unfinished=1))
    assert (found["requests"], found["completed"], found["errors"], found["unfinished"]) == (4, 2, 1, 1)
    assert found["errors_by_kind"] == {"reset": 1}
    assert (found["input_tokens"], found["output_tokens"], found["cached_tokens"]) == (20, 4, 4)
    assert found["request_throughput"] == 0.5
    assert found["output_throughput"] == 1.0
    assert found["total_throughput"] == 6.0
    assert found["short"] == 1
    assert found["ttft"]["mean"] == 0.75 and found["ttft_planned"]["mean"] == 1.0
    assert found["e2e"]["mean"] == 1.125 and found["e2e_planned"]["mean"] == 1.375
    assert found["tpot"]["mean"] == 0.25
    # Every gap, that between tokens which came together too.
    assert found["itl"]["mean"] == 0.25 and found["itl_of"] == "tokens"
    assert found["lag"]["p99"] == pytest.approx(0.49)
    assert found["mean_inflight"] == pytest.approx(2.25 / 4)
    assert found["goodput"] is None


def test_gaps_between_pieces_are_called_so() -> None:
    pieces = [request(times=(1.0, 2.0), output_tokens=4, counted=False)]
    tokens = [request(times=(1.0, 2.0), output_tokens=2, counted=False)]
    assert row(Load(pieces))["itl_of"] == "pieces"
    # One piece for each token: they are the same.
    assert row(Load(tokens))["itl_of"] == "tokens"


def test_a_run_of_nothing_has_figures() -> None:
    found = row(Load(), {"ttft": 1.0})
    assert found["output_throughput"] == 0 and found["ttft"] is None and found["cache"] == []


def test_tpot_is_of_tokens_and_not_of_pieces() -> None:
    assert tpot(request(times=(1.0, 4.0), output_tokens=7, counted=False)) == 0.5
    assert tpot(request(times=(1.0,), output_tokens=1)) is None


def test_goodput_counts_from_when_a_request_was_due() -> None:
    late = request(planned=0.0, sent=0.75, times=(1.0, 2.0), end=2.0)
    assert meets(late, {"ttft": 1.0}) and not meets(late, {"ttft": 0.99})
    assert meets(late, {"tpot": 1.0}) and not meets(late, {"tpot": 0.9})
    assert meets(late, {"e2e": 2.0}) and not meets(late, {"e2e": 1.9})
    assert not meets(request(times=(), output_tokens=3), {"ttft": 100.0})
    requests = [late, request(1, times=(0.5, 0.75), end=0.75), request(2, error="reset")]
    assert row(Load(requests, duration=2.0), {"ttft": 0.75})["goodput"] == 0.5


def test_goals_are_milliseconds() -> None:
    assert goals("ttft:500, tpot:50") == {"ttft": 0.5, "tpot": 0.05}


@pytest.mark.parametrize("text", ["", "ttft", "ttft:x", "ttft:-1", "itl:5", "ttft:inf", "ttft:1,,"])
def test_goals_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(InvalidValueError, match=r"--goodput is .* ttft:500,tpot:50"):
        goals(text)


@given(
    st.lists(st.tuples(st.floats(0, 24), st.integers(0, 50), st.integers(1, 50)), max_size=30),
)
def test_hit_rates_add_up_to_the_whole(answers: list[tuple[float, int, int]]) -> None:
    requests = [
        request(n, end=end, cached_tokens=min(hit, asked), prompt_tokens=asked)
        for n, (end, hit, asked) in enumerate(answers)
    ]
    found = hit_rates(requests, 24.0)
    for window in found:
        inside = [
            r
            for r in requests
            if window["t"] - 1 <= r.end < window["t"] or (window["t"] == 24.0 and r.end == 24.0)
        ]
        hits = sum(r.cached_tokens or 0 for r in inside)
        assert window["hit_rate"] == pytest.approx(hits / sum(r.prompt_tokens or 0 for r in inside))
    assert len(found) == len({min(23, int(r.end)) for r in requests})


def test_no_hit_rate_where_the_server_tells_none() -> None:
    assert hit_rates([request()], 2.0) == []
