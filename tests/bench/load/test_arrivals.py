"""Arrivals: Poisson, of the rate asked for, the same for the same seed."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.bench.load.arrivals import planned, poisson
from mini_sglang.errors import InvalidValueError

COUNT = 20_000


@pytest.mark.parametrize("rate", [0.5, 4.0, 100.0])
def test_gaps_are_exponential_of_the_rate(rate: float) -> None:
    times = planned(rate, 1, COUNT + 1, None)
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    # Mean and deviation of an exponential are 1 / rate; of so many the mean is within 5 of its deviations.
    mean = math.fsum(gaps) / COUNT
    assert abs(mean * rate - 1) < 5 / math.sqrt(COUNT)
    deviation = math.sqrt(math.fsum((gap - mean) ** 2 for gap in gaps) / COUNT)
    assert abs(deviation * rate - 1) < 0.06
    # The whole distribution, by Kolmogorov's distance at a level of one in a million.
    distance = max(abs((n + 1) / COUNT - (1 - math.exp(-rate * gap))) for n, gap in enumerate(gaps))
    assert distance < 2.7 / math.sqrt(COUNT)


@given(st.floats(0.1, 1000), st.integers(0, 1 << 40), st.integers(1, 50))
def test_a_seed_gives_the_same_times_again(rate: float, seed: int, count: int) -> None:
    times = planned(rate, seed, count, None)
    assert times == planned(rate, seed, count, None)
    assert times != planned(rate, seed + 1, count, None) or count == 1
    assert times[0] == 0 and times == sorted(times) and len(times) == count


def test_a_longer_run_begins_like_a_shorter_one() -> None:
    assert planned(3.0, 5, 100, None)[:10] == planned(3.0, 5, 10, None)


def test_a_duration_bounds_the_times() -> None:
    times = planned(50.0, 2, None, 4.0)
    assert times == list(itertools.takewhile(lambda at: at < 4.0, poisson(50.0, 2)))
    assert planned(50.0, 2, 7, 4.0) == times[:7]


def test_an_infinite_rate_is_all_at_once_and_must_have_a_number() -> None:
    assert planned(math.inf, 0, 3, None) == [0.0, 0.0, 0.0]
    with pytest.raises(InvalidValueError, match="--request-rate"):
        planned(math.inf, 0, None, 5.0)
