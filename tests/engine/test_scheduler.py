"""Scheduling: chunks, retraction, waiting for a prefill, and who runs when."""

from __future__ import annotations

import pytest

from mini_sglang.engine.request import Request
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import Answer, Driver, FakeBackend, make_core, reference, turns

GREEDY = SamplingParams(max_new_tokens=20, ignore_eos=True)
PROMPT = [2 + i % 9 for i in range(40)]


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [15, 16, 17, 32, 33])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_prompt_cached_to_its_last_token_still_computes_one(
    page_size: int, length: int, chunked: bool
) -> None:
    backend = FakeBackend(64 // page_size * 4, page_size)
    driver = Driver(make_core(backend, chunked_prefill=chunked, prefill_chunk_size=8, prefill_cache_size=0))
    prompt = PROMPT[:length]
    first = driver.run(prompt, GREEDY)
    computed = backend.tokens_run
    second = driver.run(prompt, GREEDY)
    assert second.token_ids == first.token_ids == reference(prompt, GREEDY).token_ids
    cached = (length - 1) // page_size * page_size
    assert (first.cached_tokens, second.cached_tokens) == (0, cached)
    assert backend.tokens_run - computed == length - cached + 19


@pytest.mark.parametrize("page_size", [1, 4])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_request_on_a_cached_prefix_is_retracted_and_resumes(page_size: int, chunked: bool) -> None:
    backend = FakeBackend(72 // page_size, page_size)
    core = make_core(backend, chunked_prefill=chunked, prefill_chunk_size=5, max_context_margin=0)
    driver = Driver(core)
    driver.run(PROMPT[:24], GREEDY)
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, temperature=1.0, seed=7)
    names = [driver.add([*PROMPT[:24], tail], params) for tail in (30, 31, 32)]
    driver.drain()
    assert core.stats()["retractions"] > 0
    for name, tail in zip(names, (30, 31, 32), strict=True):
        answer = driver.answers[name]
        assert answer.token_ids == reference([*PROMPT[:24], tail], params, seed=7).token_ids
        assert answer.cached_tokens == 24
    # The first to arrive never has to go back.
    assert core.stats()["kv_tokens_private"] == 0


def retract(page_size: int = 1) -> tuple[Driver, Request, Request]:
    """Two running requests of which the second has just been retracted, and one that waits."""
    driver = Driver(make_core(FakeBackend(40 // page_size, page_size), max_batch_size=2))
    names = [driver.add(PROMPT[start : start + 10], GREEDY) for start in range(3)]
    _, second, third = (driver.core._requests[name] for name in names)
    for _ in turns():
        if driver.core.scheduler.num_retractions:
            break
        driver.step()
    return driver, second, third


def test_a_retracted_request_is_the_next_to_run() -> None:
    driver, second, third = retract()
    assert list(driver.core.scheduler.waiting) == [second, third]
    driver.drain()


def test_a_retracted_request_leaves_its_kv_for_its_return() -> None:
    driver, second, _ = retract()
    # The oldest has taken one page of it.
    assert driver.core.cache.cached_prefix(second) >= len(second.tokens) - 2
    driver.drain()


def test_prompt_logprobs_start_over_when_the_prefill_is_retracted() -> None:
    backend = FakeBackend(64, 1)
    core = make_core(backend, chunked_prefill=True, prefill_chunk_size=3)
    driver = Driver(core)
    for start in range(4):
        driver.add(PROMPT[start : start + 4], GREEDY)
    driver.step(8)
    params = SamplingParams(max_new_tokens=3, prompt_logprobs=True, ignore_eos=True)
    name = driver.add(PROMPT[9:29], params)
    request = core._requests[name]
    computed = 0
    for _ in turns():
        if core.scheduler.num_retractions:
            break
        computed = request.num_computed
        driver.step()
    assert computed > 0 and request.num_computed == 0, "make the pool smaller"
    driver.drain()
    assert driver.answers[name] == reference(PROMPT[9:29], params)


def test_running_requests_stand_in_order_of_arrival() -> None:
    """Requests may be queued in another order than they were made, by different threads."""
    core = make_core(FakeBackend())
    early, late = (core.make_request(name, PROMPT[:6], GREEDY) for name in ("early", "late"))
    for request in (late, early):
        core.add(request)
        core.step()
    assert core.scheduler.running == [early, late]


@pytest.mark.parametrize("length", [1, 7, 8, 9, 15, 16, 17])
@pytest.mark.parametrize("chunk", [1, 3, 8])
def test_the_last_chunk_is_as_long_as_what_is_left(length: int, chunk: int) -> None:
    backend = FakeBackend(32, 4)
    core = make_core(backend, chunked_prefill=True, prefill_chunk_size=chunk)
    driver = Driver(core)
    driver.add(PROMPT[:length], SamplingParams(max_new_tokens=2, ignore_eos=True))
    chunks = []
    for _ in turns():
        if core.counters.decode_tokens:
            break
        driver.step()
        chunks.append(backend.rows[0])
    whole, rest = divmod(length, chunk)
    expected = [(i * chunk, chunk) for i in range(whole)] + ([(whole * chunk, rest)] if rest else [])
    assert chunks == [*expected, (length, 1)]


def test_one_chunk_per_step_is_shared_by_all_prompts() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend, chunked_prefill=True, prefill_chunk_size=8))
    driver.add(PROMPT[:12], GREEDY)
    driver.add(PROMPT[20:], GREEDY)
    rows = []
    for _ in range(4):
        driver.step()
        rows.append([row for row in backend.rows if row[1] > 1])
    assert rows == [[(0, 8)], [(8, 4), (0, 4)], [(4, 8)], [(12, 8)]]


def test_decodes_go_on_between_the_chunks_of_a_long_prompt() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend, chunked_prefill=True, prefill_chunk_size=8))
    driver.add([2, 3], GREEDY)
    driver.step()
    driver.add(PROMPT, GREEDY)
    for turn in range(5):
        driver.step()
        assert backend.rows == [(2 + turn, 1), (8 * turn, 8)]


