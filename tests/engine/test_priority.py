"""Priorities and ageing: one order for all, kept by rows, budget, pages and the pool's queue."""

from __future__ import annotations

import random
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mini_sglang.engine.handle import Work
from mini_sglang.engine.order import Line, Order, order_of
from mini_sglang.engine.request import Phase, Request
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import MAX_PRIORITY, SamplingParams

from .fake_backend import Answer, Driver, FakeBackend, examples, make_core, reference, turns
from .fake_handles import Bench, Inbox, work

PRIORITIES = st.integers(-MAX_PRIORITY, MAX_PRIORITY)


@given(
    st.tuples(st.integers(0, 10**6), PRIORITIES),
    st.tuples(st.integers(0, 10**6), PRIORITIES),
    st.integers(1, 1000),
    st.integers(10**6, 10**7),
)
@examples(300)
def test_the_order_is_that_of_priority_plus_waiting_at_any_time(
    one: tuple[int, int], other: tuple[int, int], aging: int, now: int
) -> None:
    def aged(arrival: int, priority: int) -> tuple[Fraction, int]:
        return -(priority + Fraction(now - arrival, aging)), arrival

    first, second = order_of(*one, aging, 0), order_of(*other, aging, 1)
    assert (first < second) == (aged(*one) <= aged(*other))
    strict = order_of(*one, 0, 0) < order_of(*other, 0, 1)
    assert strict == ((-one[1], one[0]) <= (-other[1], other[0]))


@dataclass(eq=False)
class Item:
    order: Order


@given(st.lists(st.tuples(st.sampled_from("aaarp"), st.integers(0, 1000)), max_size=60))
@examples(200)
def test_a_line_is_a_sorted_list(actions: list[tuple[str, int]]) -> None:
    line: Line[Item] = Line()
    twin: list[Item] = []
    for serial, (action, number) in enumerate(actions):
        if action == "a":
            item = Item((float(number % 5), 0.0, serial))
            line.add(item)
            twin = sorted([*twin, item], key=lambda one: one.order)
        elif twin and action == "r":
            line.remove(twin[number % len(twin)])
            del twin[number % len(twin)]
        elif twin:
            assert line.pop(number % len(twin)) is twin.pop(number % len(twin))
        assert list(line) == twin and len(line) == len(twin)
    with pytest.raises(ValueError, match="not in line"):
        line.remove(Item((2.5, 0.0, 0)))


# The engine.


def prompt_of(number: int, length: int) -> list[int]:
    """A prompt of its own: it shares no prefix with another's."""
    chance = random.Random(number)
    return [2 + number % 30, *(chance.randrange(2, 40) for _ in range(length - 1))]


class Timed(Driver):
    """A driver whose requests arrive when the test says."""

    def arrive(self, at: float, priority: int, length: int = 4, new: int = 4) -> Request:
        name = f"r{len(self.answers)}"
        params = SamplingParams(max_new_tokens=new, ignore_eos=True, priority=priority)
        request = self.core.make_request(name, prompt_of(len(self.answers), length), params)
        request.arrival = at
        self.core.add(request)
        self.answers[name] = Answer()
        return request


def test_rows_go_to_the_highest_priority_and_within_one_by_arrival() -> None:
    driver = Timed(make_core(FakeBackend(), max_batch_size=1))
    arrived = [driver.arrive(at, priority) for at, priority in enumerate([0, 0, 3, -1, 3, 0])]
    order = []
    for _ in turns():
        if not driver.core.has_work:
            break
        driver.step()
        order += [r for r in driver.core.scheduler.running if r not in order]
    assert [arrived.index(request) for request in order] == [2, 4, 0, 1, 5, 3]


@pytest.mark.parametrize("aging, served", [(1.0, True), (0.0, False)])
def test_a_low_priority_gets_its_turn_by_waiting_unless_ageing_is_off(aging: float, served: bool) -> None:
    """One second a step; a request of priority 10 comes as often as one can be served."""
    driver = Timed(make_core(FakeBackend(), max_batch_size=1, priority_aging_seconds=aging))
    low = driver.arrive(0.0, priority=-10)
    started = None
    for now in range(200):
        if now % 4 == 0:
            driver.arrive(float(now), priority=10)
        driver.step()
        if low.phase is not Phase.WAITING and started is None:
            started = now
    assert (started is not None) == served
    if started is not None:
        # 20 steps of priority are 20 seconds; what came before then, and no more, goes first.
        assert 20 <= started <= 28


