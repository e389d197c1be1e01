"""A device with room for little while a step is always under way: the same answers as with room for all."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.engine.request import Request
from mini_sglang.errors import OutOfMemoryError
from mini_sglang.types import FinishReason

from .fake_backend import POISON, Answer, Driver, examples, reference, turns
from .late_backend import LateBackend, make_late_core
from .test_load import CODES, CONTEXT, check_locks, engine_settings, sampling_params


@pytest.fixture(autouse=True, scope="module")
def quiet() -> Iterator[None]:
    logging.disable(logging.ERROR)
    yield
    logging.disable(logging.NOTSET)


@dataclass
class TightLateBackend(LateBackend):
    """Fails where a step has more than ``room`` tokens, after scribbling over what it was to write."""

    room: int = 1 << 30
    failed_under_way: int = 0

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        self._squeeze(steps)
        return super().run(steps)

    def run_now(
        self, steps: list[SequenceStep], owners: list[Request | None], lost: set[Request]
    ) -> list[SequenceResult]:
        try:
            self._squeeze(steps)
        except OutOfMemoryError:
            self.failed_under_way += 1
            raise
        return super().run_now(steps, owners, lost)

    def _squeeze(self, steps: Sequence[SequenceStep]) -> None:
        if sum(max(1, len(step.token_ids)) for step in steps) <= self.room:
            return
        for step in steps:
            for slot in self._writes(step):
                self.slots[slot] = (POISON, -1, -1)
            if step.keep_logits is not None:
                self.logits[step.keep_logits] = POISON
        raise OutOfMemoryError("no room")


def serve(backend: TightLateBackend, settings: dict[str, Any], seed: int) -> tuple[Driver, dict[str, Answer]]:
    """Twenty requests with random arrivals, and some aborted; gives what each would answer alone."""
    chance = random.Random(seed)
    driver = Driver(make_late_core(backend, **settings))
    stems = [[2 + chance.randrange(8) for _ in range(CONTEXT)] for _ in range(3)]
    wanted: dict[str, Answer] = {}
    room = driver.core.max_sequence_tokens - 1
    for _ in turns():
        if len(wanted) == 20 and not driver.core.has_work:
            break
        while len(wanted) < 20 and chance.random() < 0.3:
            prompt = [*chance.choice(stems)[: chance.randrange(40)], 2 + chance.randrange(3)][:room]
            params = sampling_params(chance.randrange(CODES))
            name = driver.add(prompt, params)
            new = min(params.max_new_tokens, driver.core.max_sequence_tokens - len(prompt))
            wanted[name] = reference(prompt, params, max_new_tokens=new, seed=params.seed or 0)
        if wanted and chance.random() < 0.02:
            driver.abort(chance.choice(list(wanted)))
        driver.step()
        backend.check_free(driver.core.cache._pages.free_pages())
    driver.core.cache.settle()
    check_locks(driver.core)
    assert driver.core.cache.num_available == driver.core.cache.num_pages
    return driver, wanted


@given(st.integers(0, 1 << 32), engine_settings, st.sampled_from([1, 4, 16]), st.integers(0, 40))
@examples(40)
def test_answers_are_those_of_a_device_with_room_for_all(
    seed: int, settings: dict[str, Any], page_size: int, room: int
) -> None:
    backend = TightLateBackend(480 // page_size, page_size, CONTEXT, room=room)
    backend.chance, backend.revises = random.Random(seed), (seed % 2) * 0.1
    driver, wanted = serve(backend, settings, seed)
    for name, alone in wanted.items():
        answer = driver.answers[name]
        if answer.finish is FinishReason.ABORT:
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
        elif answer.finish is FinishReason.ERROR:
            assert room == 0 and answer.error is not None and "out of memory" in answer.error
        else:
            assert replace(answer, cached_tokens=0) == alone


def test_a_step_that_fails_under_way_goes_on_in_parts_and_later_ones_are_cut_before() -> None:
    backend = TightLateBackend(256, 4, CONTEXT, room=9)
    backend.revises = backend.refuses = 0.0
    driver, wanted = serve(backend, {"max_batch_size": 64}, 3)
    stats = driver.core.stats()
    assert backend.failed_under_way >= 1 and stats["out_of_memory"] >= backend.failed_under_way
    # Every one that failed taught the size: not one for each step.
    assert backend.failed_under_way < stats["steps"] // 4
    assert stats["failed"] == 0 and stats["overlapped_steps"] > 0
    assert len(wanted) == 20
