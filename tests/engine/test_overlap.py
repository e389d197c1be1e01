"""A step under way while the next is planned: what ends, fails, waits and is counted, and when."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import pytest

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.engine.overlap import UNKNOWN
from mini_sglang.engine.request import Request
from mini_sglang.engine.scheduler import Scheduler
from mini_sglang.errors import BackendLostError
from mini_sglang.types import Adapter, FinishReason, SamplingParams

from .fake_backend import EOS_IDS, Answer, Driver, reference
from .late_backend import LateBackend, LateFlight, make_late_core
from .test_adapters import FakeStore
from .test_grammar_requests import Backend as GrammarBackend
from .test_grammar_requests import grammar, rising
from .test_speculation import rig

PROMPT = [2 + i % 9 for i in range(40)]


def params(max_new_tokens: int = 10, **others: object) -> SamplingParams:
    others.setdefault("ignore_eos", True)
    return SamplingParams(max_new_tokens=max_new_tokens, **others)  # type: ignore[arg-type]


def backend_with(num_pages: int = 64, **more: object) -> LateBackend:
    return LateBackend(num_pages, 4, 128, revises=0.0, refuses=0.0, **more)  # type: ignore[arg-type]


def driver_with(backend: LateBackend | None = None, **settings: object) -> Driver:
    return Driver(make_late_core(backend or backend_with(), **settings))


def late(driver: Driver) -> LateBackend:
    backend = driver.core._backend
    assert isinstance(backend, LateBackend)
    return backend


class Lazy(random.Random):
    """Lets no step run before it is waited for."""

    def random(self) -> float:
        return 0.5


def told(answer: Answer) -> Answer:
    """The answer, wherever its prompt came from."""
    return replace(answer, cached_tokens=0)


def plain(prompt: Sequence[int], wanted: SamplingParams, **more: int) -> Answer:
    return reference(prompt, wanted, seed=wanted.seed or 0, **more)


def test_the_next_step_is_submitted_before_the_last_ones_tokens_are_taken() -> None:
    driver = driver_with()
    name = driver.add(PROMPT[:6], params(5))
    driver.step()
    assert driver.answers[name].token_ids == [] and late(driver).submitted == 1
    for count in range(1, 5):
        driver.step()
        assert len(driver.answers[name].token_ids) == count and late(driver).submitted == count + 1
    driver.step()  # the fifth token is known to be the last
    assert driver.answers[name] == plain(PROMPT[:6], params(5))
    assert late(driver).submitted == 5 and not driver.core.has_work
    stats = driver.core.stats()
    assert (stats["steps"], stats["overlapped_steps"], stats["overlap_dropped"]) == (5, 4, 0)


def test_one_that_ends_by_its_token_is_in_the_next_step_for_nothing() -> None:
    driver = driver_with()
    answer = plain(PROMPT[:6], params(30))
    at = next(i for i in range(2, 30) if answer.token_ids[i] not in answer.token_ids[:i])
    wanted = params(30, stop_token_ids=(answer.token_ids[at],))
    name = driver.add(PROMPT[:6], wanted)
    while driver.answers[name].finish is None:
        driver.step()
    assert driver.answers[name] == plain(PROMPT[:6], wanted)
    assert late(driver).submitted == at + 2 and driver.core.has_work
    cache = driver.core.cache
    # The page that the step under way writes stays where it is; the whole ones before are cached.
    private = cache.num_private
    assert private > 0 and not set(cache.limbo.pages()) & cache._pages.free_pages()
    assert driver.core.stats()["running"] == 0
    driver.step()
    assert not driver.core.has_work and cache.num_private == 0 and cache.num_available == 64
    assert driver.core.stats()["overlap_dropped"] == 1


def test_an_abort_while_a_step_is_under_way_ends_once_and_frees_when_that_is_done() -> None:
    driver = driver_with(prefix_cache=False)
    name = driver.add(PROMPT, params(20))
    other = driver.add(PROMPT[:7], params(9))
    driver.step(3)
    driver.abort(name)
    assert driver.answers[name].finish is FinishReason.ABORT
    assert driver.core.abort(name) is None
    free = driver.core.cache.num_free
    # Its name can be used at once.
    again = driver.core.make_request(name, PROMPT[:5], params(2))
    driver.core.add(again)
    driver.answers[name] = Answer()
    assert driver.core.cache.num_free == free
    driver.drain()
    assert driver.answers[name] == plain(PROMPT[:5], params(2))
    assert driver.answers[other] == plain(PROMPT[:7], params(9))
    assert driver.core.cache.num_free == 64


@pytest.mark.parametrize("k", range(14))
def test_a_step_that_raises_fails_its_requests_and_what_was_built_on_it_is_run_again(k: int) -> None:
    """Those that only the step after it has were computed for nothing, and go on."""
    backend = backend_with(fail_at={k})
    driver = driver_with(backend, chunked_prefill=True, prefill_chunk_size=8)
    prompts = {driver.add(PROMPT[:n], params(6)): PROMPT[:n] for n in (9, 5)}
    driver.step(3)
    prompts[driver.add(PROMPT[7:28], params(4))] = PROMPT[7:28]
    driver.step()
    steps: list[set[str]] = []
    submit = backend.submit

    def noted(given: Sequence[SequenceStep]) -> LateFlight:
        flight = submit(given)
        steps.append({owner.request_id for owner in flight.owners if owner is not None})
        return flight

    backend.submit = noted  # type: ignore[method-assign]
    driver.drain()
    failed = {name for name, answer in driver.answers.items() if answer.finish is FinishReason.ERROR}
    for name, prompt in prompts.items():
        answer, alone = driver.answers[name], plain(prompt, params(4 if len(prompt) == 21 else 6))
        if name in failed:
            assert answer.error is not None and f"device failure at call {k}" in answer.error
            assert answer.token_ids == alone.token_ids[: len(answer.token_ids)]
        else:
            assert answer == alone
    assert bool(failed) == (k < backend.calls)
    assert driver.core.cache.num_available == 64


def test_only_the_requests_of_the_failed_step_fail() -> None:
    backend = backend_with(fail_at={2})
    driver = driver_with(backend)
    first = driver.add(PROMPT[:6], params(8))
    driver.step(3)  # the third step is under way
    second = driver.add(PROMPT[10:16], params(5))
    driver.step()  # it was planned before the third was known to have failed
    assert driver.answers[first].finish is FinishReason.ERROR
    assert driver.answers[second].finish is None
    assert late(driver).submitted == 5  # it is in one again
    driver.drain()
    assert driver.answers[second] == plain(PROMPT[10:16], params(5))
    assert driver.core.stats()["failed"] == 1


def test_a_model_that_cannot_go_back_begins_again_what_was_thrown_away() -> None:
    class Forward(LateBackend):
        """Takes a request's positions in one direction, as a state does; begins again at 0."""

        def run_now(self, steps: list[SequenceStep], owners: list[Request | None], *more: object) -> object:  # type: ignore[override]
            for step, owner in zip(steps, owners, strict=True):
                assert owner is not None
                assert step.start in (0, self.reached.get(owner)), "a step back"
                self.reached[owner] = step.start + len(step.token_ids)
            return super().run_now(steps, owners, *more)  # type: ignore[arg-type]

    backend = Forward(64, 4, 128, revises=0.0, refuses=0.0, shares_prefixes=False, fail_at={1})
    backend.reached = {}  # type: ignore[attr-defined]
    driver = driver_with(backend, chunked_prefill=True, prefill_chunk_size=8)
    first = driver.add(PROMPT[:30], params(3))
    driver.step()
    # All of the second step, which fails, and half of the third, which has the next chunk of the first too.
    second = driver.add(PROMPT[:12], params(3, priority=7))
    driver.drain()
    assert driver.answers[second].finish is FinishReason.ERROR
    assert driver.answers[first] == plain(PROMPT[:30], params(3))
    assert driver.core.stats()["retractions"] == 1


