"""The exact-prompt cache: a prompt that comes again is not computed, and its answer is that of a cold run."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.engine.prompt_cache import PromptCache, PromptEntry
from mini_sglang.engine.radix import RadixNode
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import Driver, FakeBackend, examples, make_core, reference

PROMPT = [2 + i % 9 for i in range(40)]


def params(max_new_tokens: int = 6, **others: object) -> SamplingParams:
    others.setdefault("ignore_eos", True)
    return SamplingParams(max_new_tokens=max_new_tokens, **others)  # type: ignore[arg-type]


def driver_with(num_pages: int = 64, page_size: int = 4, **settings: object) -> Driver:
    return Driver(make_core(FakeBackend(num_pages, page_size), **settings))


def backend_of(driver: Driver) -> FakeBackend:
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    return backend


@pytest.mark.parametrize("page_size", [1, 4, 16])
@pytest.mark.parametrize("length", [1, 3, 15, 16, 17, 32])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_prompt_seen_before_computes_nothing(page_size: int, length: int, chunked: bool) -> None:
    driver = driver_with(256 // page_size, page_size, chunked_prefill=chunked, prefill_chunk_size=8)
    prompt = PROMPT[:length]
    assert driver.run(prompt, params()).cached_tokens == 0
    before = backend_of(driver).tokens_run
    for turn, wanted in enumerate(
        (params(), params(temperature=1.0, seed=3), params(temperature=1.0, seed=4), params(1), params(20))
    ):
        answer = driver.run(prompt, wanted)
        assert answer.token_ids == reference(prompt, wanted, seed=wanted.seed or 0).token_ids
        assert answer.cached_tokens == length
        # The first token comes from the kept logits, each other one takes a decode.
        before += len(answer.token_ids) - 1
        assert backend_of(driver).tokens_run == before
        assert driver.core.stats()["prefill_cache_hits"] == turn + 1


def test_size_0_computes_again() -> None:
    for size, expected in ((8, 10), (0, 8)):
        driver = driver_with(prefill_cache_size=size)
        driver.run(PROMPT[:10], params())
        assert driver.run(PROMPT[:10], params()).cached_tokens == expected
        assert driver.core.stats()["prefill_cache_entries"] == (size > 0)


def test_sampling_settings_apply_to_the_first_token() -> None:
    driver = driver_with()
    prompt = PROMPT[:10]
    first = driver.run(prompt, params(1)).token_ids[0]
    for wanted in (
        params(3, stop_token_ids=(first,), min_new_tokens=2),
        params(3, repetition_penalty=1.3, presence_penalty=0.5),
        params(3, logprobs=True, top_logprobs=3),
    ):
        answer, alone = driver.run(prompt, wanted), reference(prompt, wanted)
        assert (answer.token_ids, answer.logprobs) == (alone.token_ids, alone.logprobs)
        assert answer.cached_tokens == 10
    ended = driver.run(prompt, params(3, stop_token_ids=(first,)))
    assert (ended.token_ids, ended.finish) == ([first], FinishReason.STOP)


def test_prompt_logprobs_compute_the_prompt() -> None:
    driver = driver_with()
    wanted = params(3, prompt_logprobs=True)
    for _ in range(2):
        answer = driver.run(PROMPT[:10], wanted)
        assert answer.cached_tokens == 0
        assert answer.prompt_logprobs == reference(PROMPT[:10], wanted).prompt_logprobs
    # But what they computed is kept for those who do not ask for them.
    assert driver.run(PROMPT[:10], params()).cached_tokens == 10


def test_namespaces_do_not_share() -> None:
    driver = driver_with()
    driver.run(PROMPT[:10], params(), namespace="a")
    assert driver.run(PROMPT[:10], params(), namespace="b").cached_tokens == 0
    assert driver.run(PROMPT[:10], params(), namespace="a").cached_tokens == 10


def test_a_longer_and_a_shorter_prompt_do_not_hit() -> None:
    driver = driver_with()
    driver.run(PROMPT[:10], params())
    assert driver.run(PROMPT[:11], params()).cached_tokens == 8
    assert driver.run(PROMPT[:9], params()).cached_tokens == 8


def test_a_prefix_put_in_is_not_a_prompt_seen() -> None:
    driver = driver_with()
    core = driver.core
    core.insert_prefix(PROMPT[:10])
    driver.drain()
    assert driver.run(PROMPT[:10], params()).cached_tokens == 8


def test_size_keeps_the_latest_used() -> None:
    driver = driver_with(prefill_cache_size=2)
    prompts = [[2 + number] * 6 for number in range(3)]
    driver.run(prompts[0], params(1))
    driver.run(prompts[1], params(1))
    driver.run(prompts[0], params(1))
    driver.run(prompts[2], params(1))
    stats = driver.core.stats()
    assert (stats["prefill_cache_entries"], stats["prefill_cache_evictions"]) == (2, 1)
    assert driver.run(prompts[0], params(1)).cached_tokens == 6
    assert driver.run(prompts[1], params(1)).cached_tokens == 4


def test_token_budget_bounds_the_prompts() -> None:
    for budget, kept in ((65536, 3), (12, 2), (11, 1), (5, 0)):
        driver = driver_with(prefill_cache_token_budget=budget)
        for number in range(3):
            driver.run([2 + number] * 6, params(1))
        stats = driver.core.stats()
        assert (stats["prefill_cache_entries"], stats["prefill_cache_tokens"]) == (kept, 6 * kept)


def test_more_first_tokens_in_a_step_than_slots() -> None:
    driver = driver_with(prefill_cache_size=2)
    prompts = {driver.add([2 + number] * 6, params(3)): [2 + number] * 6 for number in range(6)}
    driver.drain()
    assert driver.core.stats()["prefill_cache_entries"] == 2
    for name, prompt in prompts.items():
        assert driver.answers[name].token_ids == reference(prompt, params(3)).token_ids


def test_entries_yield_to_running_requests() -> None:
    driver = driver_with(num_pages=6)
    for number in range(4):
        driver.run([2 + number] * 3, params(1))
    assert driver.core.stats()["prefill_cache_entries"] == 4
    # Takes the whole pool.
    answer = driver.run(PROMPT[:20], params(4))
    assert answer.token_ids == reference(PROMPT[:20], params(4)).token_ids
    assert driver.core.stats()["retractions"] == 0
    assert driver.core.stats()["prefill_cache_tokens"] == 20, "its own has no partial page"


def test_a_prompt_whose_pages_were_evicted_is_computed_again() -> None:
    driver = driver_with(num_pages=8)
    driver.run(PROMPT[:10], params(1))
    driver.run([3] * 28, params(1))
    assert driver.core.stats()["prefill_cache_entries"] == 1, "only the second can be whole"
    answer = driver.run(PROMPT[:10], params())
    assert answer.token_ids == reference(PROMPT[:10], params()).token_ids
    assert answer.cached_tokens < 10


def test_a_hit_when_its_own_entry_must_go_for_its_page() -> None:
    driver = driver_with(num_pages=4)
    driver.run(PROMPT[:10], params(1))  # two pages of the tree, one kept
    name = driver.add([30], params(3))  # and the last one
    driver.step()
    answer = driver.run(PROMPT[:10], params(2))
    assert answer.token_ids == reference(PROMPT[:10], params(2)).token_ids
    assert driver.answers[name].token_ids == reference([30], params(3)).token_ids


def test_clear_drops_the_prompts() -> None:
    driver = driver_with()
    driver.run(PROMPT[:10], params(1))
    assert driver.core.cache.clear() == 12
    assert driver.core.stats()["kv_tokens_free"] == 256
    assert driver.run(PROMPT[:10], params(1)).cached_tokens == 0


def test_a_backend_that_cannot_copy_pages_has_none() -> None:
    backend = FakeBackend(64, 4, copies_pages=False)
    driver = Driver(make_core(backend))
    driver.run(PROMPT[:10], params())
    assert driver.run(PROMPT[:10], params()).cached_tokens == 8


def test_a_failed_step_keeps_nothing() -> None:
    for fault in ({"fail_at": {0}}, {"nan_at": {0: 0}}):
        backend = FakeBackend(64, 4, **fault)  # type: ignore[arg-type]
        driver = Driver(make_core(backend))
        assert driver.run(PROMPT[:10], params()).finish is FinishReason.ERROR
        assert driver.core.stats()["prefill_cache_entries"] == 0
        assert driver.run(PROMPT[:10], params()).token_ids == reference(PROMPT[:10], params()).token_ids


def test_a_failed_hit_leaves_the_entry() -> None:
    backend = FakeBackend(64, 4)
    driver = Driver(make_core(backend))
    driver.run(PROMPT[:10], params(1))
    backend.fail_at = {backend.calls}
    assert driver.run(PROMPT[:10], params(2)).finish is FinishReason.ERROR
    assert driver.run(PROMPT[:10], params(2)).cached_tokens == 10


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("page_size", [1, 4])
def test_repeats_under_load_answer_as_alone(seed: int, page_size: int) -> None:
    draw = random.Random(seed)
    backend = FakeBackend(96 // page_size, page_size)
    core = make_core(
        backend,
        chunked_prefill=bool(seed % 2),
        prefill_chunk_size=7,
        max_batch_size=5,
        prefill_cache_size=draw.choice([1, 3, 8]),
        page_token_budget=draw.choice([0, 24, 200]),
        prefix_cache_policy=draw.choice(["lru", "lfu"]),
    )
    driver = Driver(core)
    prompts = [[*PROMPT[: draw.randrange(1, 30)], draw.randrange(2, 40)] for _ in range(6)]
    asked: dict[str, tuple[Sequence[int], SamplingParams]] = {}
    for _ in range(60):
        if draw.random() < 0.6:
            prompt = draw.choice(prompts)
            wanted = params(
                draw.randrange(1, 20),
                temperature=draw.choice([0.0, 1.0]),
                seed=draw.randrange(1000),
                prompt_logprobs=draw.random() < 0.1,
                repetition_penalty=draw.choice([1.0, 1.2]),
            )
            asked[driver.add(prompt, wanted)] = prompt, wanted
        driver.step(draw.randrange(3))
        if draw.random() < 0.1 and core._requests:
            driver.abort(draw.choice(list(core._requests)))
        if draw.random() < 0.05:
            backend._store.finish()
    driver.drain()
    assert core.stats()["prefill_cache_hits"] > 0
    for name, (prompt, wanted) in asked.items():
        answer = driver.answers[name]
        alone = reference(prompt, wanted, seed=wanted.seed or 0).token_ids
        assert answer.token_ids == alone[: len(answer.token_ids)]
        assert answer.finish is FinishReason.ABORT or answer.token_ids == alone


@given(
    st.integers(0, 4),
    st.integers(0, 12),
    st.lists(st.tuples(st.sampled_from("putgd"), st.integers(0, 5)), max_size=40),
)
@examples(200)
def test_against_a_list(size: int, budget: int, operations: list[tuple[str, int]]) -> None:
    """The twin: a list of (prompt, page), the latest used last."""
    cache = PromptCache(size, budget)
    twin: list[tuple[int, int]] = []
    free: list[int] = []
    given_up: list[int] = []
    page = 0
    for kind, number in operations:
        tokens = (number,) * (number + 1)
        key = ("", tokens)
        entry = cache.get(key)
        assert (entry is not None) == any(number == known for known, _ in twin)
        if kind in "pu":
            slot, freed = cache.reserve(len(tokens))
            given_up += freed
            assert (slot is None) == (len(tokens) > budget or size == 0)
            if slot is None:
                continue
            if len(twin) == size:
                free.append(twin.pop(0)[1])
            given_up += cache.put(PromptEntry(key, RadixNode((), [], None), 0, page, slot))
            free += [old for known, old in twin if known == number]
            twin = [(known, old) for known, old in twin if known != number] + [(number, page)]
            page += 1
            while sum(known + 1 for known, _ in twin) > budget:
                free.append(twin.pop(0)[1])
        elif kind == "t" and entry is not None:
            cache.touch(entry)
            twin.append(twin.pop([known for known, _ in twin].index(number)))
        elif kind == "d" and entry is not None:
            given_up += cache.drop(entry)
            place = [known for known, _ in twin].index(number)
            free.append(twin.pop(place)[1])
        elif kind == "g":
            given_up += cache.evict(number)
            for _ in range(min(number, len(twin))):
                free.append(twin.pop(0)[1])
        assert sorted(given_up) == sorted(free)
        assert sorted(cache.pages()) == sorted(old for _, old in twin)
        cache.check([])
