"""Engines in processes of their own: answers, deaths of every kind, ends; nobody is left without a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.handle import ENGINE_DIED, NOT_STARTED
from mini_sglang.engine.limits import make_prefix_work, make_work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.engine.process import ProcessEngine, plain_settings
from mini_sglang.errors import EngineError, InvalidValueError
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

from .child_backend import CRASH, HANG, KILL
from .fake_backend import reference
from .test_worker import PROMPT, WAIT, Receiver

BACKEND = "tests.engine.child_backend:"


def params(max_new_tokens: int = 10, **more: object) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, ignore_eos=True, **more)  # type: ignore[arg-type]


def resolve(**overrides: object) -> Settings:
    return Settings.resolve({"max_context_margin": 0, **overrides}, {})


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < end, "it does not come about"
        time.sleep(0.01)


@contextmanager
def running(
    delay: float = 0.0, function: str = "make_core", unix_sockets: bool = True, **settings: object
) -> Iterator[ProcessEngine]:
    engine = ProcessEngine(
        7,
        resolve(**settings),
        BACKEND + function,
        description={"model": "fake"},
        environment={"FAKE_DELAY": str(delay)},
        unix_sockets=unix_sockets,
    )
    try:
        if function == "make_core":
            until(lambda: engine.state != "starting")
            assert engine.state == "ready", engine.failure
        yield engine
    finally:
        engine.close()


def submit(
    engine: ProcessEngine, name: str, prompt: list[int] = PROMPT, max_new_tokens: int = 10, **more: object
) -> Receiver:
    receiver = Receiver()
    work = make_work(engine.info, resolve(), name, prompt, params(max_new_tokens, **more))
    engine.submit(work, receiver)
    return receiver


def gone(pid: int) -> bool:
    """Whether a process has ended; one that nobody has waited for yet has."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


@pytest.mark.parametrize("unix_sockets", [True, False])
def test_answers_are_those_of_an_engine_here(unix_sockets: bool) -> None:
    with running(unix_sockets=unix_sockets, max_batch_size=8) as engine:
        assert engine.info.description == {"model": "fake", "made": "fake"}
        assert (engine.info.vocab_size, engine.info.page_size, engine.info.kv_tokens) == (40, 4, 1024)
        prompts = [PROMPT[: 3 + number] for number in range(24)]
        receivers = [
            submit(engine, f"r{number}", prompt, seed=number, temperature=0.5 * (number % 2), logprobs=True)
            for number, prompt in enumerate(prompts)
        ]
        for number, (prompt, receiver) in enumerate(zip(prompts, receivers, strict=True)):
            answer = receiver.wait()
            alone = reference(
                prompt, params(seed=number, temperature=0.5 * (number % 2), logprobs=True), seed=number
            )
            assert answer.token_ids == alone.token_ids and answer.logprobs == alone.logprobs
            assert answer.prompt_tokens == len(prompt) and answer.finish is FinishReason.LENGTH
        until(lambda: engine.stats().get("finished") == 24)
        assert engine.stats()["decode_tokens"] == 24 * 9


def test_a_prefix_is_put_in_the_childs_cache_and_found_there() -> None:
    with running() as engine:
        inbox = Receiver()
        engine.submit(make_prefix_work(engine.info, resolve(), "p", PROMPT[:32], "tenant"), inbox)
        assert inbox.wait().finish is FinishReason.STOP
        answer = Receiver()
        engine.submit(make_work(engine.info, resolve(), "r", PROMPT, params(), namespace="tenant"), answer)
        assert answer.wait().cached_tokens == 32
        assert submit(engine, "other").wait().cached_tokens == 0


def test_nothing_is_left_on_disk_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    seen: list[int] = []
    make = os.mkdir

    def watching(path: str, mode: int = 0o777) -> None:
        seen.append(mode)
        make(path, mode)

    monkeypatch.setattr(os, "mkdir", watching)
    with running() as engine:
        assert set(seen) == {0o700} and list(tmp_path.iterdir()) == []
        assert submit(engine, "r").wait().finish is FinishReason.LENGTH


def test_an_abort_ends_the_request_in_the_child() -> None:
    with running(delay=0.01) as engine:
        receiver = submit(engine, "r", max_new_tokens=80)
        assert receiver.first.wait(WAIT)
        engine.abort("r", FinishReason.STOP)
        engine.abort("unknown")
        answer = receiver.wait()
        assert answer.finish is FinishReason.STOP
        until(lambda: engine.stats()["kv_tokens_private"] == 0 and engine.stats()["running"] == 0)


def test_an_id_in_use_is_refused() -> None:
    with running(delay=0.01) as engine:
        first = submit(engine, "same", max_new_tokens=60)
        with pytest.raises(InvalidValueError, match="request_id"):
            submit(engine, "same")
        assert first.wait().finish is FinishReason.LENGTH
        assert submit(engine, "same").wait().finish is FinishReason.LENGTH


def test_a_sink_that_raises_loses_its_own_request_only() -> None:
    with running(delay=0.005) as engine:

        def broken(event: TokenEvent) -> None:
            raise OSError("the client is gone")

        engine.submit(make_work(engine.info, resolve(), "bad", PROMPT, params(80)), broken)
        assert submit(engine, "good").wait().finish is FinishReason.LENGTH
        until(lambda: engine.stats()["aborted"] == 1)


