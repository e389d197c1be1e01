"""The pool: places, queue, deaths, restarts and the end; one terminal event for each request, always."""

from __future__ import annotations

import contextlib
import random
import threading

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.handle import ENGINE_DIED, NOT_STARTED, TIMEOUT, UNAVAILABLE
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.engine.worker import EngineThread
from mini_sglang.errors import EngineError, InvalidValueError, OverloadedError, UnavailableError
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

from .fake_backend import FakeBackend, KVCorruption, make_core, reference
from .fake_handles import Bench, Inbox, work
from .test_worker import PROMPT, WAIT, Receiver, in_time


def test_a_request_goes_to_an_engine_and_its_events_come_back() -> None:
    bench = Bench().open()
    inbox = bench.submit("a")
    bench[0].token("a", 7)
    bench[0].end("a")
    assert [event.token_ids for event in inbox.events] == [(7,), (6,)]
    assert inbox.last.finish is FinishReason.LENGTH
    stats = bench.pool.stats()
    assert (stats.accepted, stats.ended, stats.inflight, stats.reserved) == (1, 1, 0, 0)
    assert stats.engines[0].counters["requests"] == 1 and stats.mode == "rr"


def test_places_are_taken_before_the_work_and_given_back_once() -> None:
    bench = Bench(max_inflight_per_engine=1, max_queue=2).open()  # 2 run, 2 wait
    one, three = bench.pool.reserve(), bench.pool.reserve(3)
    # What ADAPTIVE_MAX_NEW_TOKENS goes by: each request of a ticket counts all of them, whichever end first.
    assert (one.inflight, three.inflight) == (1, 4)
    with pytest.raises(OverloadedError, match="takes 4 requests at a time") as caught:
        bench.pool.reserve()
    assert 1 <= caught.value.retry_after <= 60
    one.release()
    one.release()
    assert bench.pool.stats().reserved == 3
    with pytest.raises(OverloadedError):
        bench.pool.reserve(2)
    with three:
        bench.pool.submit(work("a"), Inbox(), three)
        assert three.remaining == 2
    stats = bench.pool.stats()
    assert (stats.reserved, stats.inflight, stats.refused) == (0, 1, 3)
    with pytest.raises(EngineError, match="no place left"):
        bench.pool.submit(work("b"), Inbox(), three)


def test_a_burst_never_takes_more_than_there_is() -> None:
    bench = Bench(max_inflight_per_engine=10, max_queue=30).open()
    taken: list[object] = []
    start = threading.Barrier(8)

    def client() -> None:
        start.wait(WAIT)
        for _ in range(20):
            with contextlib.suppress(OverloadedError):
                taken.append(bench.pool.reserve())

    clients = [threading.Thread(target=client) for _ in range(8)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(WAIT)
    assert len(taken) == 50 == bench.pool.stats().reserved


def test_the_queue_is_first_come_first_served() -> None:
    bench = Bench(max_inflight_per_engine=1, max_queue=10).open()
    for name in "abcde":
        bench.submit(name)
    assert bench.pool.stats().queued == 3
    bench[1].end("b")
    assert bench.where("c") == 1
    bench[0].end("a")
    assert bench.where("d") == 0 and bench.pool.stats().queued == 1


def test_the_cap_on_all_engines_together() -> None:
    bench = Bench(max_inflight_total=3, max_queue=5).open()
    for name in "abcde":
        bench.submit(name)
    stats = bench.pool.stats()
    assert (stats.inflight, stats.queued) == (3, 2)
    bench[0].end("a")
    assert bench.pool.stats().inflight == 3


def test_a_request_that_waits_too_long_is_told() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1, queue_timeout=5.0).open()
    bench.submit("a")
    waits = bench.submit("b")
    bench.after(4.9)
    assert not waits.ended
    later = bench.submit("c")
    bench.after(0.2)
    assert waits.last.finish is FinishReason.ERROR and waits.last.error_kind == TIMEOUT
    assert "5 seconds (QUEUE_TIMEOUT)" in (waits.last.error or "")
    assert not later.ended and bench.pool.stats().timed_out == 1
    bench[0].end("a")
    assert bench.where("c") == 0


