"""The canary: no engine is ready before it has made a token; one that cannot make any more is killed."""

from __future__ import annotations

import threading

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.canary import CANARY, CanaryEngine
from mini_sglang.engine.handle import ENGINE_DIED
from mini_sglang.engine.pool import EnginePool
from mini_sglang.engine.worker import EngineThread
from mini_sglang.types import FinishReason

from .fake_backend import FakeBackend, make_core
from .fake_handles import INFO, Clock, FakeHandle, Inbox, work
from .test_worker import PROMPT, WAIT, Receiver, in_time, submit

IDS = (2, 3)


def settings(**more: object) -> Settings:
    return Settings.resolve(more, {})


def canary() -> tuple[CanaryEngine, FakeHandle]:
    handle = FakeHandle(0, INFO, [])
    return CanaryEngine(handle, IDS, settings()), handle


def opened() -> tuple[CanaryEngine, FakeHandle]:
    engine, handle = canary()
    handle.open()
    handle.end(CANARY)
    assert engine.state == "ready"
    return engine, handle


def fail(handle: FakeHandle, name: str) -> None:
    handle.end(name, FinishReason.ERROR, "the step failed: 'a lost device'")


def test_it_is_starting_until_the_token_is_there() -> None:
    engine, handle = canary()
    changes: list[str] = []
    engine.watch(lambda: changes.append(engine.state))
    assert engine.state == "starting" and not handle.works
    handle.open()
    assert engine.state == "starting" and changes == []
    asked = handle.works[CANARY][0]
    assert asked.prompt_ids == IDS and asked.max_new_tokens == 1 and asked.namespace == CANARY
    handle.end(CANARY)
    assert engine.state == "ready" and changes == ["ready"]
    assert not handle.works


def test_an_engine_that_was_ready_before_is_asked_too() -> None:
    handle = FakeHandle(0, INFO, [])
    handle.open()
    engine = CanaryEngine(handle, IDS, settings())
    assert engine.state == "starting" and CANARY in handle.works
    handle.end(CANARY)
    assert engine.state == "ready"


def test_an_engine_that_cannot_make_its_first_token_is_killed_and_says_why() -> None:
    engine, handle = canary()
    handle.open()
    fail(handle, CANARY)
    assert engine.state == "dead" and "cannot make a token" in (engine.failure or "")
    assert "a lost device" in (engine.failure or "")


def test_a_prompt_that_cannot_be_sent_kills_it_too() -> None:
    handle = FakeHandle(0, INFO, [])
    engine = CanaryEngine(handle, (INFO.vocab_size,), settings())
    handle.open()
    assert engine.state == "dead" and str(INFO.vocab_size) in (engine.failure or "")


def test_a_death_before_the_token_is_the_engines_own() -> None:
    engine, handle = canary()
    handle.open()
    handle.die("killed by signal 9")
    assert (engine.state, engine.failure) == ("dead", "killed by signal 9")


def test_after_a_failed_request_it_is_asked_again_and_goes_on() -> None:
    engine, handle = opened()
    inbox = Inbox()
    engine.submit(work("a"), inbox)
    fail(handle, "a")
    assert inbox.last.finish is FinishReason.ERROR
    for _ in range(2):
        assert engine.state == "ready" and CANARY in handle.works
        fail(handle, CANARY)
    handle.end(CANARY)
    assert engine.state == "ready" and not handle.works
    # The failures of before do not count any more.
    engine.submit(work("b"), Inbox())
    fail(handle, "b")
    fail(handle, CANARY)
    assert engine.state == "ready" and CANARY in handle.works


def test_it_is_killed_where_nothing_works_any_more() -> None:
    engine, handle = opened()
    other = Inbox()
    engine.submit(work("a"), Inbox())
    engine.submit(work("other"), other)
    handle.token("other")
    fail(handle, "a")
    for _ in range(3):
        assert engine.state == "ready"
        fail(handle, CANARY)
    assert engine.state == "dead"
    assert (other.last.finish, other.last.error_kind) == (FinishReason.ERROR, ENGINE_DIED)


@pytest.mark.parametrize("reason", [FinishReason.STOP, FinishReason.LENGTH, FinishReason.ABORT])
def test_a_request_that_ends_well_asks_for_nothing(reason: FinishReason) -> None:
    engine, handle = opened()
    engine.submit(work("a"), Inbox())
    handle.token("a")
    handle.end("a", reason)
    assert not handle.works


def test_a_restarted_engine_is_not_ready_before_its_own_token() -> None:
    clock, handles = Clock(), list[FakeHandle]()

    def make(index: int) -> CanaryEngine:
        handles.append(FakeHandle(index, INFO, []))
        return CanaryEngine(handles[-1], IDS, settings())

    pool = EnginePool(make, settings(num_engines=1), clock=clock, background=False)
    for life in range(3):
        pool.tick()
        handles[-1].open()
        pool.tick()
        assert not pool.ready and pool.state == ("down" if life else "starting")
        assert pool.stats().engines[0].state == "starting"
        handles[-1].end(CANARY)
        pool.tick()
        assert pool.ready and pool.state == "ready"
        handles[-1].die()
        assert not pool.ready
        pool.tick()
        clock.now += 60
    assert len(handles) == 3
    pool.close()


def test_a_real_engine_whose_every_step_fails_is_killed() -> None:
    backend = FakeBackend()
    core = make_core(backend)
    thread = EngineThread(core)
    engine = CanaryEngine(thread, IDS, settings())
    dead, ready = threading.Event(), threading.Event()

    def look() -> None:
        (dead if engine.state == "dead" else ready).set()

    engine.watch(look)
    look()
    while engine.state == "starting":
        assert ready.wait(WAIT)
    backend.fail_at = set(range(backend.calls, backend.calls + 100))
    receiver = Receiver()
    engine.submit(core.make_request("r", PROMPT, work("r").params), receiver)  # type: ignore[arg-type]
    assert receiver.wait().finish is FinishReason.ERROR
    assert dead.wait(WAIT) and "cannot make a token: the step failed" in (engine.failure or "")
    in_time(engine.close)


def test_kill_of_a_thread_tells_everybody_why() -> None:
    thread = EngineThread(make_core(FakeBackend(delay=0.005)))
    receiver = submit(thread, "r", max_new_tokens=80)
    assert receiver.first.wait(WAIT)
    thread.kill("it is of no use")
    answer = receiver.wait()
    assert (answer.finish, answer.error, receiver.last_kind) == (
        FinishReason.ERROR,
        "it is of no use",
        ENGINE_DIED,
    )
    in_time(thread.close)
    assert (thread.state, thread.failure) == ("dead", "it is of no use")
    thread.kill("again")
