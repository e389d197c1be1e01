"""Requests from arrival to their one end: failures, aborts, caps, endings, counters."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from mini_sglang.errors import ContextLengthError, InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import EOS_IDS, Driver, FakeBackend, make_core, reference, turns

PROMPT = [2 + i % 9 for i in range(40)]


def params(max_new_tokens: int = 10, **others: object) -> SamplingParams:
    others.setdefault("ignore_eos", True)
    return SamplingParams(max_new_tokens=max_new_tokens, **others)  # type: ignore[arg-type]


def driver_with(num_pages: int = 64, page_size: int = 4, context: int = 128, **settings: object) -> Driver:
    return Driver(make_core(FakeBackend(num_pages, page_size, context), **settings))


def backend_of(driver: Driver) -> FakeBackend:
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("k", range(51))
def test_a_step_that_raises_fails_its_batch_only(k: int, chunked: bool) -> None:
    driver = driver_with(20, chunked_prefill=chunked, prefill_chunk_size=6, max_batch_size=4)
    backend = backend_of(driver)
    backend.fail_at = {k}
    wanted = params(44)
    prompts = {driver.add(PROMPT[:n], wanted): PROMPT[:n] for n in (9, 3, 21, 14, 8, 17)}
    failed: list[str] = []
    for _ in turns():
        if not driver.core.has_work:
            break
        before = {name for name, answer in driver.answers.items() if answer.finish is None}
        call = backend.calls
        driver.step()
        now = [name for name in before if driver.answers[name].finish is FinishReason.ERROR]
        assert len(now) == (len(backend.rows) if call == k else 0)
        failed += now
    assert failed
    stats = driver.core.stats()
    assert (stats["failed"], stats["finished"]) == (len(failed), 6 - len(failed))
    assert stats["kv_tokens_private"] == 0 and driver.core.cache.num_available == 20
    for name, prompt in prompts.items():
        answer, alone = driver.answers[name], reference(prompt, wanted).token_ids
        if name in failed:
            assert answer.error is not None and f"device failure at call {k}" in answer.error
            assert answer.token_ids == alone[: len(answer.token_ids)]
        else:
            assert answer.token_ids == alone
    for prompt in prompts.values():
        assert driver.run(prompt, wanted).token_ids == reference(prompt, wanted).token_ids


def test_a_failure_without_words_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_with()

    def run(steps: object) -> None:
        raise MemoryError

    monkeypatch.setattr(backend_of(driver), "run", run)
    assert "MemoryError" in (driver.run(PROMPT, params(4)).error or "")


@pytest.mark.parametrize("call", [0, 1, 5])
def test_a_row_that_is_not_finite_fails_alone(call: int) -> None:
    driver = driver_with()
    backend_of(driver).nan_at = {call: 1}
    names = [driver.add(PROMPT[start : start + 6], params()) for start in range(3)]
    driver.drain()
    bad = driver.answers[names[1]]
    assert bad.finish is FinishReason.ERROR and bad.error == "logits are not finite"
    assert len(bad.token_ids) == call
    for start in (0, 2):
        assert (
            driver.answers[names[start]].token_ids == reference(PROMPT[start : start + 6], params()).token_ids
        )
    assert driver.run(PROMPT[1:7], params()).token_ids == reference(PROMPT[1:7], params()).token_ids


def test_a_failed_request_leaves_nothing_of_its_answer_in_the_cache() -> None:
    driver = driver_with()
    backend_of(driver).nan_at = {6: 0}
    answer = driver.run(PROMPT[:8], params())
    assert answer.finish is FinishReason.ERROR and len(answer.token_ids) == 6
    assert driver.run([*PROMPT[:8], *answer.token_ids], params()).cached_tokens == 8


def test_abort_in_the_step_that_finishes() -> None:
    """Before the last step the abort ends it; after, the end has been told and stays the only one."""
    for before in (True, False):
        driver = driver_with()
        name = driver.add(PROMPT[:6], params(3))
        driver.step(2)
        if not before:
            driver.step()
        event = driver.core.abort(name)
        assert (event is not None) is before
        if event is not None:
            assert event.finish is FinishReason.ABORT and event.token_ids == ()
        assert driver.core.step() == [] and not driver.core.has_work
        assert driver.core.abort(name) is None
        assert driver.core.stats()["aborted"] == before and driver.core.stats()["finished"] == (not before)
        driver.core.check()


def test_abort_in_every_phase_gives_the_pages_back_and_keeps_what_was_computed() -> None:
    driver = driver_with(chunked_prefill=True, prefill_chunk_size=8, max_batch_size=1)
    running, waiting = driver.add(PROMPT, params()), driver.add(PROMPT[5:], params())
    driver.step(2)
    driver.abort(waiting)
    driver.abort(running)
    assert not driver.core.has_work
    stats = driver.core.stats()
    assert (stats["kv_tokens_private"], stats["kv_tokens_cached"], stats["aborted"]) == (0, 16, 2)
    assert driver.run(PROMPT, params()).cached_tokens == 16


def test_abort_of_a_retracted_request() -> None:
    driver = driver_with(8)
    first, second = (driver.add(PROMPT[start : start + 10], params(20)) for start in (0, 1))
    for _ in turns():
        if driver.core.stats()["retractions"]:
            break
        driver.step()
    driver.abort(second)
    driver.drain()
    assert driver.answers[second].finish is FinishReason.ABORT
    assert driver.answers[first].token_ids == reference(PROMPT[:10], params(20)).token_ids


def test_abort_of_an_unknown_request() -> None:
    driver = driver_with()
    assert driver.core.abort("nobody") is None
    assert driver.core.stats()["aborted"] == 0


def test_ending_early_for_a_stop_string_counts_as_finished() -> None:
    driver = driver_with()
    name = driver.add(PROMPT[:6], params())
    driver.step()
    event = driver.core.abort(name, FinishReason.STOP)
    assert event is not None and event.finish is FinishReason.STOP
    stats = driver.core.stats()
    assert (stats["finished"], stats["aborted"]) == (1, 0)


@pytest.mark.parametrize(
    ("length", "wanted", "margin", "expected"),
    [(20, 12, 4, 12), (20, 40, 4, 40), (20, 41, 4, 40), (20, 44, 4, 40), (62, 9, 4, 1), (63, 1, 16, 1)],
)
def test_max_new_tokens_is_lowered_to_what_the_context_leaves(
    length: int, wanted: int, margin: int, expected: int
) -> None:
    driver = driver_with(context=64, max_context_margin=margin)
    answer = driver.run([2 + i % 9 for i in range(length)], params(wanted))
    assert len(answer.token_ids) == expected and answer.finish is FinishReason.LENGTH


def test_without_aggressive_max_new_tokens_too_many_are_refused() -> None:
    driver = driver_with(context=64, aggressive_max_new_tokens=False, max_context_margin=16)
    assert len(driver.run(PROMPT, params(24)).token_ids) == 24
    with pytest.raises(ContextLengthError, match="max_new_tokens is 25; it must be at most 24"):
        driver.add(PROMPT, params(25))


@pytest.mark.parametrize(("num_pages", "context", "limit"), [(64, 40, 40), (9, 128, 36)])
def test_a_prompt_needs_room_for_a_token_in_context_and_pool(
    num_pages: int, context: int, limit: int
) -> None:
    driver = driver_with(num_pages, context=context)
    assert driver.core.max_sequence_tokens == limit
    with pytest.raises(ContextLengthError, match=f"{limit} tokens.*shorter than the context, {limit} tokens"):
        driver.add(PROMPT[:limit], params())
    assert len(driver.run(PROMPT[: limit - 1], params()).token_ids) == 1
    assert len(driver.run(PROMPT[:10], params(999)).token_ids) == limit - 10


def find_prompt(index: int, ids: Sequence[int]) -> tuple[list[int], list[int]]:
    """A prompt whose greedy answer has one of ``ids`` first at ``index``, and that answer."""
    for start in range(1000):
        prompt = [start % 37 + 2, start // 37 + 2, 5]
        answer = reference(prompt, params(12)).token_ids
        if next((i for i, token in enumerate(answer) if token in ids), -1) == index:
            return prompt, answer
    raise AssertionError("no such prompt")


def test_eos_ends_an_answer_unless_ignored() -> None:
    prompt, ids = find_prompt(4, sorted(EOS_IDS))
    answer = driver_with().run(prompt, params(12, ignore_eos=False))
    assert answer.token_ids == ids[:5]
    assert (answer.finish, answer.matched_token_id) == (FinishReason.STOP, ids[4])
    answer = driver_with().run(prompt, params(12))
    assert answer.token_ids == ids
    assert (answer.finish, answer.matched_token_id) == (FinishReason.LENGTH, None)


def test_eos_as_the_last_token_allowed_is_a_stop() -> None:
    prompt, ids = find_prompt(4, sorted(EOS_IDS))
    answer = driver_with().run(prompt, params(5, ignore_eos=False))
    assert (answer.token_ids, answer.finish) == (ids[:5], FinishReason.STOP)


def test_stop_token_ids_end_an_answer_with_or_without_eos() -> None:
    prompt, ids = find_prompt(3, [17])
    for ignore_eos in (True, False):
        answer = driver_with().run(prompt, params(12, stop_token_ids=(17,), ignore_eos=ignore_eos))
        alone = reference(prompt, params(12, stop_token_ids=(17,), ignore_eos=ignore_eos))
        assert (answer.token_ids, answer.matched_token_id) == (alone.token_ids, alone.matched_token_id)
    assert answer.token_ids[-1] == ids[3] == 17


@pytest.mark.parametrize("minimum", [1, 5, 6, 12])
def test_min_new_tokens_bans_what_would_end_the_answer(minimum: int) -> None:
    prompt, ids = find_prompt(4, [0, 1, 17])
    wanted = params(12, min_new_tokens=minimum, ignore_eos=False, stop_token_ids=(17,))
    answer = driver_with().run(prompt, wanted)
    assert answer.token_ids == reference(prompt, wanted).token_ids
    assert len(answer.token_ids) >= minimum
    assert not {0, 1, 17} & set(answer.token_ids[:minimum])
    assert minimum > 4 or answer.token_ids == ids[:5]


def test_seeds_make_sampling_repeatable_and_different() -> None:
    driver = driver_with()
    sampled = [driver.run(PROMPT[:6], params(temperature=1.0, seed=seed)).token_ids for seed in (1, 1, 2)]
    assert sampled[0] == sampled[1] == reference(PROMPT[:6], params(temperature=1.0), seed=1).token_ids
    assert sampled[2] != sampled[0]
    unseeded = {tuple(driver.run(PROMPT[:6], params(temperature=1.0)).token_ids) for _ in range(4)}
    assert len(unseeded) > 1


@pytest.mark.parametrize("chunked", [False, True])
def test_prompt_logprobs_compute_the_whole_prompt_and_come_once(chunked: bool) -> None:
    driver = driver_with(12, chunked_prefill=chunked, prefill_chunk_size=7)
    wanted = params(12, prompt_logprobs=True, top_logprobs=3, logprobs=True)
    driver.run(PROMPT[:20], params(1))
    other = driver.add(PROMPT[20:38], params(20))
    name = driver.add(PROMPT[:20], wanted)
    driver.drain()
    answer, alone = driver.answers[name], reference(PROMPT[:20], wanted)
    assert answer.prompt_logprobs == alone.prompt_logprobs and len(alone.prompt_logprobs) == 19
    assert answer.logprobs == alone.logprobs and answer.cached_tokens == 0
    assert driver.core.stats()["retractions"] > 0, "make the pool smaller"
    assert driver.answers[other].token_ids == reference(PROMPT[20:38], params(20)).token_ids


def test_insert_prefix_puts_a_prompt_in_the_cache() -> None:
    driver = driver_with(16, context=48)
    for length in (21, 48):  # the second fills the context, which a request for a token could not
        driver.core.add(driver.core.make_prefix_request("p", PROMPT[:21] + [3] * (length - 21)))
        events = []
        for _ in turns():
            if not driver.core.has_work:
                break
            events += driver.core.step()
        assert [(event.finish, event.token_ids) for event in events] == [(FinishReason.STOP, ())]
    assert backend_of(driver).tokens_sampled == 0
    assert driver.run(PROMPT[:21], params()).cached_tokens == 20


def test_insert_prefix_refuses_what_cannot_be_cached() -> None:
    core = driver_with(16, context=48, prefix_cache_max_tokens=40).core
    with pytest.raises(InvalidValueError, match=r"41 tokens.*at most 40 tokens \(PREFIX_CACHE_MAX_TOKENS"):
        core.make_prefix_request("p", [2] * 41)
    with pytest.raises(InvalidValueError, match="PREFIX_CACHE"):
        driver_with(prefix_cache=False).core.make_prefix_request("p", PROMPT)
    for num_pages, context in ((64, 30), (7, 128)):  # the context, then the pool
        limit = min(num_pages * 4, context)
        with pytest.raises(ContextLengthError, match=f"at most the context, {limit} tokens"):
            driver_with(num_pages, context=context).core.make_prefix_request("p", [2] * (limit + 1))
    with pytest.raises(InvalidValueError, match="at least one token"):
        core.make_prefix_request("p", [])


@pytest.mark.parametrize(
    ("prompt", "others", "named"),
    [
        ([], {}, "prompt"),
        ([2, 40], {}, "prompt is 40; it must be made of token ids from 0 to 39"),
        ([2, -1], {}, "prompt is -1"),
        ([2, True], {}, "prompt is True"),
        ([2, 3.0], {}, "prompt is 3.0"),
        (["a"], {}, "prompt is 'a'"),
        ([2], {"stop_token_ids": (40,)}, "stop_token_ids is 40"),
        ([2], {"logit_bias": {99: 1.0}}, "logit_bias is 99"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(
    prompt: list[int], others: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidValueError, match=named):
        driver_with().core.make_request("r", prompt, params(**others))  # type: ignore[arg-type]


def test_ids_of_running_requests_are_unique() -> None:
    core = driver_with().core
    core.add(core.make_request("r", PROMPT, params()))
    with pytest.raises(InvalidValueError, match="request_id is 'r'"):
        core.add(core.make_request("r", PROMPT, params()))
    assert core.abort("r") is not None
    core.add(core.make_request("r", PROMPT, params()))


def test_counters_add_up() -> None:
    driver = driver_with(page_token_budget=40)
    driver.run(PROMPT[:10], params(5))
    driver.run(PROMPT[:10], params(5))
    driver.run([*PROMPT[:9], 30], params(5))
    driver.run(PROMPT[20:30], params(3))
    driver.abort(driver.add(PROMPT, params()))
    assert driver.core.stats() == {
        "requests": 5, "finished": 4, "aborted": 1, "failed": 0, "running": 0, "waiting": 0,
        "steps": 18, "prefill_tokens": 10 + 2 + 10, "decode_tokens": 4 + 4 + 4 + 2,
        "prefill_cache_hits": 1, "prefill_cache_misses": 3,
        "prefill_cache_hit_tokens": 10, "prefill_cache_miss_tokens": 30,
        "prefill_cache_entries": 3, "prefill_cache_tokens": 30, "prefill_cache_evictions": 0,
        "prefix_hits": 1, "prefix_misses": 2, "prefix_hit_tokens": 8, "prefix_miss_tokens": 10 + 2 + 10,
        "prefix_evicted_tokens": 0, "prefix_loaded_tokens": 0, "prefix_reuse": 1,
        "prefixes": 3, "retractions": 0, "kv_tokens_total": 256, "kv_tokens_free": 256 - 28 - 12,
        # Three answers, of which two share two pages, and the last page of three prompts.
        "kv_tokens_cached": 28 + 12, "kv_tokens_private": 0,
        "host_hits": 0, "host_tokens_total": 40, "host_tokens_used": 0,
        "host_spilled_tokens": 0, "host_restored_tokens": 0, "host_dropped_tokens": 0,
        "lora_requests": 0, "loras": 0, "overlapped_steps": 0, "overlap_dropped": 0,
        "warm_prefixes": 0, "warm_prefixes_done": 0, "warm_prefixes_failed": 0,
        "capped_by_load": 0, "capped_by_context": 0,
        "out_of_memory": 0, "step_tokens_limit": 0,
        "draft_steps": 0, "draft_tokens": 0, "draft_tokens_accepted": 0, "speculation_switched_off": 0,
    }  # fmt: skip


def test_counters_count_a_retracted_request_once() -> None:
    driver = driver_with(10, prefix_cache=False, chunked_prefill=True, prefill_chunk_size=4)
    for start in range(4):
        driver.add(PROMPT[start : start + 12], params(16))
    driver.drain()
    stats = driver.core.stats()
    assert stats["retractions"] > 0
    assert stats["prefix_misses"] == 4 and stats["prefix_hits"] == 0
    assert stats["decode_tokens"] == 4 * 15
    # What was computed twice is prefill.
    assert stats["prefill_tokens"] == backend_of(driver).tokens_run - stats["decode_tokens"] > 4 * 12


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_same_answer_cold_warm_and_retracted(batch: int, chunked: bool, page_size: int) -> None:
    driver = driver_with(640 // page_size, page_size, chunked_prefill=chunked, prefill_chunk_size=32)
    prompts = [[*PROMPT[:33], 2 + i // 37, 2 + i % 37] for i in range(batch)]
    wanted = [params(34, temperature=i % 2, seed=i) for i in range(batch)]
    for warm in (False, True):
        names = [driver.add(prompt, one) for prompt, one in zip(prompts, wanted, strict=True)]
        driver.drain()
        for name, prompt, one in zip(names, prompts, wanted, strict=True):
            answer = driver.answers[name]
            assert answer.token_ids == reference(prompt, one, seed=one.seed or 0).token_ids
            assert not warm or answer.cached_tokens >= 32
    assert (driver.core.stats()["retractions"] > 0) is (batch == 64)


def test_thousands_of_requests_leave_nothing_behind() -> None:
    driver = driver_with(40, prefix_cache_size=8)
    backend_of(driver).checked = False
    for turn in range(2500):
        driver.core.add(
            driver.core.make_request(f"r{turn}", [2 + turn % 31, 2 + turn // 31 % 31, *PROMPT[:7]], params(2))
        )
        driver.core.step()
    for _ in turns():
        if not driver.core.has_work:
            break
        driver.core.step()
    driver.core.check()
    tree = driver.core.cache._tree
    assert driver.core._requests == {} and driver.core.cache.num_available == 40
    assert driver.core.stats()["finished"] == 2500 and tree.num_leaves <= 8
    assert len(tree._heap) <= 64 + 4 * 8 + 1
    driver.core.cache.clear()
    assert driver.core.cache.num_free == 40 and tree._roots == {}