def test_the_pool_says_when_it_must_be_called_again() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1, queue_timeout=5.0)
    assert bench.pool.tick() is None
    bench[0].open()
    assert bench.pool.tick() is None
    bench.submit("a")
    bench.submit("b")
    bench.clock.now += 2
    assert bench.pool.tick() == pytest.approx(3.0)
    bench[0].die()
    assert bench.pool.tick() == pytest.approx(0.5)


def test_aborts_reach_a_request_wherever_it_is() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1).open()
    runs, waits = bench.submit("a"), bench.submit("b")
    bench.pool.abort("b", FinishReason.STOP)
    assert waits.last.finish is FinishReason.STOP and bench.pool.stats().queued == 0
    bench.pool.abort("a")
    assert not runs.ended  # the engine has not confirmed
    bench[0].confirm()
    assert runs.last.finish is FinishReason.ABORT
    bench.pool.abort("a")
    assert bench.pool.stats().ended == 2


def test_an_abort_between_the_choice_of_an_engine_and_the_sending_is_not_lost() -> None:
    bench = Bench(num_engines=1).open()
    handle, send = bench[0], bench[0].submit

    def submit(*given: object) -> None:
        bench.pool.abort("a")
        assert not handle.aborts  # the handle does not know it yet
        send(*given)  # type: ignore[arg-type]

    handle.submit = submit  # type: ignore[method-assign]
    inbox = bench.submit("a")
    assert handle.aborts == {"a": FinishReason.ABORT}
    handle.confirm()
    assert inbox.last.finish is FinishReason.ABORT


def test_an_id_in_use_is_refused_and_keeps_its_place() -> None:
    bench = Bench().open()
    first = bench.submit("a")
    ticket = bench.pool.reserve()
    with pytest.raises(InvalidValueError, match="request_id"):
        bench.pool.submit(work("a"), Inbox(), ticket)
    assert ticket.remaining == 1 and not first.ended


def test_a_sink_that_raises_loses_its_own_request_only() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1).open()

    calls: list[TokenEvent] = []

    def broken(event: TokenEvent) -> None:
        calls.append(event)
        raise OSError("the client is gone")

    bench.pool.submit(work("bad"), broken, bench.pool.reserve())
    waits = bench.submit("good")
    bench[0].token("bad")
    bench[0].token("bad")  # sent before the abort came
    assert len(calls) == 1 and bench[0].aborts and bench.where("good") == 0
    bench[0].confirm()
    bench[0].end("good")
    assert waits.ended and bench.pool.stats().ended == 2 and bench.pool.stats().inflight == 0


def test_a_death_ends_what_ran_and_moves_what_did_not() -> None:
    bench = Bench().open()
    names = [f"r{number}" for number in range(6)]
    inboxes = [bench.submit(name) for name in names]
    first = bench[0]
    ran, told = [name for name in names if name in first.works][:2]
    first.started.add(ran)  # in its first step: no token yet
    first.token(told)
    waits = next(name for name in names if name in first.works and name not in (ran, told))
    first.die()
    for name in (ran, told):
        last = bench.inboxes[name].last
        assert last.finish is FinishReason.ERROR and last.error_kind == ENGINE_DIED
        assert last.error == "it was killed"
    assert bench.where(waits) == 1 and not bench.inboxes[waits].ended
    assert bench.pool.state == "degraded" and bench.pool.ready
    stats = bench.pool.stats()
    assert stats.resubmitted == 1 and stats.engines[0].state == "dead" and stats.engines[0].inflight == 0
    assert stats.engines[0].failure is None  # the upkeep has not looked yet
    bench.pool.tick()
    engine = bench.pool.stats().engines[0]
    assert (engine.failure, engine.restart_in) == ("it was killed", 0.5)
    # A second death before it ran anywhere: it has had its chance.
    bench[1].die()
    assert bench.inboxes[waits].last.error_kind == NOT_STARTED
    # The others had theirs still to come.
    assert bench.pool.stats().queued == 3 and sum(inbox.ended for inbox in inboxes) == 3


