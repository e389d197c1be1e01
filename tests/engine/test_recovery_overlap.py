"""Out of memory while a step is under way: at its submission, or when its results are waited for."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.engine.request import Request
from mini_sglang.errors import OutOfMemoryError
from mini_sglang.types import FinishReason, SamplingParams
from tests.engine.fake_backend import POISON, Driver, examples, reference, turns
from tests.engine.late_backend import LateBackend, LateFlight, make_late_core
from tests.engine.test_recovery import loads, serve, tokens_of


@dataclass
class TightLateBackend(LateBackend):
    """Has room for so many tokens a step; it says so when the step is submitted, or when it has run."""

    room: int = 1 << 30
    at_once: float = 0.5
    late_failures: int = 0

    def submit(self, steps: Sequence[SequenceStep]) -> LateFlight:
        if tokens_of(steps) > self.room and self.chance.random() < self.at_once:
            raise OutOfMemoryError("no room")
        return super().submit(steps)

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        self._fit(steps)
        return super().run(steps)

    def run_now(
        self, steps: list[SequenceStep], owners: list[Request | None], lost: set[Request]
    ) -> list[SequenceResult]:
        self.late_failures += tokens_of(steps) > self.room
        self._fit(steps)
        return super().run_now(steps, owners, lost)

    def _fit(self, steps: Sequence[SequenceStep]) -> None:
        if tokens_of(steps) > self.room:
            for step in steps:
                for slot in self._writes(step):
                    self.slots[slot] = (POISON, -1, -1)
                if step.keep_logits is not None:
                    self.logits[step.keep_logits] = POISON
            raise OutOfMemoryError("no room")


@given(
    load=loads(),
    room=st.integers(1, 50),
    at_once=st.sampled_from((0.0, 0.5, 1.0)),
    seed=st.integers(0, 1 << 16),
    chunk=st.sampled_from((3, 8, 512)),
)
@examples(60)
def test_answers_are_those_of_a_device_with_room_for_all(
    load: list[tuple[list[int], SamplingParams, int]], room: int, at_once: float, seed: int, chunk: int
) -> None:
    backend = TightLateBackend(64, 4, 128, chance=random.Random(seed), room=room, at_once=at_once)
    driver = Driver(make_late_core(backend, prefill_chunk_size=chunk))
    for name, (prompt, params, _) in zip(serve(driver, load), load, strict=True):
        answer, expected = driver.answers[name], reference(prompt, params, seed=5)
        assert (answer.token_ids, answer.finish) == (expected.token_ids, expected.finish)
        assert answer.logprobs == expected.logprobs and answer.prompt_logprobs == expected.prompt_logprobs
    assert not backend.under_way


def test_a_size_that_failed_is_not_submitted_again_and_smaller_steps_are() -> None:
    backend = TightLateBackend(256, 4, 128, revises=0.0, refuses=0.0, room=20, at_once=0.0)
    driver = Driver(make_late_core(backend))
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    name = driver.add([i % 38 + 2 for i in range(30)], params)
    driver.drain()
    assert backend.late_failures == 1 and driver.core.stats()["step_tokens_limit"] == 15
    answer, ahead = driver.answers[name], backend.ahead
    assert answer.finish is FinishReason.LENGTH and ahead > 10
    for start in range(16):
        driver.add([start + 2, 5], params)
    driver.drain()
    assert backend.late_failures == 1 and backend.ahead == ahead
    assert all(answer.finish is FinishReason.LENGTH for answer in driver.answers.values())


def test_what_would_not_fit_beside_a_step_under_way_is_not_submitted() -> None:
    """Decodes that fit, always one step ahead, joined by prompts with which they do not."""
    backend = TightLateBackend(256, 4, 128, revises=0.0, refuses=0.0, room=20, at_once=0.0)
    driver = Driver(make_late_core(backend))
    params = SamplingParams(max_new_tokens=20, ignore_eos=True)
    driver.add([i % 38 + 2 for i in range(30)], params)
    driver.drain()
    assert backend.late_failures == 1
    for start in range(5):
        driver.add([start + 2, 5], params)
    ahead = backend.ahead
    for _ in turns():
        driver.step()
        if backend.ahead > ahead + 3:
            break
    for start in range(8):
        driver.add([start + 12, *range(2, 12)], params)
    driver.drain()
    assert backend.late_failures == 1
    assert all(answer.finish is FinishReason.LENGTH for answer in driver.answers.values())