def test_a_sink_may_abort_submit_and_close() -> None:
    with running(delay=0.005) as engine:
        receiver, other = Receiver(), Receiver()

        def sink(event: TokenEvent) -> None:
            receiver(event)
            if event.finish is None:
                engine.abort("r")
            else:
                engine.submit(make_work(engine.info, resolve(), "next", PROMPT, params(80)), other)
                engine.close()

        engine.submit(make_work(engine.info, resolve(), "r", PROMPT, params(60)), sink)
        assert receiver.wait().finish is FinishReason.ABORT
        assert other.wait().finish is FinishReason.ABORT


@pytest.mark.parametrize("harm, said", [(None, "signal 9"), (CRASH, "a bug"), (HANG, "STEP_TIMEOUT")])
def test_every_request_of_a_child_that_dies_is_told(harm: int | None, said: str) -> None:
    """What ran is told apart from what merely waited, also where the step that kills is its first."""
    with running(delay=0.01, max_batch_size=4, step_timeout=1.0) as engine:
        ran = [submit(engine, f"r{number}", max_new_tokens=80) for number in range(3)]
        for receiver in ran:
            assert receiver.first.wait(WAIT)
        pid = engine.pid
        assert pid is not None
        if harm is None:
            waits = [submit(engine, f"w{number}", [2, 3], 80) for number in range(4)][1:]
            until(lambda: engine.stats()["running"] == 4)
            os.kill(pid, signal.SIGKILL)
        else:
            ran.append(submit(engine, "harm", [harm] * 5))
            waits = [submit(engine, f"w{number}", [2, 3]) for number in range(3)]
        for receiver, kind in [*((one, ENGINE_DIED) for one in ran), *((one, NOT_STARTED) for one in waits)]:
            answer = receiver.wait()
            assert answer.finish is FinishReason.ERROR and said in (answer.error or "")
            assert receiver.last_kind == kind
        until(lambda: engine.state == "dead")
        assert said in (engine.failure or "") and gone(pid)
        with pytest.raises(EngineError, match=said):
            submit(engine, "late")
        engine.abort("r0")


def test_a_request_that_kills_in_its_first_step_is_known_to_have_started() -> None:
    """No message of it could have left the child; the journal has."""
    for _ in range(3):
        with running() as engine:
            receiver = submit(engine, "poison", [KILL] * 5)
            assert receiver.wait().finish is FinishReason.ERROR
            assert receiver.last_kind == ENGINE_DIED


def test_an_idle_child_is_not_taken_for_one_that_hangs() -> None:
    with running(step_timeout=0.4) as engine:
        time.sleep(1.5)
        assert engine.state == "ready" and submit(engine, "r").wait().finish is FinishReason.LENGTH


@pytest.mark.parametrize(
    "function, said",
    [
        ("broken", "model.gguf ends after 12 of 4096 bytes."),
        ("buggy", "KeyError('rope_theta')"),
        ("missing", "has no attribute 'missing'"),
    ],
)
def test_a_start_that_fails_says_why(function: str, said: str) -> None:
    changes: list[str] = []
    with running(function=function) as engine:
        engine.watch(lambda: changes.append(engine.state))
        until(lambda: engine.state == "dead")
        assert said in (engine.failure or "")
        for attempt in (lambda: engine.info, lambda: engine.submit(None, lambda event: None)):  # type: ignore[arg-type]
            with pytest.raises(EngineError):
                attempt()
        until(lambda: changes == ["dead"])


def test_close_while_it_loads_ends_it_at_once() -> None:
    lines: list[str] = []
    engine = ProcessEngine(0, resolve(), BACKEND + "slow", notify=lines.append)
    until(lambda: lines == ["slow"])
    pid = engine.pid
    engine.close()
    assert engine.state == "closed" and pid is not None and gone(pid)


def test_close_ends_what_runs_with_an_event() -> None:
    with running(delay=0.01, max_batch_size=4) as engine:
        receivers = [submit(engine, f"r{number}", max_new_tokens=80) for number in range(8)]
        assert receivers[0].first.wait(WAIT)
        pid = engine.pid
        engine.close()
        engine.close()
        assert {receiver.wait().finish for receiver in receivers} == {FinishReason.ABORT}
        assert engine.state == "closed" and pid is not None and gone(pid)
        assert not any(thread.name.startswith("mini-sglang-engine-7") for thread in threading.enumerate())
        with pytest.raises(EngineError, match="closed"):
            submit(engine, "late")