def test_a_row_that_is_not_finite_ends_its_request_alone() -> None:
    driver = driver_with(backend_with(nan_at={2: 0}))
    bad, good = driver.add(PROMPT[:6], params(8)), driver.add(PROMPT[:9], params(8))
    driver.drain()
    assert driver.answers[bad].finish is FinishReason.ERROR and len(driver.answers[bad].token_ids) == 2
    assert driver.answers[good] == plain(PROMPT[:9], params(8))
    assert driver.core.stats()["overlap_dropped"] == 1


def test_what_the_backend_refuses_to_submit_is_run_alone() -> None:
    backend = backend_with()
    driver = driver_with(backend)
    names = [driver.add(PROMPT[:n], params(12)) for n in (5, 8)]
    driver.step(3)
    backend.refuses = 1.0
    driver.step()
    assert not backend.under_way and backend.submitted == 3
    driver.step()
    assert backend.submitted == 3
    backend.refuses = 0.0
    driver.drain()
    assert [driver.answers[name] for name in names] == [plain(PROMPT[:n], params(12)) for n in (5, 8)]


def test_a_lost_backend_ends_the_engine() -> None:
    class Lost(LateBackend):
        def run_now(self, *args: object) -> list[SequenceResult]:
            if self.submitted > 2:
                raise BackendLostError("it is gone")
            return super().run_now(*args)  # type: ignore[arg-type]

    driver = driver_with(Lost(64, 4, 128, revises=0.0, refuses=0.0))
    driver.add(PROMPT, params(9))
    with pytest.raises(BackendLostError, match="it is gone"):
        driver.step(5)


