"""Prefixes computed in the background: never ahead of a request, a chunk at a time, and counted."""

from __future__ import annotations

import pytest

from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

from .fake_backend import Driver, FakeBackend, make_core, reference

PREFIX = [2 + i % 9 for i in range(40)]
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)


def driver_with(num_pages: int = 64, page_size: int = 4, **settings: object) -> Driver:
    settings.setdefault("prefill_chunk_size", 8)
    return Driver(make_core(FakeBackend(num_pages, page_size), **settings))


def backend_of(driver: Driver) -> FakeBackend:
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.mark.parametrize("chunked", [False, True])
def test_an_idle_engine_computes_its_prefixes_in_chunks(chunked: bool) -> None:
    driver = driver_with(chunked_prefill=chunked)
    told: list[str] = []
    driver.core.on_start = told.extend
    assert driver.core.insert_prefix(PREFIX) == 40
    assert driver.core.insert_prefix([30] * 6) == 6
    rows = []
    while driver.core.has_work:
        driver.step()
        rows += backend_of(driver).rows
    assert rows == [(0, 8), (8, 8), (16, 8), (24, 8), (32, 8), (0, 6)]
    stats = driver.core.stats()
    assert [stats[name] for name in ("warm_prefixes", "warm_prefixes_done", "warm_prefixes_failed")] == [
        2,
        2,
        0,
    ]
    # They are nobody's requests.
    assert (stats["requests"], stats["finished"], stats["prefix_misses"], told) == (0, 0, 0, [])
    answer = driver.run([*PREFIX, 30], GREEDY)
    assert answer.token_ids == reference([*PREFIX, 30], GREEDY).token_ids
    assert answer.cached_tokens == 40


def test_a_request_goes_first_and_waits_for_one_chunk_at_most() -> None:
    driver = driver_with()
    driver.core.insert_prefix(PREFIX)
    driver.step()
    assert backend_of(driver).rows == [(0, 8)]
    name = driver.add([30, 31], GREEDY)
    for _ in GREEDY.max_new_tokens * [None]:
        driver.step()
        assert len(backend_of(driver).rows) == 1
    assert driver.answers[name].token_ids == reference([30, 31], GREEDY).token_ids
    assert driver.core.stats()["warm_prefixes_done"] == 0
    driver.drain()
    assert driver.core.stats()["warm_prefixes_done"] == 1


def test_a_step_that_fails_gives_one_prefix_up() -> None:
    driver = driver_with()
    backend_of(driver).fail_at = {1}
    driver.core.insert_prefix(PREFIX)
    driver.core.insert_prefix([30] * 6)
    driver.drain()
    stats = driver.core.stats()
    assert [stats[name] for name in ("warm_prefixes", "warm_prefixes_done", "warm_prefixes_failed")] == [
        2,
        1,
        1,
    ]
    assert driver.run([*[30] * 6, 31], GREEDY).cached_tokens == 4


def test_a_prefix_the_cache_does_not_keep_is_counted_as_failed() -> None:
    driver = driver_with(prefix_cache_token_budget=16)
    driver.core.insert_prefix(PREFIX)
    driver.drain()
    stats = driver.core.stats()
    assert (stats["warm_prefixes_done"], stats["warm_prefixes_failed"]) == (0, 1)


@pytest.mark.parametrize(
    ("settings", "prefix", "sentence"),
    [
        ({"prefix_cache": False}, PREFIX, "PREFIX_CACHE is 0"),
        ({}, [5] * 3, "prefix is '3 tokens'; it must be at least 4 tokens, a page"),
        ({"prefix_cache_max_tokens": 39}, PREFIX, "at most 39 tokens"),
        ({}, [], "at least one token long"),
        ({}, [2] * 200, "at most the context, 128 tokens"),
        ({}, [40] * 4, "made of token ids from 0 to 39"),
    ],
)
def test_what_cannot_be_inserted_is_refused(
    settings: dict[str, object], prefix: list[int], sentence: str
) -> None:
    driver = driver_with(**settings)
    with pytest.raises(InvalidValueError, match=sentence):
        driver.core.insert_prefix(prefix)
    assert not driver.core.has_work