@pytest.mark.parametrize("page_size", [1, 4, 32])
def test_equal_prompts_at_once_share_one_prefill(page_size: int) -> None:
    for size in (0, 8):
        check_equal_prompts_at_once(page_size, size)


def check_equal_prompts_at_once(page_size: int, prompts: int) -> None:
    backend = FakeBackend(640 // page_size, page_size, context_length=200)
    driver = Driver(make_core(backend, prefill_cache_size=prompts))
    prompt = [2 + i % 11 for i in range(100)]
    names = [driver.add(prompt, GREEDY) for _ in range(6)]
    driver.step()
    assert backend.rows == [(0, 100)], "the others wait for the first one's prefill"
    driver.step()
    cached = 100 if prompts else 99 // page_size * page_size
    assert len(backend.rows) == 6 and backend.rows[1:] == [(cached, 100 - cached)] * 5
    driver.drain()
    for name in names:
        assert driver.answers[name].token_ids == reference(prompt, GREEDY).token_ids
    assert [driver.answers[name].cached_tokens for name in names] == [0, *[cached] * 5]


def test_waiting_for_a_prefill_needs_something_to_gain() -> None:
    """The last page of a prompt is never taken from the cache, so there is no point in waiting for it."""
    backend = FakeBackend(32, 32, context_length=256)
    driver = Driver(make_core(backend, prefill_cache_size=0))
    prompt = [2 + i % 11 for i in range(64)]
    driver.run(prompt, GREEDY)
    for _ in range(4):
        driver.add(prompt, GREEDY)
    driver.step()
    assert backend.rows == [(32, 32)] * 4


def test_a_request_that_waits_for_a_prefill_is_not_starved_by_later_ones() -> None:
    backend = FakeBackend(64, 4, context_length=200)
    driver = Driver(make_core(backend, prefix_cache_token_budget=0))
    prompt = [2 + i % 11 for i in range(60)]
    short = SamplingParams(max_new_tokens=1, prompt_logprobs=True)
    driver.add(prompt, short)
    waiting = driver.add(prompt, SamplingParams(max_new_tokens=3, ignore_eos=True))
    for _ in range(20):  # each prefills the shared prompt, ends at once and leaves nothing cached
        driver.add(prompt, short)
        driver.step()
    assert driver.answers[waiting].finish is FinishReason.LENGTH


def test_namespaces_do_not_wait_for_each_other() -> None:
    backend = FakeBackend()
    driver = Driver(make_core(backend))
    driver.add(PROMPT, GREEDY, namespace="a")
    driver.add(PROMPT, GREEDY, namespace="b")
    driver.step()
    assert backend.rows == [(0, 40), (0, 40)]


def test_a_prompt_put_off_by_the_prefill_limit_lets_go_of_its_prefix() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend, max_prefill_tokens=16))
    driver.run(PROMPT[:8], GREEDY)
    driver.add([30] * 12, GREEDY)
    driver.add(PROMPT[:20], GREEDY)
    driver.step()
    assert backend.rows == [(0, 12)]
    driver.drain()
    assert driver.core.cache.num_available == 64


def test_one_prompt_over_the_prefill_limit_runs_alone() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend, max_prefill_tokens=16, prefix_cache=False))
    for start in range(3):
        driver.add(PROMPT[start : start + 8], GREEDY)
    driver.add(PROMPT, GREEDY)
    driver.step()
    assert backend.rows == [(0, 8), (0, 8)]
    driver.step()
    assert [row for row in backend.rows if row[0] == 0] == [(0, 8)]
    driver.step()
    assert [row for row in backend.rows if row[0] == 0] == [(0, 40)]


def test_batch_size_bounds_the_running_set() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend, max_batch_size=2))
    for start in range(5):
        driver.add(PROMPT[start : start + 4], GREEDY)
    driver.step()
    stats = driver.core.stats()
    assert (stats["running"], stats["waiting"], len(backend.rows)) == (2, 3, 2)
    driver.drain()


def test_the_oldest_request_is_never_retracted() -> None:
    backend = FakeBackend(10, 4)
    driver = Driver(make_core(backend))
    first = driver.core.make_request("first", PROMPT[:4], SamplingParams(max_new_tokens=36, ignore_eos=True))
    driver.core.add(first)
    driver.answers["first"] = Answer()
    for start in range(1, 6):
        driver.add(PROMPT[start : start + 6], SamplingParams(max_new_tokens=12, ignore_eos=True))
    for done in range(36):
        assert first.num_output == done
        driver.step()
    assert driver.answers["first"].finish is FinishReason.LENGTH
    driver.drain()
    assert driver.core.stats()["retractions"] > 0
