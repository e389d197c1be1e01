"""Speculative decoding over the fake backend: guesses change the number of steps, and no answer."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.acceptance import StepCosts
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.handle import Work
from mini_sglang.engine.kv_cache import KVCacheManager
from mini_sglang.engine.request import Request
from mini_sglang.engine.speculation import MODEL, TREE, Speculation, Speculator, method_of
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import VOCAB, Answer, Driver, FakeBackend, examples, make_core, reference
from .test_load import CONTEXT, EngineMachine, sampling_params
from .test_load import quiet as quiet


class Oracle(Speculation):
    """Guesses the true answer, each token wrong at random so often as ``wrong`` says."""

    wrong = 0.2

    def find(self, request: Request, cache: KVCacheManager, room: int) -> tuple[str, list[int]]:
        prompt = request.tokens[: request.num_prompt]
        answer = reference(
            prompt, request.params, max_new_tokens=request.max_new_tokens, seed=request.seed
        ).token_ids
        chance = random.Random(len(request.tokens))
        guess = [
            (token + chance.randrange(1, VOCAB)) % VOCAB if chance.random() < self.wrong else token
            for token in answer[request.num_output : request.num_output + room]
        ]
        return TREE, guess + [chance.randrange(VOCAB) for _ in range(room - len(guess))]


class Steady(StepCosts):
    """What is known before any step, so that no test depends on the clock."""

    def observe(self, rows: int, seconds: float) -> None:
        pass


class RiggedSpeculator(Speculator):
    make: Callable[..., Speculation] = Oracle

    def begin(self, request: Request) -> Speculation | None:
        found = super().begin(request)
        return None if found is None else self.make(by_model=False)


def rig(core: EngineCore, make: Callable[..., Speculation] = Oracle) -> EngineCore:
    speculator = RiggedSpeculator(core._settings, core.cache)
    speculator.make = make
    speculator.costs = Steady()
    core.speculator = speculator
    return core


class SpeculatingMachine(EngineMachine):
    """All that the machine checks, with drafts right and wrong in the steps of two requests of three."""

    def make_core(self, settings: dict[str, Any]) -> EngineCore:
        return rig(make_core(self.backend, speculation="prompt_lookup", **settings))

    def add_one(self, prompt: list[int], params: SamplingParams, kind: str) -> None:
        if len(self.answers) % 3 == 2:
            params = replace(params, speculative="off")
        super().add_one(prompt, params, kind)


TestSpeculating = SpeculatingMachine.TestCase
TestSpeculating.settings = examples(60, 40)


class Right(Oracle):
    wrong = 0.0


class Wrong(Oracle):
    wrong = 1.0


def driver_with(make: Callable[..., Speculation] = Right, num_pages: int = 64, **settings: object) -> Driver:
    settings.setdefault("speculation", "prompt_lookup")
    return Driver(rig(make_core(FakeBackend(num_pages, 4, 128), **settings), make))


PARAMS = {
    "greedy": {},
    "seeded": {"temperature": 1.0, "seed": 5},
    "penalties": {"presence_penalty": 0.5, "repetition_penalty": 1.2},
    "minimum": {"min_new_tokens": 30, "ignore_eos": False},
    "stop tokens": {"stop_token_ids": (5, 9, 17)},
    "logprobs": {"logprobs": True, "top_logprobs": 3, "temperature": 0.5, "seed": 1},
    "prompt logprobs": {"logprobs": True, "prompt_logprobs": True},
}


@pytest.mark.parametrize("make", [Right, Wrong, Oracle])
@pytest.mark.parametrize("kind", PARAMS)
def test_an_answer_is_the_same_with_drafts(kind: str, make: Callable[..., Speculation]) -> None:
    for length in (1, 7, 8, 21):
        params = SamplingParams(**{"max_new_tokens": 40, "ignore_eos": True, **PARAMS[kind]})  # type: ignore[arg-type]
        prompt = [2 + index % 5 for index in range(length)]
        driver = driver_with(make)
        answer = driver.run(prompt, params)
        assert replace(answer, cached_tokens=0) == reference(prompt, params, seed=params.seed or 0)
        stats = driver.core.stats()
        assert stats["draft_tokens"] > 0 or len(answer.token_ids) < 4
        if make is Right:
            assert stats["draft_tokens_accepted"] == stats["draft_tokens"]
            assert stats["steps"] + stats["draft_tokens_accepted"] == len(answer.token_ids)
            assert len(answer.token_ids) < 6 or stats["steps"] <= 2 + len(answer.token_ids) // 3


def test_the_setting_and_the_request_decide() -> None:
    """Each way to ask, by the steps that an answer of 40 tokens takes."""
    prompt = [2, 3, 4, 2, 3]
    for setting in ("off", "prompt_lookup"):
        for asked in (None, True, False, "on", "off", "prompt_lookup"):
            driver = driver_with(speculation=setting)
            driver.run(prompt, SamplingParams(max_new_tokens=40, ignore_eos=True, speculative=asked))  # type: ignore[arg-type]
            on = asked in (True, "on", "prompt_lookup") or (asked is None and setting != "off")
            stats = driver.core.stats()
            assert (stats["steps"] < 20) == on == (stats["draft_tokens"] > 0)
            assert stats["steps"] == 40 or on


def test_most_draft_tokens_is_kept() -> None:
    for most in (1, 4, 15):
        driver = driver_with(speculative_max_draft_tokens=most)
        driver.run([2, 3], SamplingParams(max_new_tokens=60, ignore_eos=True))
        stats = driver.core.stats()
        assert stats["draft_tokens"] <= most * stats["draft_steps"]
        assert stats["draft_tokens"] > 0.6 * min(most, 7) * stats["draft_steps"]


def test_what_on_means() -> None:
    named = Settings.resolve({"draft_model_name": "small"}, {})
    plain = Settings.resolve({}, {})
    lookup = Settings.resolve({"speculation": "prompt_lookup", "draft_model_name": "small"}, {})
    on = SamplingParams(speculative="on")
    assert method_of(on, plain) == "prompt_lookup"
    assert method_of(on, named) == "draft_model"
    assert method_of(on, lookup) == "prompt_lookup"
    assert method_of(SamplingParams(), named) == "off"
    assert method_of(SamplingParams(speculative="draft_model"), lookup) == "draft_model"


def test_a_draft_model_that_is_not_there_is_refused() -> None:
    core = make_core(FakeBackend())
    with pytest.raises(InvalidValueError, match=r"speculative.*draft_model.*DRAFT_MODEL_NAME"):
        core.make_request("r", [2, 3], SamplingParams(speculative="draft_model"))
    with pytest.raises(InvalidValueError, match=r"speculative.*true, false"):
        SamplingParams(speculative="maybe")


def test_guesses_that_are_never_right_are_given_up() -> None:
    driver = driver_with(Wrong)
    answer = driver.run([2, 3], SamplingParams(max_new_tokens=100, ignore_eos=True))
    stats = driver.core.stats()
    assert len(answer.token_ids) == 100 == stats["steps"]
    assert stats["speculation_switched_off"] == 1
    assert stats["draft_tokens"] < 40


def test_guesses_that_come_right_later_are_taken_up_again() -> None:
    class Late(Oracle):
        def find(self, request: Request, cache: KVCacheManager, room: int) -> tuple[str, list[int]]:
            self.wrong = 1.0 if request.num_output < 60 else 0.0
            return super().find(request, cache, room)

    backend = FakeBackend(256, 4, 1024)
    driver = Driver(rig(make_core(backend, speculation="prompt_lookup"), Late))
    driver.run([2, 3], SamplingParams(max_new_tokens=800, ignore_eos=True))
    stats = driver.core.stats()
    assert stats["speculation_switched_off"] == 1
    assert stats["steps"] < 500


def test_drafts_take_free_pages_and_give_them_back() -> None:
    """In a pool that is full of cached prefixes one page goes for them, before the answer needs it."""
    driver = driver_with(num_pages=8, prefill_cache_size=0)
    cache = driver.core.cache
    driver.run([9] * 15, SamplingParams(max_new_tokens=5, ignore_eos=True, speculative="off"))
    assert cache.num_cached == 4 and cache.num_free == 4
    params = SamplingParams(max_new_tokens=14, ignore_eos=True)
    driver.add([2] * 13, params)
    request = driver.core.scheduler.waiting[0]
    while driver.core.has_work:
        # Of the token that the step computes at its start.
        needed = cache.pages_for(len(request.tokens))
        driver.step()
        assert cache.evicted_tokens <= max(0, needed + 1 - 4) * 4
        if driver.core.has_work:
            assert len(request.pages) <= cache.pages_for(len(request.tokens))
    assert driver.core.stats()["draft_tokens"] > 0
    assert driver.answers["r1"].token_ids == reference([2] * 13, params).token_ids


def test_no_request_is_retracted_for_a_draft() -> None:
    params = SamplingParams(max_new_tokens=24, ignore_eos=True)
    prompts = [[2 + index] * 8 for index in range(8)]
    retractions = {}
    for setting in ("off", "prompt_lookup"):
        driver = driver_with(Oracle, num_pages=64, speculation=setting)
        names = [driver.add(prompt, params) for prompt in prompts]
        driver.drain()
        for name, prompt in zip(names, prompts, strict=True):
            assert driver.answers[name].token_ids == reference(prompt, params).token_ids
        retractions[setting] = driver.core.scheduler.num_retractions
    assert retractions["prompt_lookup"] <= retractions["off"]


def test_an_earlier_answer_in_the_tree_is_guessed_again_but_not_in_another_namespace() -> None:
    """Without a word that repeats: the answer of the same prompt, and its first half under another one."""
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    prompt = [2, 9, 4, 7, 11, 3]
    for namespace, guessed in (("", True), ("tenant", False)):
        driver = Driver(make_core(FakeBackend(64, 4, 128), speculation="prompt_lookup"))
        driver.core.speculator.costs = Steady()
        first = driver.run(prompt, params)
        before = driver.core.stats()
        second = driver.run(prompt, params, namespace=namespace)
        after = driver.core.stats()
        assert first.token_ids == second.token_ids
        accepted = after["draft_tokens_accepted"] - before["draft_tokens_accepted"]
        steps = after["steps"] - before["steps"]
        # What the tree holds: whole pages, and not the last token, whose KV was never computed.
        assert (accepted > 40 and steps < 20) if guessed else accepted < 20


def test_a_prefix_cache_that_is_off_gives_no_guess() -> None:
    driver = Driver(make_core(FakeBackend(), speculation="prompt_lookup", prefix_cache=False))
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for _ in range(2):
        assert (
            driver.run([2, 9, 4, 7, 11, 3], params).token_ids
            == reference([2, 9, 4, 7, 11, 3], params).token_ids
        )
    assert driver.core.stats()["draft_tokens_accepted"] < 20


def test_a_step_that_fails_with_drafts_fails_its_requests_once() -> None:
    driver = driver_with(Right)
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    backend.fail_at.add(3)
    names = [
        driver.add([2 + index, 3], SamplingParams(max_new_tokens=40, ignore_eos=True)) for index in range(2)
    ]
    driver.drain()
    for name in names:
        answer = driver.answers[name]
        assert answer.finish is FinishReason.ERROR
        assert driver.core.cache.num_private == 0


def test_logits_that_are_not_finite_behind_right_drafts_fail_after_them() -> None:
    driver = driver_with(Right)
    backend = driver.core._backend
    assert isinstance(backend, FakeBackend)
    backend.nan_at[2] = 0
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    answer: Answer = driver.run([2, 3], params)
    assert answer.finish is FinishReason.ERROR and answer.error == "logits are not finite"
    assert answer.token_ids == reference([2, 3], params).token_ids[: len(answer.token_ids)]
    assert len(answer.token_ids) > 3


def test_a_model_that_cannot_forget_is_never_guessed_at() -> None:
    backend = FakeBackend()
    backend.shares_prefixes = False  # type: ignore[attr-defined]
    core = make_core(backend, speculation="prompt_lookup")
    request = core.request_of(Work("r", (2, 3), SamplingParams(speculative="on"), 4))
    assert request.speculation is None


def test_all_sampling_parameters_in_one_batch() -> None:
    chance = random.Random(3)
    driver = driver_with(Oracle, num_pages=160)
    wanted = {}
    for _ in range(60):
        params = sampling_params(chance.randrange(32 * 5 * 3 * 3 * 3 * 4 * 3 * 4 * 3))
        prompt = [2 + chance.randrange(6) for _ in range(chance.randrange(1, CONTEXT // 2))]
        wanted[driver.add(prompt, params)] = reference(prompt, params, seed=params.seed or 0)
        driver.step()
    driver.drain()
    assert driver.core.stats()["draft_tokens_accepted"] > 50
    for name, alone in wanted.items():
        assert replace(driver.answers[name], cached_tokens=0) == alone


def test_kinds_have_priors() -> None:
    state = Speculation(by_model=True)
    assert state.chance(MODEL).value < state.chance(TREE).value
