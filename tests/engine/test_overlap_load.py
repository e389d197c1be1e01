"""The engine under random load with a step always under way, whose reads and writes come late."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import rule

from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import FinishReason, SamplingParams

from .fake_backend import Driver, FakeBackend, examples
from .late_backend import LateBackend, make_late_core
from .test_load import CONTEXT, EngineMachine, engine_settings, forty_at_random
from .test_speculation import rig


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


class OverlapMachine(EngineMachine):
    """What ``EngineMachine`` does, and moments at which the backend goes on by itself."""

    patience = 4
    backend: LateBackend

    def make_backend(self, num_pages: int, page_size: int) -> FakeBackend:
        return LateBackend(num_pages, page_size, CONTEXT)

    def make_core(self, settings: dict[str, Any]) -> EngineCore:
        return make_late_core(self.backend, **settings)

    @rule(seed=st.integers(0, 1 << 32), revises=st.sampled_from([0.0, 0.1, 0.9]))
    def luck(self, seed: int, revises: float) -> None:
        self.backend.chance = random.Random(seed)
        self.backend.revises = revises

    @rule()
    def go_on(self) -> None:
        for flight in self.backend.under_way:
            flight.execute()

    def one_step(self) -> None:
        had_work, before = self.core.has_work, self.backend.submitted + self.backend.calls
        landing = bool(self.backend.under_way)
        for event in self.core.step():
            self.answers[event.request_id].add(event)
            if event.finish is FinishReason.ERROR:
                assert self.backend.fail_at or self.backend.nan_at
        done = self.backend.submitted + self.backend.calls - before
        assert landing or done or not had_work, "a step that did nothing"
        assert len(self.backend.under_way) <= 1
        self.check_rows()
        self.core.check()
        self.backend.check_free(self.core.cache._pages.free_pages())

    def abort(self, pick: int) -> None:
        super().abort(pick)
        self.backend.check_free(self.core.cache._pages.free_pages())


TestOverlap = OverlapMachine.TestCase
TestOverlap.settings = examples(60, 40)


class SpeculatingOverlapMachine(OverlapMachine):
    """Requests whose tokens are guessed, which are waited for, beside others, which are not."""

    def make_core(self, settings: dict[str, Any]) -> EngineCore:
        return rig(make_late_core(self.backend, speculation="prompt_lookup", **settings))

    def add_one(self, prompt: list[int], params: SamplingParams, kind: str) -> None:
        if len(self.answers) % 3:
            params = replace(params, speculative="off")
        super().add_one(prompt, params, kind)


TestSpeculatingOverlap = SpeculatingOverlapMachine.TestCase
TestSpeculatingOverlap.settings = examples(50, 40)


@given(
    st.integers(0, 1 << 32), engine_settings, st.sampled_from([1, 4, 16]), st.sampled_from([64, 96, 200, 480])
)
@examples(40)
def test_forty_requests_at_random(
    seed: int, settings: dict[str, Any], page_size: int, pool_tokens: int
) -> None:
    """Random arrivals, lengths, seeds and aborts in a small pool: answers are those without overlap."""
    chance = random.Random(seed)
    backend = LateBackend(pool_tokens // page_size, page_size, CONTEXT)
    backend.chance, backend.revises = random.Random(seed), chance.choice([0.0, 0.1])
    core = make_late_core(backend, **settings)
    forty_at_random(Driver(core), chance, lambda: backend.check_free(core.cache._pages.free_pages()))
    assert core.counters.overlapped_steps == backend.ahead