@pytest.mark.parametrize(
    "wanted",
    [
        params(6, presence_penalty=0.5),
        params(6, repetition_penalty=1.5),
        params(6, speculative="prompt_lookup"),
        params(6, prompt_logprobs=True, top_logprobs=2),
        grammar(30),
    ],
    ids=["presence", "repetition", "speculative", "prompt logprobs", "grammar"],
)
def test_who_needs_the_newest_token_is_waited_for_while_it_runs(wanted: SamplingParams) -> None:
    class Both(LateBackend, GrammarBackend):
        pass

    driver = driver_with(Both(64, 4, 128, revises=0.0, refuses=0.0), prefill_cache_size=0)
    core = driver.core
    core._grammars._factory = rising
    if wanted.speculative:
        rig(core)
    name = driver.add(PROMPT[:9], wanted)
    counts: list[int] = []
    while driver.answers[name].finish is None:
        driver.step()
        counts.append(core.counters.overlapped_steps)
    if wanted.prompt_logprobs:
        assert counts[:2] == [0, 0] and counts[-1] > 0  # they are done with the first token
    else:
        assert counts[-1] == 0
    if wanted.regex is None:
        assert driver.answers[name] == plain(PROMPT[:9], wanted)
    # Not for ever.
    assert told(driver.run(PROMPT[:9], params(5))) == plain(PROMPT[:9], params(5))
    assert core.counters.overlapped_steps >= 4


def test_sampling_logprobs_and_minimum_lengths_need_no_waiting() -> None:
    wanted = params(20, temperature=0.8, seed=5, logprobs=True, min_new_tokens=9, ignore_eos=False)
    driver = driver_with()
    assert driver.run(PROMPT[:9], wanted) == plain(PROMPT[:9], wanted)
    assert driver.core.counters.overlapped_steps >= 9


def test_a_token_that_turns_out_to_be_another_undoes_the_step_that_took_it() -> None:
    backend = backend_with()
    driver = driver_with(backend)
    names = [driver.add(PROMPT[:n], params(12)) for n in (5, 8)]
    driver.step(3)
    backend.revises = 1.0
    driver.step()
    backend.revises = 0.0
    driver.drain()
    assert [driver.answers[name] for name in names] == [plain(PROMPT[:n], params(12)) for n in (5, 8)]
    assert driver.core.stats()["overlap_dropped"] == 2


def test_planning_ahead_retracts_nobody() -> None:
    """The pool is too small for both: the step under way is waited for, and only then is one set back."""
    backend = backend_with(8)
    driver = driver_with(backend, prefix_cache=False)
    scheduler, retractions = driver.core.scheduler, []
    ahead, retract = scheduler.schedule_ahead, scheduler.retract

    def noted(*args: object) -> object:
        before = scheduler.num_retractions
        plan = ahead(*args)  # type: ignore[arg-type]
        assert scheduler.num_retractions == before
        return plan

    scheduler.schedule_ahead = noted  # type: ignore
    scheduler.retract = lambda request: (  # type: ignore
        retractions.append((len(backend.under_way), request.flights, UNKNOWN in request.tokens)),
        retract(request),
    )
    names = [driver.add(PROMPT[:n], params(16)) for n in (9, 8)]
    driver.drain()
    assert [driver.answers[name] for name in names] == [plain(PROMPT[:n], params(16)) for n in (9, 8)]
    assert retractions and set(retractions) == {(0, 0, False)}


def test_a_prompt_waits_for_the_same_prefix_that_a_step_under_way_computes() -> None:
    long = [2 + i % 7 for i in range(36)]
    driver = driver_with(chunked_prefill=True, prefill_chunk_size=64)
    first = driver.add([*long, 3], params(6))
    driver.step()
    second = driver.add([*long, 4], params(6))
    driver.drain()
    assert driver.answers[second].cached_tokens == 36
    assert driver.answers[first].token_ids == plain([*long, 3], params(6)).token_ids
    assert driver.answers[second].token_ids == plain([*long, 4], params(6)).token_ids