def test_an_engine_that_comes_to_life_again_is_used_again() -> None:
    bench = Bench(num_engines=1).open()
    bench[0].counters["finished"] = 3
    bench[0].die()
    bench.pool.tick()
    assert bench.pool.state == "down" and not bench.pool.ready
    with pytest.raises(UnavailableError) as caught:
        bench.pool.reserve()
    assert caught.value.retry_after == 1.0
    bench.after(0.5)
    assert bench.pool.stats().engines[0].state == "starting"
    bench[0].open()
    bench.pool.tick()
    assert bench.pool.state == "ready"
    bench.submit("a")
    bench[0].counters["finished"] = 1
    engine = bench.pool.stats().engines[0]
    assert (engine.restarts, engine.counters["finished"], engine.failure) == (1, 4, None)


def test_back_off_doubles_to_its_limit_and_is_forgotten_after_a_healthy_minute() -> None:
    bench = Bench(num_engines=1).open()
    waits = []
    for _ in range(8):
        bench[0].die()
        bench.pool.tick()
        waits.append(bench.pool.stats().engines[0].restart_in)
        bench.after(waits[-1])
        bench[0].open()
        bench.pool.tick()
    assert waits == [0.5, 1, 2, 4, 8, 16, 30, 30]
    bench.after(60)
    bench[0].die()
    bench.pool.tick()
    assert bench.pool.stats().engines[0].restart_in == 0.5


def test_requests_that_waited_through_a_death_of_all_are_served_after_it() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1).open()
    bench.submit("a")
    waits = bench.submit("b")
    bench[0].started.add("a")
    bench[0].die()
    bench.pool.tick()
    assert not waits.ended and bench.pool.stats().queued == 1
    bench.after(0.5)
    bench[0].open()
    bench.pool.tick()
    assert bench.where("b") == 0


def test_an_engine_that_refuses_is_passed_over() -> None:
    bench = Bench().open()
    bench[0].refuses = True
    for name in "abc":
        bench.submit(name)
        assert bench.where(name) == 1
    assert bench.pool.stats().resubmitted == 0


def test_nothing_is_taken_before_an_engine_is_ready() -> None:
    bench = Bench()
    assert bench.pool.state == "starting"
    bench.pool.tick()
    for attempt in (bench.pool.reserve, lambda: bench.pool.info):
        with pytest.raises(UnavailableError, match="being loaded"):
            attempt()
    bench[1].open()
    bench.pool.tick()
    assert bench.pool.state == "degraded" and bench.pool.info == bench.info
    bench.submit("a")
    assert bench.where("a") == 1


def test_wait_ready_says_why_no_engine_starts() -> None:
    bench = Bench()
    bench.pool.tick()
    for index in range(2):
        bench[index].state, bench[index].failure = "dead", "model.gguf ends after 12 bytes."
    bench.pool.tick()
    with pytest.raises(EngineError, match="ends after 12 bytes"):
        bench.pool.wait_ready(WAIT)


def test_a_handle_that_cannot_be_made_is_tried_again() -> None:
    tries: list[int] = []

    def make(index: int) -> EngineThread:
        tries.append(index)
        raise OSError("no more processes")

    pool = EnginePool(make, Settings.resolve({}, {}), background=False)
    assert pool.tick() is not None
    engine = pool.stats().engines[0]
    assert engine.state == "dead" and "no more processes" in (engine.failure or "") and tries == [0]