def test_close_of_a_child_that_hangs_is_by_force(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mini_sglang.engine.process.CLOSE_GRACE", 0.2)
    with running() as engine:
        receiver = submit(engine, "r", [HANG] * 5)
        until(lambda: not engine._by_serial or all(e.started for e in engine._by_serial.values()))
        pid = engine.pid
        engine.close()
        assert receiver.wait().finish is FinishReason.ABORT and pid is not None and gone(pid)


def test_signals_for_the_server_are_not_the_childs() -> None:
    with running(delay=0.005) as engine:
        receiver = submit(engine, "r", max_new_tokens=60)
        assert receiver.first.wait(WAIT) and engine.pid is not None
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(engine.pid, number)
        assert receiver.wait().finish is FinishReason.LENGTH
        assert os.getpgid(engine.pid) != os.getpgid(0)


PARENT = """
import sys, threading, time
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.process import ProcessEngine
from mini_sglang.config import Settings
from mini_sglang.types import SamplingParams
engine = ProcessEngine(0, Settings.resolve({}, {}), "tests.engine.child_backend:make_core")
while engine.state == "starting":
    time.sleep(0.01)
ended = threading.Event()
for prompt in ([2, 3], [int(sys.argv[1])] * 5):
    work = make_work(engine.info, Settings(), str(prompt), prompt, SamplingParams())
    engine.submit(work, lambda event: event.finish and ended.set())
    ended.wait(60)
while not all(entry.started for entry in engine._by_serial.values()):
    time.sleep(0.01)
print(engine.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("token", [3, HANG])
def test_a_child_ends_with_its_parent(token: int) -> None:
    """Also in a step that never ends."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(token)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert not gone(pid)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    until(lambda: gone(pid))


def test_a_child_ends_when_its_standard_input_does(tmp_path: Path) -> None:
    """What holds where the system does not tell a process of its parent's end."""
    arguments = ["--backend", BACKEND + "slow"]
    folder = tmp_path / "private"
    folder.mkdir()
    arguments += ["--commands", f"ipc://{folder}/c", "--messages", f"ipc://{folder}/m"]
    child = subprocess.Popen(
        [sys.executable, "-m", "mini_sglang.engine.process_main", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )
    until((folder / "c").exists)
    assert child.poll() is None and child.stdin is not None and child.stdout is not None
    child.stdin.close()
    assert child.wait(WAIT) == 0
    child.stdout.close()
    assert not folder.exists()


def test_the_sockets_are_gone_while_it_still_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a server which is killed then leaves none."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    lines: list[str] = []
    engine = ProcessEngine(0, resolve(), BACKEND + "slow", notify=lines.append)
    until(lambda: lines == ["slow"])
    assert engine.state == "starting" and list(tmp_path.iterdir()) == []
    engine.close()


def test_kill_ends_a_step_and_tells_why() -> None:
    with running() as engine:
        receiver = submit(engine, "r", [HANG] * 5)
        until(lambda: all(entry.started for entry in engine._by_serial.values()))
        engine.kill("it is of no use")
        answer = receiver.wait()
        assert (answer.finish, answer.error) == (FinishReason.ERROR, "it is of no use")
        assert receiver.last_kind == ENGINE_DIED
        until(lambda: engine.state == "dead")
        assert engine.failure == "it is of no use"
        engine.kill("again")
        assert engine.failure == "it is of no use"


def test_the_childs_settings_are_the_parents_without_its_secrets(tmp_path: Path) -> None:
    given = {"dtype": "fp32", "page_size_tokens": 8, "model_local_dir": tmp_path, "model": "a/b"}
    settings = resolve(**given)
    sent = plain_settings(settings)
    assert Settings.resolve(dict(sent), {}) == settings
    assert sent["model_local_dir"] == str(tmp_path)
    assert not any(name.startswith("api_key") for name in sent)
    with suppress(InvalidValueError):  # where there is such a setting
        assert "secret" not in str(plain_settings(resolve(api_key="secret")))


def test_a_pool_of_processes_survives_the_death_of_one() -> None:
    engines: list[ProcessEngine] = []

    def make(index: int) -> ProcessEngine:
        engine = ProcessEngine(index, settings, BACKEND + "make_core", environment={"FAKE_DELAY": "0.02"})
        engines.append(engine)
        return engine

    settings = resolve(num_engines=2, max_batch_size=16)
    pool = EnginePool(make, settings)
    try:
        until(lambda: pool.state == "ready")
        receivers = {f"r{number}": Receiver() for number in range(64)}
        with pool.reserve(64) as ticket:
            for name, receiver in receivers.items():
                pool.submit(make_work(pool.info, settings, name, PROMPT[:9], params(20)), receiver, ticket)
        for receiver in list(receivers.values())[:2]:
            assert receiver.first.wait(WAIT)
        pid = engines[0].pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        answers = [receiver.wait() for receiver in receivers.values()]
        lost = [answer for answer in answers if answer.finish is FinishReason.ERROR]
        assert 0 < len(lost) <= 20 and all("died" in (answer.error or "") for answer in lost)
        alone = reference(PROMPT[:9], params(20)).token_ids
        assert all(answer.token_ids == alone for answer in answers if answer not in lost)
        until(lambda: pool.state == "ready")
        stats = pool.stats()
        assert (stats.restarts, stats.accepted, stats.ended) == (1, 64, 64)
        assert stats.engines[0].counters["requests"] > 0
    finally:
        pool.close()
    assert all(engine.state == "closed" or engine.failure for engine in engines)
    assert all(engine.pid is None or gone(engine.pid) for engine in engines)
