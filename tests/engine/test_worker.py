"""The engine's thread: many clients, broken receivers, death and closing; one end for each request."""

from __future__ import annotations

import queue
import random
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from mini_sglang.engine.worker import EngineThread
from mini_sglang.errors import EngineError
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

from .fake_backend import Answer, FakeBackend, make_core, reference

PROMPT = [2 + i % 9 for i in range(40)]
WAIT = 60.0  # seconds until a test gives up; nothing below takes that long when it is right


def params(max_new_tokens: int = 10) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True)


@contextmanager
def running(backend: FakeBackend | None = None, **settings: object) -> Iterator[EngineThread]:
    thread = EngineThread(make_core(backend or FakeBackend(), **settings))
    try:
        yield thread
    finally:
        in_time(thread.close)


def in_time(function: Callable[[], object]) -> object:
    """Call ``function``, which must come back or raise before ``WAIT``."""
    outcome: list[object] = []

    def call() -> None:
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert outcome, f"{function} hangs"
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]


class Receiver:
    """A sink that notes what comes, and when the end has."""

    def __init__(self) -> None:
        self.answer = Answer()
        self.late: list[TokenEvent] = []
        self.last_kind: str | None = None
        self.first, self.ended = threading.Event(), threading.Event()

    def __call__(self, event: TokenEvent) -> None:
        if self.ended.is_set():
            self.late.append(event)
            return
        self.answer.add(event)
        self.last_kind = event.error_kind
        self.first.set()
        if event.finish is not None:
            self.ended.set()

    def wait(self) -> Answer:
        assert self.ended.wait(WAIT), "no terminal event came"
        assert not self.late, "events after the end"
        return self.answer


def submit(
    thread: EngineThread, name: str, prompt: Sequence[int] = PROMPT, max_new_tokens: int = 10
) -> Receiver:
    receiver = Receiver()
    thread.submit(thread.core.make_request(name, prompt, params(max_new_tokens)), receiver)
    return receiver


@pytest.mark.parametrize("chunked", [False, True])
def test_64_clients_with_random_aborts(chunked: bool) -> None:
    backend = FakeBackend(60, 4)
    failures: list[BaseException] = []
    with running(backend, chunked_prefill=chunked, prefill_chunk_size=16) as thread:

        def client(number: int) -> None:
            chance = random.Random(number)
            try:
                for turn in range(4):
                    prompt = [*PROMPT[: chance.randrange(1, 30)], 2 + chance.randrange(5)]
                    name = f"{number}.{turn}"
                    receiver = submit(thread, name, prompt)
                    if chance.random() < 0.4:
                        if chance.random() < 0.5:
                            receiver.first.wait(WAIT)
                        thread.abort(name)
                    answer = receiver.wait()
                    thread.abort(name)  # of one that has ended
                    alone = reference(prompt, params()).token_ids
                    assert answer.finish in (FinishReason.LENGTH, FinishReason.ABORT)
                    assert answer.token_ids == alone[: len(answer.token_ids)]
                    assert answer.finish is FinishReason.ABORT or answer.token_ids == alone
            except BaseException as error:
                failures.append(error)

        clients = [threading.Thread(target=client, args=(number,)) for number in range(64)]
        for one in clients:
            one.start()
        for one in clients:
            one.join(WAIT)
        assert not failures and not any(one.is_alive() for one in clients)
        stats = thread.call(thread.core.stats)
        thread.call(thread.core.check)
        assert stats["requests"] == 256 == stats["finished"] + stats["aborted"]
        assert stats["kv_tokens_private"] == stats["running"] == stats["waiting"] == 0
        assert thread._sinks == {}


def test_a_sink_that_raises_loses_its_own_request_only() -> None:
    with running() as thread:

        def broken(event: TokenEvent) -> None:
            raise OSError("the client is gone")

        thread.submit(thread.core.make_request("bad", PROMPT, params(60)), broken)
        good = submit(thread, "good")
        assert good.wait().token_ids == reference(PROMPT, params()).token_ids
        stats = thread.call(thread.core.stats)
        assert (stats["aborted"], stats["finished"], stats["running"]) == (1, 1, 0)


