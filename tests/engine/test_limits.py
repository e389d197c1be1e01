"""What a model can be asked, decided without the engine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.limits import make_prefix_work, make_work
from mini_sglang.errors import ContextLengthError, InvalidValueError
from mini_sglang.types import SamplingParams

from .fake_backend import FakeBackend, make_core
from .fake_handles import INFO

SMALL = replace(INFO, context_length=64, max_sequence_tokens=50)


def settings(**overrides: object) -> Settings:
    return Settings.resolve({"max_context_margin": 4, **overrides}, {})


def test_every_limit_is_that_of_the_engine() -> None:
    core = make_core(FakeBackend(12, 4, context_length=64), max_context_margin=4)
    info = replace(SMALL, max_sequence_tokens=core.max_sequence_tokens)
    assert core.info.max_sequence_tokens == 48 == core.info.kv_tokens
    assert (core.info.vocab_size, core.info.page_size, core.info.eos_ids) == (40, 4, (0, 1))
    for num_prompt in range(1, 52):
        for max_new_tokens in (1, 20, 200):
            outcomes = []
            for ask in (core.make_request, lambda *given: make_work(info, settings(), *given)):
                try:
                    outcomes.append(
                        ask(
                            "r", [2] * num_prompt, SamplingParams(max_new_tokens=max_new_tokens)
                        ).max_new_tokens
                    )
                except ContextLengthError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize(
    "num_prompt, asked, capped", [(10, 5, 5), (10, 36, 36), (10, 37, 36), (48, 9, 1), (49, 9, 1)]
)
def test_max_new_tokens_is_capped_by_context_and_margin(num_prompt: int, asked: int, capped: int) -> None:
    work = make_work(SMALL, settings(), "r", [2] * num_prompt, SamplingParams(max_new_tokens=asked))
    assert work.max_new_tokens == capped and work.params.max_new_tokens == asked


def test_a_prompt_that_leaves_no_room_is_refused() -> None:
    with pytest.raises(ContextLengthError, match=r"50 tokens.*shorter than the context, 50 tokens"):
        make_work(SMALL, settings(), "r", [2] * 50, SamplingParams())
    with pytest.raises(ContextLengthError, match="max_new_tokens is 41; it must be at most 40"):
        exact = settings(aggressive_max_new_tokens=False)
        make_work(SMALL, exact, "r", [2] * 10, SamplingParams(max_new_tokens=41))


@pytest.mark.parametrize(
    "prompt, more, field",
    [
        ([], {}, "prompt"),
        ([2, 40], {}, "prompt"),
        ([2, -1], {}, "prompt"),
        ([True], {}, "prompt"),
        ([2.0], {}, "prompt"),
        ([2], {"stop_token_ids": (40,)}, "stop_token_ids"),
        ([2], {"logit_bias": {40: 1.0}}, "logit_bias"),
    ],
)
def test_ids_outside_the_vocabulary_are_named(prompt: list[int], more: dict[str, object], field: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        make_work(SMALL, settings(), "r", prompt, SamplingParams(**more))  # type: ignore[arg-type]
    assert caught.value.field == field


def test_a_seed_is_drawn_where_none_was_given_and_kept_where_one_was() -> None:
    drawn = {make_work(SMALL, settings(), "r", [2], SamplingParams()).seed for _ in range(8)}
    assert len(drawn) == 8 and None not in drawn
    assert make_work(SMALL, settings(), "r", [2], SamplingParams(seed=-3)).seed == -3


def test_work_that_fills_the_cache_needs_a_cache_that_takes_it() -> None:
    work = make_prefix_work(SMALL, settings(), "r", [2] * 50, "tenant")
    assert (work.prefill_only, work.max_new_tokens, work.namespace) == (True, 0, "tenant")
    with pytest.raises(InvalidValueError, match="PREFIX_CACHE"):
        make_prefix_work(SMALL, settings(prefix_cache=False), "r", [2])
    with pytest.raises(InvalidValueError, match=r"at most 8 tokens \(PREFIX_CACHE_MAX_TOKENS"):
        make_prefix_work(SMALL, settings(prefix_cache_max_tokens=8), "r", [2] * 9)
    with pytest.raises(ContextLengthError, match="at most the context, 50 tokens"):
        make_prefix_work(SMALL, settings(), "r", [2] * 51)


@pytest.mark.parametrize(
    "asked, inflight, given, by",
    [
        (20, 0, 20, None),
        (20, 2, 20, None),  # as many as there are engines
        (20, 3, 10, "load"),
        (20, 300, 10, "load"),  # once, however many there are
        (1, 3, 1, None),
        (9, 3, 4, "load"),  # rounded down
        (100, 2, 36, "context"),
        (100, 3, 36, "context"),  # half of 100 is more than the context leaves
        (60, 3, 30, "load"),
    ],
)
def test_many_in_flight_leave_a_request_a_part_of_what_it_asked_for(
    asked: int, inflight: int, given: int, by: str | None
) -> None:
    adaptive = {
        "adaptive_max_new_tokens": True, "adaptive_max_new_tokens_factor": 0.5, "num_engines": 2,
    }  # fmt: skip
    params = SamplingParams(max_new_tokens=asked)

    def ask(**changes: object) -> tuple[int, str | None]:
        work = make_work(SMALL, settings(**adaptive | changes), "r", [2] * 10, params, inflight=inflight)
        return work.max_new_tokens, work.capped_by

    assert ask() == (given, by)
    off = (36, "context") if asked > 36 else (asked, None)
    assert ask(adaptive_max_new_tokens=False) == off
    assert ask(adaptive_max_inflight_threshold=300) == off
    assert ask(adaptive_max_new_tokens_factor=1) == off


@pytest.mark.parametrize("factor, given", [(0.29, 29), (0.8, 80), (0.01, 1), (0.999, 99)])
def test_a_factor_is_taken_as_it_is_written(factor: float, given: int) -> None:
    adaptive = settings(adaptive_max_new_tokens=True, adaptive_max_new_tokens_factor=factor)
    room = replace(INFO, max_sequence_tokens=4096)
    params = SamplingParams(max_new_tokens=100)
    assert make_work(room, adaptive, "r", [2], params, inflight=2).max_new_tokens == given


def test_what_does_not_fit_is_refused_under_load_too() -> None:
    exact = settings(aggressive_max_new_tokens=False, adaptive_max_new_tokens=True)
    with pytest.raises(ContextLengthError, match="max_new_tokens is 41"):
        make_work(SMALL, exact, "r", [2] * 10, SamplingParams(max_new_tokens=41), inflight=9)


def test_caps_are_counted() -> None:
    core = make_core(FakeBackend(12, 4, context_length=48), adaptive_max_new_tokens=True)
    for name, asked, inflight in [("a", 10, 1), ("b", 10, 2), ("c", 100, 1)]:
        params = SamplingParams(max_new_tokens=asked)
        core.add(core.make_request(name, [2, 3], params, inflight=inflight))
    stats = core.stats()
    assert (stats["capped_by_load"], stats["capped_by_context"]) == (1, 1)
