"""The draft model over fake backends: its KV is checked slot by slot as the large model's is."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams

from .fake_backend import VOCAB, Driver, FakeBackend, examples, make_core, reference
from .test_load import CONTEXT, EngineMachine, sampling_params
from .test_load import quiet as quiet
from .test_speculation import Steady


@dataclass
class Small(FakeBackend):
    """The same model, but that its choices are other ones so often as ``wrong`` says.

    Attributes:
        widest: most rows of one call.
        extra: ids of its head past the large model's vocabulary that it may choose.
    """

    wrong: float = 0.0
    extra: int = 0
    widest: int = 0

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        results = super().run(steps)
        self.widest = max(self.widest, len(steps))
        chance = random.Random(self.calls)
        for result in results:
            if result.token_id is not None and chance.random() < self.wrong:
                result.token_id = chance.randrange(VOCAB + self.extra)
        return results


def core_with(backend: FakeBackend, small: FakeBackend, **settings: object) -> EngineCore:
    settings.setdefault("speculation", "draft_model")
    core = make_core(backend, draft_backend=small, draft_model_name="small", **settings)
    core.speculator.costs = Steady()
    return core


def driver_with(small: FakeBackend, **settings: object) -> Driver:
    return Driver(core_with(FakeBackend(64, 4, 128), small, **settings))


class DraftingMachine(EngineMachine):
    """All that the machine checks, with guesses of a draft model that is right three times of four.

    Its pool is too small for all requests, and its pages are of another size.
    """

    def make_core(self, settings: dict[str, Any]) -> EngineCore:
        return core_with(self.backend, Small(20, 3, CONTEXT, wrong=0.25), **settings)

    def drain(self) -> None:
        super().drain()
        draft_model = self.core.speculator.draft_model
        assert draft_model is not None and draft_model._allocator.num_free == 20
        assert not draft_model._failed


TestDrafting = DraftingMachine.TestCase
TestDrafting.settings = examples(100, 40)


@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 3}, {"presence_penalty": 1.0}])
def test_a_draft_model_equal_to_the_large_one_is_always_right(sampling: dict[str, Any]) -> None:
    small = Small(64, 8, 128)
    driver = driver_with(small)
    params = SamplingParams(max_new_tokens=80, ignore_eos=True, **sampling)
    # Tokens that do not repeat: what the text itself says is left out of it.
    answer = driver.run([2, 3, 4], params)
    assert answer.token_ids == reference([2, 3, 4], params, seed=params.seed or 0).token_ids
    stats = driver.core.stats()
    assert stats["draft_tokens"] > 40
    assert stats["draft_tokens_accepted"] > 0.8 * stats["draft_tokens"]
    assert stats["steps"] < 40
    # One row of each token at most, but for the first steps after wrong guesses from the text.
    assert small.tokens_run <= 3 + 80 + stats["draft_tokens"] - stats["draft_tokens_accepted"]


def test_a_draft_model_that_is_never_right_is_given_up() -> None:
    small = Small(64, 8, 128, wrong=1.0, extra=40)
    driver = driver_with(small)
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    assert driver.run([2, 3, 4], params).token_ids == reference([2, 3, 4], params).token_ids
    stats = driver.core.stats()
    assert stats["speculation_switched_off"] == 1
    assert small.calls < 60


def test_it_is_asked_only_where_the_request_or_setting_says_so() -> None:
    params = SamplingParams(max_new_tokens=30, ignore_eos=True)
    for setting, asked, expected in (
        ("off", None, False),
        ("off", "on", True),
        ("off", "prompt_lookup", False),
        ("prompt_lookup", "on", False),
        ("prompt_lookup", "draft_model", True),
        ("draft_model", "off", False),
        ("draft_model", None, True),
    ):
        small = Small(64, 8, 128)
        driver_with(small, speculation=setting).run([2, 3, 4], replace(params, speculative=asked))
        assert (small.calls > 0) == expected, (setting, asked)


def test_requests_are_drafted_for_side_by_side() -> None:
    small = Small(64, 8, 128)
    driver = driver_with(small)
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompts = [[2 + index, 3, 4] for index in range(2)]
    names = [driver.add(prompt, params) for prompt in prompts]
    driver.drain()
    for name, prompt in zip(names, prompts, strict=True):
        assert driver.answers[name].token_ids == reference(prompt, params).token_ids
    assert small.widest == 2 and driver.core.stats()["steps"] < 36


def test_a_long_prompt_is_computed_in_pieces() -> None:
    small = Small(64, 8, 128)
    driver = driver_with(small, max_prefill_tokens=16)
    seen: list[int] = []
    params = SamplingParams(max_new_tokens=40, ignore_eos=True)
    prompt = [2 + index * 7 % 37 for index in range(60)]
    driver.add(prompt, params)
    while driver.core.has_work:
        driver.step()
        seen += [count for _, count in small.rows]
    assert driver.answers["r0"].token_ids == reference(prompt, params).token_ids
    assert max(seen) == 16 and driver.core.stats()["draft_tokens_accepted"] > 10


def test_a_context_or_vocabulary_that_is_smaller_ends_the_guessing_not_the_answer() -> None:
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for small in (Small(64, 8, 20), Small(64, 8, 128, vocab_size=20), Small(2, 8, 128)):
        driver = driver_with(small)
        assert driver.run([2, 3, 4], params).token_ids == reference([2, 3, 4], params).token_ids


def test_a_failure_of_the_draft_model_fails_no_request() -> None:
    small = Small(64, 8, 128, fail_at={2})
    driver = driver_with(small)
    params = SamplingParams(max_new_tokens=60, ignore_eos=True)
    for prompt in ([2, 3, 4], [5, 6]):
        assert driver.run(prompt, params).token_ids == reference(prompt, params).token_ids
    assert small.calls == 3


def test_all_sampling_parameters_in_one_batch() -> None:
    chance = random.Random(5)
    driver = Driver(core_with(FakeBackend(160, 4, 128), Small(100, 4, 128, wrong=0.2)))
    wanted = {}
    for _ in range(60):
        params = sampling_params(chance.randrange(32 * 5 * 3 * 3 * 3 * 4 * 3 * 4 * 3))
        prompt = [2 + chance.randrange(6) for _ in range(chance.randrange(1, CONTEXT // 2))]
        wanted[driver.add(prompt, params)] = reference(prompt, params, seed=params.seed or 0)
        driver.step()
    driver.drain()
    for name, alone in wanted.items():
        assert replace(driver.answers[name], cached_tokens=0) == alone
    assert driver.core.stats()["draft_tokens_accepted"] > 50