def test_a_sink_that_raises_on_the_terminal_event() -> None:
    with running() as thread:

        def broken(event: TokenEvent) -> None:
            if event.finish is not None:
                raise OSError("the client is gone")

        thread.submit(thread.core.make_request("bad", PROMPT, params(2)), broken)
        assert submit(thread, "good").wait().finish is FinishReason.LENGTH
        assert thread.call(thread.core.stats)["finished"] == 2


def test_a_sink_may_abort_and_call() -> None:
    """A receiver that finds a stop string ends its request from within the engine's thread."""
    with running() as thread:
        receiver = Receiver()
        seen: list[int] = []

        def sink(event: TokenEvent) -> None:
            receiver(event)
            if event.finish is None:
                seen.append(thread.call(thread.core.stats)["running"])
                thread.abort("r", FinishReason.STOP)

        thread.submit(thread.core.make_request("r", PROMPT, params(60)), sink)
        answer = receiver.wait()
        assert answer.finish is FinishReason.STOP and answer.token_ids
        assert seen[0] == 1


def test_close_while_running_ends_every_request_once() -> None:
    thread = EngineThread(make_core(FakeBackend(60, 4, delay=0.001), max_batch_size=4))
    receivers = [submit(thread, f"r{number}", PROMPT, 50) for number in range(12)]
    receivers[0].first.wait(WAIT)
    in_time(thread.close)
    in_time(thread.close)
    for receiver in receivers:
        answer = receiver.wait()
        assert answer.finish is FinishReason.ABORT and answer.prompt_tokens == 40
    assert thread.core.cache.num_private == 0 and not thread.core.has_work
    with pytest.raises(EngineError, match="the engine is closed"):
        submit(thread, "late")
    with pytest.raises(EngineError, match="the engine is closed"):
        thread.call(thread.core.stats)
    thread.abort("r0")


def test_close_from_a_sink() -> None:
    thread = EngineThread(make_core(FakeBackend()))
    receiver = Receiver()

    def sink(event: TokenEvent) -> None:
        receiver(event)
        thread.close()

    thread.submit(thread.core.make_request("r", PROMPT, params(60)), sink)
    assert receiver.wait().finish is FinishReason.ABORT
    in_time(thread.close)


def test_close_with_sinks_that_raise_still_tells_the_others() -> None:
    thread = EngineThread(make_core(FakeBackend(60, 4, delay=0.001)))
    good = submit(thread, "r0", PROMPT, 80)
    assert good.first.wait(WAIT)

    def broken(event: TokenEvent) -> None:
        if event.finish is not None:
            raise OSError("the client is gone")

    bad = thread.core.make_request("r1", PROMPT, params(80))
    thread.submit(bad, broken)
    last = submit(thread, "r2", PROMPT, 80)
    in_time(thread.close)
    assert {good.wait().finish, last.wait().finish} == {FinishReason.ABORT}


@pytest.mark.parametrize("where", ["schedule", "take"])
def test_an_engine_that_dies_tells_everybody(where: str) -> None:
    core = make_core(FakeBackend(60, 4))
    thread = EngineThread(core)
    first = Receiver()
    entered, go = threading.Event(), threading.Event()

    def die(*args: object) -> None:
        entered.set()
        go.wait(WAIT)
        raise ZeroDivisionError("a bug")

    def sink(event: TokenEvent) -> None:
        # In the engine's thread, after the first token: the next step dies, however fast the steps are.
        setattr(core.scheduler if where == "schedule" else core._postprocessor, where, die)
        first(event)

    thread.submit(core.make_request("r0", PROMPT, params(80)), sink)
    assert entered.wait(WAIT) and first.first.is_set()
    # These come while the engine is dying.
    others = [submit(thread, f"r{number}", PROMPT, 80) for number in range(1, 5)]
    thread.abort("r0")
    late: queue.SimpleQueue[object] = queue.SimpleQueue()

    def call() -> None:
        try:
            late.put(thread.call(lambda: 5))
        except EngineError as error:
            late.put(error)

    threading.Thread(target=call, daemon=True).start()
    go.set()
    assert isinstance(late.get(timeout=WAIT), (int, EngineError)), "a call hangs in a dead engine"
    for receiver in [first, *others]:
        answer = receiver.wait()
        assert answer.finish in (FinishReason.ERROR, FinishReason.ABORT)
        if answer.finish is FinishReason.ERROR:
            assert answer.error is not None and "a bug" in answer.error
    for attempt in (lambda: submit(thread, "late"), lambda: thread.call(core.stats)):
        with pytest.raises(EngineError, match="the engine died"):
            in_time(attempt)
    thread.abort("r1")
    in_time(thread.close)