def test_the_last_of_the_order_is_retracted_whenever_it_came() -> None:
    core = make_core(FakeBackend(12, 4), max_batch_size=4)
    driver = Timed(core)
    low, high, middle = (driver.arrive(at, priority, 8, 24) for at, priority in enumerate([-5, 5, 0]))
    set_back = []
    for _ in turns():
        if not core.has_work:
            break
        before = list(core.scheduler.running)
        driver.step()
        set_back += [request for request in before if request.phase is Phase.WAITING]
    assert set_back and set_back[0] is low and high not in set_back
    assert [driver.answers[name].token_ids for name in ("r0", "r1", "r2")] == [
        reference(request.tokens[:8], request.params).token_ids for request in (low, high, middle)
    ]


def test_the_chunks_of_a_step_go_to_the_higher_priority() -> None:
    backend = FakeBackend(64, 4)
    driver = Timed(make_core(backend, chunked_prefill=True, prefill_chunk_size=8))
    low = driver.arrive(0.0, 0, length=40)
    driver.step()
    high = driver.arrive(1.0, 5, length=20)
    rows = []
    for _ in range(4):
        driver.step()
        rows.append([row for row in backend.rows if row[1] > 1])
    assert rows == [[(0, 8)], [(8, 8)], [(16, 4), (8, 4)], [(12, 8)]]
    assert high.num_output == 2 and low.num_output == 0
    driver.drain()


def test_a_prompt_half_done_is_passed_by_those_before_it_alone() -> None:
    backend = FakeBackend(64, 4)
    driver = Timed(make_core(backend, chunked_prefill=True, prefill_chunk_size=8))
    driver.arrive(0.0, 0, length=40)
    driver.step()
    for priority in (-5, 5):
        driver.arrive(1.0, priority, length=3)
    driver.step()
    assert backend.rows == [(0, 3), (8, 5)]
    driver.drain()


def test_a_wait_before_the_engine_counts_and_equals_stay_in_line() -> None:
    core = make_core(FakeBackend(), priority_aging_seconds=1.0)

    def come(name: str, priority: int, waited: float) -> Request:
        given = Work(name, (2, 3), SamplingParams(priority=priority), 4, waited=waited)
        request = core.request_of(given)
        core.add(request)
        return request

    new, patient, fresh, twin = (
        come(*given)
        for given in [("new", 5, 0.0), ("patient", 0, 60.0), ("fresh", 0, 0.0), ("twin", 5, 30.0)]
    )
    assert list(core.scheduler.waiting) == [patient, new, twin, fresh]


load = st.lists(
    st.tuples(
        st.integers(0, 3),  # seconds after the one before
        st.sampled_from([0, 0, 0, -100, -3, 4, 100]),
        st.integers(1, 30),  # prompt
        st.integers(1, 20),  # answer
    ),
    min_size=1,
    max_size=14,
)
limits = st.fixed_dictionaries(
    {
        "chunked_prefill": st.booleans(),
        "prefill_chunk_size": st.sampled_from([1, 5, 16]),
        "max_batch_size": st.sampled_from([1, 2, 5]),
        "max_prefill_tokens": st.sampled_from([4096, 24]),
        "priority_aging_seconds": st.sampled_from([0.0, 0.01, 1.0, 5.0]),
        "prefix_cache": st.booleans(),
    }
)