@pytest.mark.parametrize("chunk", [512, 5])
def test_whole_prompts_are_kept_and_started_from_while_steps_are_under_way(chunk: int) -> None:
    driver = driver_with(backend_with(chance=Lazy()), prefill_cache_size=4, prefill_chunk_size=chunk)
    for n in (9, 8, 23):
        expected = plain(PROMPT[:n], params(7))
        assert told(driver.run(PROMPT[:n], params(7))) == expected
        warm = driver.run(PROMPT[:n], params(7))
        assert warm.token_ids == expected.token_ids and warm.cached_tokens == n
    assert driver.core.stats()["prefill_cache_hits"] == 3


def test_warm_prefixes_are_computed() -> None:
    driver = driver_with(prefill_chunk_size=8)
    driver.core.insert_prefix(PROMPT[:24])
    name = driver.add(PROMPT[:6], params(3))
    driver.drain()
    assert driver.core.stats()["warm_prefixes_done"] == 1 and not driver.core.has_work
    assert driver.answers[name] == plain(PROMPT[:6], params(3))
    assert driver.run(PROMPT[:30], params(2)).cached_tokens == 24


def test_each_start_is_told_before_its_step_and_once() -> None:
    backend = backend_with()
    driver = driver_with(backend)
    starts: list[tuple[int, list[str]]] = []
    driver.core.on_start = lambda names: starts.append((backend.submitted, list(names)))
    first = driver.add(PROMPT[:6], params(6))
    driver.step(2)
    second = driver.add(PROMPT[:9], params(6))
    driver.drain()
    assert starts == [(0, [first]), (2, [second])]


def test_adapters_change_only_while_no_step_is_under_way() -> None:
    backend = backend_with(chance=Lazy())
    seen: list[bool] = []

    class Store(FakeStore):
        def attach(self, prepared: object) -> int:
            seen.append(all(flight.run for flight in backend.under_way))
            return super().attach(prepared)

        def detach(self, adapter_id: int) -> None:
            seen.append(all(flight.run for flight in backend.under_way))
            super().detach(adapter_id)

    backend.adapters = Store()  # type: ignore[attr-defined]
    driver = driver_with(backend)
    a, b = Adapter("a", "/a", "f1"), Adapter("b", "/b", "f2")
    driver.core.adapters.load(a)
    name = driver.add(PROMPT[:6], params(20), adapter=a)
    driver.step(2)
    assert not all(flight.run for flight in backend.under_way)
    driver.core.adapters.load(b)
    driver.step()
    driver.core.adapters.unload(a.key)
    driver.abort(name)
    driver.drain()
    assert seen == [True, True, True] and len(driver.core.adapters) == 1


def test_closing_waits_for_what_is_under_way() -> None:
    backend = backend_with(chance=Lazy())
    driver = driver_with(backend)
    name = driver.add(PROMPT, params(9))
    driver.step(2)
    flights = list(backend.under_way)
    driver.abort(name)
    driver.core.close()
    assert flights and all(flight.run for flight in flights) and backend.closed


def test_rows_of_requests_that_are_known_to_end_go_to_those_that_wait() -> None:
    driver = driver_with(max_batch_size=1)
    names = [driver.add(PROMPT[:n], params(3)) for n in (5, 6, 7)]
    driver.drain()
    answers = [told(driver.answers[name]) for name in names]
    assert answers == [plain(PROMPT[:n], params(3)) for n in (5, 6, 7)]
    # No step between them was lost.
    assert late(driver).submitted == 9 and driver.core.stats()["overlapped_steps"] == 8


def test_the_end_of_text_is_found_as_ever() -> None:
    driver = driver_with()
    wanted = params(60, ignore_eos=False, temperature=0.9, seed=4)
    answer = driver.run(PROMPT[:7], wanted)
    assert answer == plain(PROMPT[:7], wanted)
    assert answer.matched_token_id in EOS_IDS


def test_a_scheduler_that_is_put_back_is_as_before() -> None:
    driver = driver_with()
    names = [driver.add(PROMPT[:n], params(2)) for n in (5, 6)]
    driver.step()
    scheduler: Scheduler = driver.core.scheduler
    running = list(scheduler.running)
    assert scheduler.schedule_ahead(set(running), ()) == [] and scheduler.running == running
    driver.drain()
    assert [len(driver.answers[name].token_ids) for name in names] == [2, 2]