def test_a_core_that_cannot_abort_at_the_end_still_tells_everybody() -> None:
    core = make_core(FakeBackend(60, 4, delay=0.001))
    thread = EngineThread(core)
    receivers = [submit(thread, f"r{number}", PROMPT, 80) for number in range(4)]
    assert receivers[0].first.wait(WAIT)

    def abort(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    thread.call(lambda: setattr(core, "abort", abort))
    in_time(thread.close)
    assert {receiver.wait().finish for receiver in receivers} == {FinishReason.ERROR}


def test_a_backend_failure_does_not_end_the_engine() -> None:
    with running(FakeBackend(fail_at={2})) as thread:
        answer = submit(thread, "r").wait()
        assert answer.finish is FinishReason.ERROR and "device failure at call 2" in (answer.error or "")
        assert submit(thread, "next").wait().finish is FinishReason.LENGTH


def test_call_gives_results_and_raises_what_was_raised() -> None:
    with running() as thread:
        assert thread.call(lambda: threading.current_thread().name) == "mini-sglang-engine"
        for error in (KeyError("x"), TimeoutError("slow"), SystemExit(3)):

            def fail(error: BaseException = error) -> None:
                raise error

            with pytest.raises(type(error)) as caught:
                in_time(lambda: thread.call(fail))
            assert caught.value is error
        assert submit(thread, "r").wait().finish is FinishReason.LENGTH


def test_an_id_in_use_is_refused_and_harms_nobody() -> None:
    with running(FakeBackend(60, 4, delay=0.001)) as thread:
        first = submit(thread, "same", PROMPT, 60)
        second = submit(thread, "same", PROMPT[:5], 5)
        refused = second.wait()
        assert refused.finish is FinishReason.ERROR and "request_id is 'same'" in (refused.error or "")
        assert first.wait().token_ids == reference(PROMPT, params(60)).token_ids
        assert submit(thread, "same").wait().finish is FinishReason.LENGTH


def test_submit_races_with_close() -> None:
    """Whoever wins, a request that was accepted gets one end, and a call comes back."""
    for _ in range(60):
        thread = EngineThread(make_core(FakeBackend()))
        accepted: list[Receiver] = []
        calls: list[object] = []
        start = threading.Barrier(4)

        def submitter(number: int, thread: EngineThread = thread, start: threading.Barrier = start) -> None:
            start.wait(WAIT)
            for turn in range(5):
                try:
                    accepted.append(submit(thread, f"{number}.{turn}", PROMPT[:3], 3))  # noqa: B023
                except EngineError:
                    return

        def caller(thread: EngineThread = thread, start: threading.Barrier = start) -> None:
            start.wait(WAIT)
            try:
                calls.append(thread.call(lambda: 7))  # noqa: B023
            except EngineError as error:
                calls.append(error)  # noqa: B023

        others = [threading.Thread(target=submitter, args=(number,)) for number in range(2)]
        others.append(threading.Thread(target=caller))
        for one in others:
            one.start()
        start.wait(WAIT)
        in_time(thread.close)
        for one in others:
            one.join(WAIT)
            assert not one.is_alive()
        assert len(calls) == 1
        for receiver in accepted:
            assert receiver.wait().finish in (FinishReason.LENGTH, FinishReason.ABORT)
        assert not thread._thread.is_alive() and thread._sinks == {}
