"""A device with room for little: the same answers as with room for all, and every request ends once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.backend.step import OUT_OF_MEMORY, SequenceResult, SequenceStep
from mini_sglang.engine.drafts import Drafts
from mini_sglang.engine.scheduler import Scheduled
from mini_sglang.engine.speculation import TREE
from mini_sglang.engine.step_size import StepSize
from mini_sglang.errors import OutOfMemoryError
from mini_sglang.types import FinishReason, SamplingParams
from tests.engine.fake_backend import POISON, Driver, FakeBackend, examples, make_core, reference, turns

Measure = Callable[[Sequence[SequenceStep]], int]


def tokens_of(steps: Sequence[SequenceStep]) -> int:
    return sum(max(1, len(step.token_ids)) for step in steps)


MEASURES: dict[str, Measure] = {
    "tokens": tokens_of,
    "sequences": len,
    "choices": lambda steps: sum(len(step.draft_samples) + (step.sample is not None) for step in steps),
    "longest": lambda steps: max(step.start + len(step.token_ids) for step in steps),
    "context": lambda steps: sum(step.start + len(step.token_ids) for step in steps),
}


@dataclass
class TightBackend(FakeBackend):
    """Raises where a call measures more than ``room``, after scribbling over all that it was to write."""

    room: int = 1 << 30
    measure: Measure = tokens_of
    loses_past: bool = False
    sizes: list[int] = field(default_factory=list)
    failures: int = 0
    freed: int = 0

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        self.sizes.append(self.measure(steps))
        if self.measure(steps) <= self.room:
            return super().run(steps)
        self.failures += 1
        for step in steps:
            first = 0 if self.loses_past else step.start
            for position in range(first, step.start + len(step.token_ids)):
                self.slots[self._slot(step, position)] = (POISON, -1, -1)
            if step.keep_logits is not None:
                self.logits[step.keep_logits] = POISON
        raise OutOfMemoryError("no room", past_lost=self.loses_past)

    def free_memory(self) -> None:
        self.freed += 1


def driver_with(backend: TightBackend, **settings: object) -> Driver:
    return Driver(make_core(backend, **settings))


def backend_of(driver: Driver) -> TightBackend:
    backend = driver.core._backend
    assert isinstance(backend, TightBackend)
    return backend


PROMPT = [7, 3, 22, 14, 9, 31, 5, 18, 2, 27, 11, 36]


@st.composite
def loads(draw: st.DrawFn) -> list[tuple[list[int], SamplingParams, int]]:
    """Requests, and the step before which each arrives."""
    found = []
    for _ in range(draw(st.integers(1, 7))):
        length = draw(st.integers(1, 30))
        shared = draw(st.integers(0, length))
        prompt = [(i * 7 + 3) % 38 + 2 for i in range(shared)]
        prompt += draw(st.lists(st.integers(2, 39), min_size=length - shared, max_size=length - shared))
        params = SamplingParams(
            max_new_tokens=draw(st.integers(1, 12)),
            temperature=draw(st.sampled_from((0.0, 0.8))),
            seed=5,
            ignore_eos=draw(st.booleans()),
            logprobs=draw(st.booleans()),
            prompt_logprobs=draw(st.booleans()),
            repetition_penalty=draw(st.sampled_from((1.0, 1.2))),
            speculative=draw(st.sampled_from(("off", "on"))),
        )
        found.append((prompt, params, draw(st.integers(0, 8))))
    return found


def serve(driver: Driver, load: list[tuple[list[int], SamplingParams, int]]) -> list[str]:
    names: dict[int, str] = {}
    for step in range(9):
        for index, (prompt, params, at) in enumerate(load):
            if at == step:
                names[index] = driver.add(prompt, params)
        driver.step()
    driver.drain()
    stats = driver.core.stats()
    assert stats["kv_tokens_private"] == 0 and not driver.core.scheduler.running
    return [names[index] for index in range(len(load))]


@given(
    load=loads(),
    room=st.integers(0, 60),
    measure=st.sampled_from(sorted(MEASURES)),
    settings=st.fixed_dictionaries(
        {
            "chunked_prefill": st.booleans(),
            "prefill_chunk_size": st.sampled_from((3, 8, 512)),
            "max_batch_size": st.sampled_from((2, 64)),
            "prefill_cache_size": st.sampled_from((0, 1, 8)),
            "prefix_cache": st.booleans(),
        }
    ),
    num_pages=st.sampled_from((16, 64)),
)
@examples(60)
def test_answers_are_those_of_a_device_with_room_for_all(
    load: list[tuple[list[int], SamplingParams, int]],
    room: int,
    measure: str,
    settings: dict[str, object],
    num_pages: int,
) -> None:
    driver = driver_with(TightBackend(num_pages, 4, room=room, measure=MEASURES[measure]), **settings)
    for name, (prompt, params, _) in zip(serve(driver, load), load, strict=True):
        answer, expected = driver.answers[name], reference(prompt, params, seed=5)
        if answer.finish is FinishReason.ERROR:
            # Where one token of one sequence fits nothing fails, but for the length of its context.
            assert measure in ("longest", "context") or room == 0
            assert "no room for a step" in (answer.error or "")
            assert answer.token_ids == expected.token_ids[: len(answer.token_ids)]
            continue
        assert (answer.token_ids, answer.finish) == (expected.token_ids, expected.finish)
        assert answer.logprobs == expected.logprobs and answer.prompt_logprobs == expected.prompt_logprobs
    backend = backend_of(driver)
    assert driver.core.stats()["out_of_memory"] == backend.failures == backend.freed


@given(load=loads(), room=st.integers(0, 60), measure=st.sampled_from(("tokens", "sequences", "context")))
@examples(40)
def test_sequences_whose_past_is_lost_are_computed_again(
    load: list[tuple[list[int], SamplingParams, int]], room: int, measure: str
) -> None:
    """As with one cache per request."""
    backend = TightBackend(
        64,
        4,
        room=room,
        measure=MEASURES[measure],
        loses_past=True,
        shares_prefixes=False,
        copies_pages=False,
    )
    driver = driver_with(backend)
    for name, (prompt, params, _) in zip(serve(driver, load), load, strict=True):
        answer, expected = driver.answers[name], reference(prompt, params, seed=5)
        if answer.finish is FinishReason.ERROR:
            assert measure == "context" or room == 0 or measure == "tokens"
        else:
            assert (answer.token_ids, answer.finish) == (expected.token_ids, expected.finish)


def test_the_size_that_failed_is_not_tried_again_at_once() -> None:
    driver = driver_with(TightBackend(128, 4, room=10), max_batch_size=16)
    for start in range(16):
        driver.add([start + 2, 5, 9], SamplingParams(max_new_tokens=30, ignore_eos=True))
    driver.step()
    backend = backend_of(driver)
    first = backend.failures
    assert first == 3 and driver.core.stats()["step_tokens_limit"] == 6  # 48 tokens, then 24, 12 and 6
    driver.step(8)
    assert backend.failures == first and max(backend.sizes[first:]) <= 6
    driver.drain()
    # Looked for again, ever less often.
    assert backend.failures < first + 5
    assert all(answer.finish is FinishReason.LENGTH for answer in driver.answers.values())


def test_a_device_that_has_room_again_gets_whole_batches_again() -> None:
    driver = driver_with(TightBackend(256, 4, room=4), max_batch_size=16)
    for start in range(16):
        driver.add([start + 2, 5], SamplingParams(max_new_tokens=60, ignore_eos=True))
    driver.step(2)
    backend_of(driver).room = 1 << 30
    driver.drain()
    assert max(backend_of(driver).sizes[-40:]) == 16
    assert driver.core.stats()["out_of_memory"] == 3


def test_one_that_never_fits_ends_alone_with_a_sentence_and_the_others_go_on() -> None:
    backend = TightBackend(64, 4, room=20, measure=MEASURES["longest"])
    driver = driver_with(backend, prefill_chunk_size=8)
    short = [driver.add(PROMPT[i:6], SamplingParams(max_new_tokens=12, ignore_eos=True)) for i in range(3)]
    long = driver.add([(7 * i) % 38 + 2 for i in range(30)], SamplingParams(max_new_tokens=4))
    kinds: dict[str, str | None] = {}
    while driver.core.has_work:
        for event in driver.core.step():
            driver.answers[event.request_id].add(event)
            if event.finish is not None:
                kinds[event.request_id] = event.error_kind
        driver.core.check()
    assert kinds == {long: OUT_OF_MEMORY, **dict.fromkeys(short)}
    error = driver.answers[long].error
    assert error is not None and "30 tokens long" in error and "KV_TOKEN_BUDGET" in error
    for i, name in enumerate(short):
        expected = reference(PROMPT[i:6], SamplingParams(max_new_tokens=12, ignore_eos=True))
        assert driver.answers[name].token_ids == expected.token_ids
    stats = driver.core.stats()
    assert stats["failed"] == 1 and stats["finished"] == 3 and stats["retractions"] == 2


def test_a_device_without_any_room_ends_every_request_and_serves_later_ones() -> None:
    driver = driver_with(TightBackend(64, 4, room=0))
    names = [driver.add(PROMPT[start:], SamplingParams(max_new_tokens=5)) for start in range(4)]
    driver.drain()
    assert all(driver.answers[name].finish is FinishReason.ERROR for name in names)
    assert driver.core.scheduler.max_running == 1
    backend_of(driver).room = 1 << 30
    answer = driver.run(PROMPT, SamplingParams(max_new_tokens=5))
    assert answer.token_ids == reference(PROMPT, SamplingParams(max_new_tokens=5)).token_ids
    # A few at a time at first, then as many as there are.
    params = SamplingParams(max_new_tokens=100, ignore_eos=True)
    names = [driver.add(PROMPT[start:], params) for start in range(8)]
    driver.drain()
    assert driver.core.scheduler.max_running > 4


def limited(driver: Driver, tokens: int) -> None:
    driver.core.recovery.size.failed(2 * tokens)


def test_the_logits_of_a_prompt_that_was_cut_are_kept_in_the_step_that_has_its_end() -> None:
    driver = driver_with(TightBackend(64, 4))
    limited(driver, 9)  # into the prompt's last page, but not to its end
    params = SamplingParams(max_new_tokens=5)
    expected = reference(PROMPT[:10], params).token_ids
    first = driver.add(PROMPT[:10], params)
    driver.step()
    # There are none yet for one that comes now.
    second = driver.add(PROMPT[:10], params)
    driver.drain()
    assert driver.answers[first].token_ids == driver.answers[second].token_ids == expected
    assert driver.core.stats()["prefill_cache_hits"] == 0
    assert driver.run(PROMPT[:10], params).token_ids == expected
    assert driver.core.stats()["prefill_cache_hits"] == 1


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("kept_first", [True, False])
def test_kept_logits_are_read_before_others_take_their_place(fails: bool, kept_first: bool) -> None:
    """Or, where a failed call may have written over them, the prompt is computed again."""
    backend = TightBackend(64, 4)
    driver = driver_with(backend, prefill_cache_size=1)
    params = SamplingParams(max_new_tokens=5)
    known, new = PROMPT[:10], PROMPT[3:]
    driver.run(known, params)
    if fails:
        backend.room = 6
    else:
        limited(driver, len(new))
    names = [driver.add(prompt, params) for prompt in ((known, new) if kept_first else (new, known))]
    driver.step()
    backend.room = 1 << 30
    driver.drain()
    expected = [reference(prompt, params).token_ids for prompt in (known, new)]
    answers = [driver.answers[name].token_ids for name in names]
    assert answers == (expected if kept_first else expected[::-1])
    assert backend.failures == fails


@pytest.mark.parametrize("limit", [1, 3, 7])
def test_drafts_that_are_dropped_leave_no_pages_behind(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = driver_with(TightBackend(64, 4))
    speculator = driver.core.speculator
    params = SamplingParams(max_new_tokens=30, ignore_eos=True, speculative="on")
    expected = reference(PROMPT, params)

    def propose(plan: Sequence[Scheduled]) -> bool:
        """The right tokens, then wrong ones."""
        for item in plan:
            request = item.request
            if item.num_tokens == 1 and request.num_output:
                drafts = Drafts(request, 6, TREE)
                drafts.fill([*expected.token_ids[request.num_output :][:2], 7, 7, 7, 7])
                speculator._give(item, drafts)
        return True

    monkeypatch.setattr(speculator, "propose", propose)
    limited(driver, limit)
    name = driver.add(PROMPT, params)
    for _ in turns():
        driver.step()
        if not driver.core.has_work:
            break
        (request,) = driver.core.scheduler.running
        assert len(request.pages) <= driver.core.cache.pages_for(len(request.tokens))
    assert driver.answers[name].token_ids == expected.token_ids
    assert driver.core.stats()["draft_tokens_accepted"] > 0 or limit == 1
    assert max(backend_of(driver).sizes) <= 2 * limit


def test_a_failure_of_another_kind_within_the_parts_fails_the_step() -> None:
    driver = driver_with(TightBackend(64, 4, room=4))
    backend_of(driver).fail_at = {1}  # the second of the calls that run
    names = [driver.add(PROMPT[start : start + 3], SamplingParams(max_new_tokens=5)) for start in range(4)]
    driver.drain()
    assert all("device failure" in (driver.answers[name].error or "") for name in names)
    assert driver.run(PROMPT, SamplingParams(max_new_tokens=5)).finish is not FinishReason.ERROR


def test_a_size_is_lowered_by_half_and_raised_slowly_and_ever_more_so() -> None:
    size = StepSize()
    size.failed(100)
    size.failed(50)
    assert size.limit == 25
    waits = []
    for _ in range(4):
        calls = 0
        while size.limit == 25:
            size.ran(25)
            calls += 1
        assert size.limit == 50
        size.failed(50)
        waits.append(calls)
    assert waits == [32, 64, 128, 256]


@pytest.mark.parametrize("before", [None, 64])
def test_a_size_comes_back_by_doubling_where_one_sequence_was_to_blame(before: int | None) -> None:
    size = StepSize()
    if before is not None:
        size.failed(2 * before)
        size.ran(before)
    for tokens in (8, 4, 2):
        size.failed(tokens)
    size.refused()
    assert size.limit == 1
    for expected in (2, 4, 8, 16, 32, 64):
        size.ran(1)
        assert size.limit == expected
    size.ran(1)
    assert size.limit == (128 if before is None else 64)