@given(load, limits, st.sampled_from([12, 16, 40]), st.sampled_from([1, 4]))
@examples(150)
def test_nobody_is_set_back_or_passed_over_for_one_behind(
    arrivals: list[tuple[int, int, int, int]], settings: dict[str, Any], num_pages: int, page_size: int
) -> None:
    backend = FakeBackend(num_pages * 4 // page_size, page_size, context_length=48)
    core = make_core(backend, **settings)
    driver = Timed(core)
    arrivals = list(arrivals)
    now, requests = 0.0, []
    for _ in turns():
        while arrivals and (not core.has_work or random.Random(len(arrivals) + len(requests)).random() < 0.4):
            later, priority, length, new = arrivals.pop(0)
            now += later
            requests.append(driver.arrive(now, priority, min(length, core.max_sequence_tokens - 1), new))
        if not core.has_work:
            break
        ran, computed = list(core.scheduler.running), {id(r): r.num_computed for r in requests}
        waited = [r for r in requests if r.phase is Phase.WAITING]
        driver.step()
        running, waiting = core.scheduler.running, list(core.scheduler.waiting)
        assert running == sorted(running, key=lambda r: r.order)
        assert waiting == sorted(waiting, key=lambda r: r.order)
        stayed = [r for r in ran if r.phase is not Phase.WAITING]
        for request in ran:
            if request.phase is Phase.WAITING:
                assert all(other.order < request.order for other in stayed), "set back for one behind"
        # Prompts share nothing, so none waits for another's prefill.
        for request in (r for r in waited if r.phase is not Phase.WAITING):
            still = [r for r in waited if r.phase is Phase.WAITING]
            assert all(request.order < other.order for other in still), "passed over"
        if running:
            first = running[0]
            assert first.num_computed > computed[id(first)], "the first of all stood still"
    for number, request in enumerate(requests):
        alone = reference(
            request.tokens[: request.num_prompt], request.params, max_new_tokens=request.max_new_tokens
        )
        assert driver.answers[f"r{number}"].token_ids == alone.token_ids


@given(load, limits, st.sampled_from([-100, 7]))
@examples(60)
def test_one_priority_for_all_is_none(
    arrivals: list[tuple[int, int, int, int]], settings: dict[str, Any], priority: int
) -> None:
    """Step by step the same rows as in order of arrival."""

    def run(priority: int) -> list[list[tuple[int, int]]]:
        backend = FakeBackend(64, 1, context_length=48)
        driver = Timed(make_core(backend, **settings))
        rows, now = [], 0.0
        for later, _, length, new in arrivals:
            now += later
            driver.arrive(now, priority, length, new)
            driver.step()
            rows.append(backend.rows)
        for _ in turns():
            if not driver.core.has_work:
                return rows
            driver.step()
            rows.append(backend.rows)
        raise AssertionError

    assert run(priority) == run(0)


@pytest.mark.parametrize("priority", [101, -101, 1.0, True, "1", None])
def test_a_priority_is_a_whole_number_in_its_range(priority: object) -> None:
    with pytest.raises(InvalidValueError, match=r"priority is .*must be a whole number from -100 to 100"):
        SamplingParams(priority=priority)  # type: ignore[arg-type]


# The pool.


def send(bench: Bench, name: str, priority: int) -> Inbox:
    given = replace(work(name), params=SamplingParams(priority=priority))
    with bench.pool.reserve() as ticket:
        inbox = bench.inboxes[name] = Inbox()
        bench.pool.submit(given, inbox, ticket)
    return inbox


def test_the_queue_of_the_pool_goes_by_priority_and_waiting() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1, priority_aging_seconds=2.0).open()
    send(bench, "runs", 0)
    for name, priority in [("a", 0), ("b", 0), ("low", -4), ("high", 3)]:
        send(bench, name, priority)
    bench.after(7.0)
    assert bench.pool.stats().longest_wait == 7.0
    send(bench, "late", 3)  # one second more than its 3 steps of 2 seconds
    served = []
    for _ in range(6):
        (name,) = bench[0].works
        served.append((name, bench[0].works[name][0].waited))
        bench[0].end(name)
    assert served == [("runs", 0.0), ("high", 7.0), ("a", 7.0), ("b", 7.0), ("late", 0.0), ("low", 7.0)]
    assert bench.pool.stats().longest_wait == 0.0


def test_a_request_whose_engine_died_comes_back_to_its_place() -> None:
    bench = Bench(num_engines=2, max_inflight_per_engine=1).open()
    for name, priority in [("x", 0), ("y", 0), ("high", 2), ("equal", 0)]:
        send(bench, name, priority)
    died = bench.where("y")
    assert died is not None
    bench[died].die()
    assert bench.pool.stats().queued == 3
    bench[1 - died].end("x")
    assert bench.where("high") == 1 - died
    bench[1 - died].end("high")
    assert bench.where("y") == 1 - died