def test_drain_lets_what_runs_end() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1).open()
    first, second = bench.submit("a"), bench.submit("b")
    place = bench.pool.reserve()
    done = threading.Event()
    thread = threading.Thread(target=lambda: (bench.pool.drain(WAIT), done.set()))
    thread.start()
    while bench.pool.state != "draining":
        pass
    with pytest.raises(UnavailableError, match="ending"):
        bench.pool.reserve()
    # A place taken before counts as a request.
    third = Inbox()
    bench.pool.submit(work("c"), third, place)
    for name in "abc":
        assert not done.is_set()
        bench[0].end(name)
    thread.join(WAIT)
    assert done.is_set() and {i.last.finish for i in (first, second, third)} == {FinishReason.LENGTH}
    bench.pool.close()


def test_what_a_drain_does_not_see_end_is_ended_with_an_error() -> None:
    bench = Bench(num_engines=1, max_inflight_per_engine=1).open()
    runs, waits = bench.submit("a"), bench.submit("b")
    place = bench.pool.reserve()
    handle = bench[0]
    abort = handle.abort

    def confirming(request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        abort(request_id, reason)
        handle.confirm()

    handle.abort = confirming  # type: ignore[method-assign]
    bench.pool.drain(0.01)
    for inbox in (runs, waits):
        assert inbox.last.finish is FinishReason.ERROR and inbox.last.error_kind == UNAVAILABLE
    with pytest.raises(UnavailableError):
        bench.pool.submit(work("c"), Inbox(), place)
    bench.pool.close()
    bench.pool.close()
    assert bench.pool.state == "closed" and bench[0].state == "closed"


def test_close_ends_everything_even_where_an_engine_says_nothing() -> None:
    bench = Bench(max_inflight_per_engine=1).open()
    inboxes = [bench.submit(name) for name in "abcd"]
    bench[0].close = lambda: None  # type: ignore[method-assign]
    bench.pool.close()
    for inbox in inboxes:
        assert (inbox.last.finish, inbox.last.error_kind) == (FinishReason.ERROR, UNAVAILABLE)


def test_kill_does_not_wait_for_an_engine_that_never_closes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_sglang.engine.slots._CLOSE_SECONDS", 10 * WAIT)
    bench = Bench().open()
    inboxes = [bench.submit(name) for name in "ab"]
    never = threading.Event()
    bench[0].close = lambda: never.wait() and None  # type: ignore[method-assign]
    bench[0].kill = lambda why: None  # type: ignore[method-assign]
    closing = threading.Thread(target=bench.pool.close, daemon=True)
    closing.start()
    in_time(bench.pool.kill)
    closing.join(WAIT)
    assert not closing.is_alive() and bench[1].state == "dead" and not never.is_set()
    for inbox in inboxes:
        assert (inbox.last.finish, inbox.last.error_kind) == (FinishReason.ERROR, UNAVAILABLE)
    never.set()


@pytest.mark.parametrize("mode", ["rr", "fsfs", "random", "cache_aware"])
@pytest.mark.parametrize("seed", range(40))
def test_every_request_ends_once_whatever_happens(mode: str, seed: int) -> None:
    chance = random.Random(seed)
    caps = {"max_inflight_per_engine": chance.choice([1, 3]), "max_inflight_total": chance.choice([0, 4])}
    bench = Bench(
        num_engines=3, max_queue=chance.choice([0, 4]), queue_timeout=3.0, scheduler_mode=mode, **caps
    ).open()
    ran_on: dict[str, set[object]] = {}

    def request(number: int) -> None:
        with contextlib.suppress(OverloadedError, UnavailableError):
            bench.submit(f"r{number}", [2 + chance.randrange(3)] * chance.randrange(1, 70))

    def act(number: int) -> None:
        handle = bench[chance.randrange(3)]
        names = sorted(handle.works)
        name = chance.choice(names) if names else None
        match chance.randrange(12):
            case 0 | 1 | 2 | 3:
                request(number)
            case 4 | 5 if name is not None:
                handle.token(name)
                ran_on.setdefault(name, set()).add(handle)
            case 6 | 7 if name is not None:
                ran_on.setdefault(name, set()).add(handle)
                handle.end(name)
            case 8:
                known = sorted(bench.inboxes)
                bench.pool.abort(chance.choice(known) if known else "none")
            case 9:
                handle.confirm()
            case 10 if chance.random() < 0.3 and handle.state == "ready":
                if name is not None:  # perhaps in its first step
                    handle.started.add(name)
                    ran_on.setdefault(name, set()).add(handle)
                handle.die()
            case _:
                bench.after(chance.choice([0.1, 0.4, 2.0]))
                if chance.random() < 0.7:
                    bench.open()

    for number in range(300):
        act(number)
        stats = bench.pool.stats()
        assert stats.inflight + stats.queued == sum(not inbox.ended for inbox in bench.inboxes.values())
        assert all(engine.inflight <= caps["max_inflight_per_engine"] for engine in stats.engines)
        assert stats.inflight <= (caps["max_inflight_total"] or 99)
        assert stats.reserved == 0 and stats.ended <= stats.accepted
    # One that ran on an engine was on no other, and none was on more than two.
    for name in bench.inboxes:
        places = [handle for sent, handle in bench.log if sent == name]
        assert len(places) <= 2
        for handle in ran_on.get(name, set()):
            assert places[-1] is handle
    first_time = list(dict.fromkeys(name for name, _ in bench.log))
    assert first_time == sorted(first_time, key=lambda name: int(name[1:]))
    bench.pool.close()
    assert all(inbox.ended for inbox in bench.inboxes.values())
    stats = bench.pool.stats()
    assert stats.accepted == stats.ended == len(bench.inboxes)
    assert stats.inflight == stats.queued == 0


def test_real_engines_in_threads_with_deaths_and_aborts() -> None:
    """Three engines that die and come back under 24 clients; answers that end well are right."""
    cores = []

    def make(index: int) -> EngineThread:
        def load() -> object:
            core = make_core(FakeBackend(60, 4), max_batch_size=4)
            cores.append(core)
            return core

        return EngineThread(load)  # type: ignore[arg-type]

    settings = Settings.resolve(
        {"num_engines": 3, "max_batch_size": 4, "scheduler_mode": "cache_aware", "max_context_margin": 0}, {}
    )
    pool = EnginePool(make, settings)
    pool.wait_ready(WAIT)
    failures: list[BaseException] = []
    finishes: list[FinishReason | None] = []
    params = SamplingParams(max_new_tokens=10, ignore_eos=True)
    dying = threading.Event()

    def client(number: int) -> None:
        chance = random.Random(number)
        try:
            for turn in range(6):
                prompt = [*PROMPT[: chance.randrange(1, 30)], 2 + chance.randrange(5)]
                receiver, name = Receiver(), f"{number}.{turn}"
                while True:
                    try:
                        ticket = pool.reserve()
                        break
                    except UnavailableError:
                        dying.wait(0.05)
                with ticket:
                    pool.submit(make_work(pool.info, settings, name, prompt, params), receiver, ticket)
                if chance.random() < 0.2:
                    pool.abort(name)
                if (turn, number % 8) == (2, 0):

                    def die(*args: object) -> None:
                        raise KVCorruption("a bug")

                    cores[-1].scheduler.schedule = die  # type: ignore[attr-defined]
                answer = receiver.wait()
                finishes.append(answer.finish)
                if answer.finish is FinishReason.LENGTH:
                    assert answer.token_ids == reference(prompt, params).token_ids
        except BaseException as error:
            failures.append(error)

    clients = [threading.Thread(target=client, args=(number,)) for number in range(24)]
    for one in clients:
        one.start()
    for one in clients:
        one.join(WAIT)
    stats = pool.stats()
    while pool.state != "ready":
        dying.wait(0.05)
    restarts = pool.stats().restarts
    pool.close()
    assert not failures and not any(one.is_alive() for one in clients)
    assert len(finishes) == 144 == stats.accepted == stats.ended
    assert finishes.count(FinishReason.LENGTH) > 60 and restarts > 0
