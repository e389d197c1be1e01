"""Adapters in the engine's floor: who uses them, when they go, and that every engine of a pool has them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.adapters import NoAdapterError
from mini_sglang.engine.handle import NOT_STARTED, EngineInfo
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.worker import EngineThread
from mini_sglang.errors import EngineError, InvalidValueError, ModelLoadError, UnavailableError
from mini_sglang.types import Adapter, FinishReason, SamplingParams

from .fake_backend import Driver, FakeBackend, make_core
from .fake_handles import Bench, FakeHandle, Inbox

PROMPT = list(range(2, 30))
A, B = Adapter("a", "/a", "f1"), Adapter("b", "/b", "f2")
NEWER_A = Adapter("a", "/a", "f3")


class FakeStore:
    """Ids from 1; remembers what is attached. ``refused`` cannot be read."""

    def __init__(self, room: int = 2) -> None:
        self.attached: dict[int, Adapter] = {}
        self.refused: set[str] = set()
        self._room = room

    def read(self, adapter: Adapter) -> object:
        if adapter.name in self.refused:
            raise ModelLoadError("It is damaged.")
        return adapter

    def attach(self, prepared: object) -> int:
        assert isinstance(prepared, Adapter)
        if len(self.attached) == self._room:
            raise InvalidValueError("MAX_LORAS", self._room, "more")
        adapter_id = next(i for i in range(1, 9) if i not in self.attached)
        self.attached[adapter_id] = prepared
        return adapter_id

    def detach(self, adapter_id: int) -> None:
        del self.attached[adapter_id]


class AdaptedBackend(FakeBackend):
    """Notes the adapters of its latest step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.adapters = FakeStore()
        self.told: list[int] = []

    def run(self, steps):  # type: ignore[no-untyped-def]
        self.told = [step.adapter for step in steps]
        assert all(not adapter or adapter in self.adapters.attached for adapter in self.told)
        return super().run(steps)


def test_each_sequence_of_a_step_names_its_adapter() -> None:
    backend = AdaptedBackend()
    core = make_core(backend)
    core.adapters.load(A)
    core.adapters.load(B)
    driver = Driver(core)
    for adapter in (None, B, A, B):
        driver.add(PROMPT[:5], SamplingParams(max_new_tokens=3, ignore_eos=True), adapter=adapter)
    driver.step()
    assert backend.told == [0, 2, 1, 2]
    driver.drain()
    stats = core.stats()
    assert stats["loras"] == 2 and stats["lora_requests"] == 3


def test_equal_prompts_of_different_adapters_share_no_kv() -> None:
    core = make_core(AdaptedBackend())
    for adapter in (A, B):
        core.adapters.load(adapter)
    driver = Driver(core)
    params = SamplingParams(max_new_tokens=1, ignore_eos=True)
    cached = [
        driver.run(PROMPT, params, adapter=adapter, namespace=namespace).cached_tokens
        for namespace in ("", "tenant")
        for adapter in (None, A, B, None, A, B)
    ]
    assert cached == [0, 0, 0, *[len(PROMPT)] * 3] * 2
    core.adapters.unload(A.key)
    core.adapters.load(NEWER_A)
    assert driver.run(PROMPT, params, adapter=NEWER_A).cached_tokens == 0


def test_an_adapter_goes_with_the_last_request_that_runs_with_it() -> None:
    backend = AdaptedBackend()
    core = make_core(backend)
    core.adapters.load(A)
    driver = Driver(core)
    ended, aborted = (driver.add(PROMPT[:4], SamplingParams(max_new_tokens=n), adapter=A) for n in (2, 99))
    driver.step()
    core.adapters.unload(A.key)
    with pytest.raises(NoAdapterError, match="lora is 'a'"):
        driver.add(PROMPT[:4], adapter=A)
    driver.step()
    assert driver.answers[ended].finish is not None and backend.adapters.attached
    driver.abort(aborted)
    assert not backend.adapters.attached and core.stats()["loras"] == 0
    core.adapters.unload(A.key)  # a second time does nothing


def test_one_that_is_loaded_again_while_it_leaves_stays() -> None:
    backend = AdaptedBackend()
    core = make_core(backend)
    core.adapters.load(A)
    driver = Driver(core)
    driver.add(PROMPT[:4], SamplingParams(max_new_tokens=4), adapter=A)
    driver.step()
    core.adapters.unload(A.key)
    core.adapters.attach(A, core.adapters.read(A))
    driver.drain()
    assert driver.run(PROMPT[:4], adapter=A).finish is not FinishReason.ERROR
    assert list(backend.adapters.attached.values()) == [A]


def test_a_backend_without_adapters_says_so() -> None:
    core = make_core(FakeBackend())
    with pytest.raises(InvalidValueError, match="natively served"):
        core.adapters.load(A)
    with pytest.raises(NoAdapterError):
        Driver(core).add(PROMPT, adapter=A)


@pytest.fixture
def thread() -> Iterator[EngineThread]:
    thread = EngineThread(make_core(AdaptedBackend()))
    yield thread
    thread.close()


def test_an_engine_thread_loads_beside_its_steps(thread: EngineThread) -> None:
    thread.load_adapter(A).result(10)
    thread.load_adapter(B, at_once=True).result(10)
    assert thread.stats()["loras"] == 2
    store = thread.core.adapters._store
    assert isinstance(store, FakeStore)
    store.refused.add("c")
    for at_once in (False, True):
        with pytest.raises(ModelLoadError, match="damaged"):
            thread.load_adapter(Adapter("c", "", ""), at_once=at_once).result(10)
        with pytest.raises(InvalidValueError, match="MAX_LORAS"):
            thread.load_adapter(Adapter("d", "", ""), at_once=at_once).result(10)
    thread.unload_adapter(A.key)
    inbox, ended = Inbox(), threading.Event()

    def sink(event):  # type: ignore[no-untyped-def]
        inbox(event)
        if event.finish is not None:
            ended.set()

    settings = Settings.resolve({}, {})
    thread.submit(make_work(thread.info, settings, "x", PROMPT, SamplingParams(), adapter=A), sink)
    assert ended.wait(10)
    # Nothing of it has run, so that another engine may.
    assert inbox.last.error_kind == NOT_STARTED and "lora is 'a'" in str(inbox.last.error)
    thread.close()
    for at_once in (False, True):
        with pytest.raises(EngineError):
            thread.load_adapter(A, at_once=at_once).result(10)


class Handle(FakeHandle):
    """Notes what it has; a test says when a load is done where ``patient``."""

    def __init__(self, index: int, info: EngineInfo, log: list[tuple[str, FakeHandle]]) -> None:
        super().__init__(index, info, log)
        self.loaded: list[Adapter] = []
        self.told: list[str] = []
        self.answer: Callable[[Future[None]], None] = lambda future: future.set_result(None)

    def load_adapter(self, adapter: Adapter, *, at_once: bool = False) -> Future[None]:
        self.told.append(f"load {adapter.key}{' at once' * at_once}")
        self.loaded.append(adapter)
        future: Future[None] = Future()
        self.answer(future)
        return future

    def unload_adapter(self, key: str) -> None:
        self.told.append(f"unload {key}")
        self.loaded = [adapter for adapter in self.loaded if adapter.key != key]


class AdaptedBench(Bench):
    def _make(self, index: int) -> Handle:
        handle = Handle(index, self.info, self.log)
        self.handles[index].append(handle)
        return handle

    def loaded(self) -> list[list[str]]:
        return [[adapter.key for adapter in self.handle(i).loaded] for i in range(len(self.handles))]

    def handle(self, index: int) -> Handle:
        handle = self[index]
        assert isinstance(handle, Handle)
        return handle

    def submit_with(self, name: str, adapter: Adapter) -> Inbox:
        work = make_work(self.info, Settings.resolve({}, {}), name, [2, 3], SamplingParams(), adapter=adapter)
        inbox = Inbox()
        with self.pool.reserve() as ticket:
            self.pool.submit(work, inbox, ticket)
        return inbox


def fail(error: Exception) -> Callable[[Future[None]], None]:
    return lambda future: future.set_exception(error)


def test_a_pool_loads_into_every_engine_and_those_that_start_later() -> None:
    bench = AdaptedBench().open()
    pool = bench.pool.adapters
    pool.load(A)
    assert bench.loaded() == [["a@f1"]] * 2 and pool.find("a") == A and pool.find("b") is None
    bench[0].die()
    bench.after(0)
    bench.after(1)
    bench[0].open()
    bench.pool.tick()
    # It has it before any request can reach it.
    assert bench.handle(0).told == ["load a@f1 at once"]
    bench.handle(0).answer = fail(ModelLoadError("gone"))  # one that is then missing keeps no engine down
    pool.unload("a")
    assert bench.loaded() == [[], []]


def test_a_load_that_fails_in_one_engine_is_undone_in_all() -> None:
    bench = AdaptedBench().open()
    bench.handle(1).answer = fail(ModelLoadError("It is damaged."))
    with pytest.raises(ModelLoadError, match="damaged"):
        bench.pool.adapters.load(A)
    assert bench.loaded() == [[], []] and bench.pool.adapters.all() == ()
    with pytest.raises(InvalidValueError, match="lora is 'a'"):
        bench.submit_with("x", A)
    assert bench.pool.stats().reserved == 0
    # An engine that dies meanwhile is no reason: it loads it when it is back.
    bench.handle(1).answer = fail(EngineError("died"))
    bench.pool.adapters.load(A)
    assert bench.pool.adapters.all() == (A,)
    for index in (0, 1):
        bench[index].die()
    bench.after(0)
    with pytest.raises(UnavailableError):
        bench.pool.adapters.load(B)
    assert bench.pool.adapters.all() == (A,)


def test_an_adapter_waits_for_its_requests_wherever_they_are() -> None:
    bench = AdaptedBench(num_engines=1, max_inflight_per_engine=1).open()
    pool = bench.pool.adapters
    pool.load(A)
    running, queued = bench.submit_with("r", A), bench.submit_with("q", A)
    assert bench.where("r") == 0 and bench.where("q") is None
    assert pool.unload("a") == 2
    with pytest.raises(InvalidValueError):
        bench.submit_with("late", A)
    pool.load(NEWER_A)  # of the same name, beside it
    bench[0].end("r")
    assert bench.where("q") == 0 and bench.loaded() == [["a@f1", "a@f3"]]
    bench[0].end("q")
    assert bench.loaded() == [["a@f3"]] and running.ended and queued.ended
    with pytest.raises(InvalidValueError, match="lora_name is 'b'"):
        pool.unload("b")


def test_a_queued_request_that_is_aborted_lets_its_adapter_go() -> None:
    bench = AdaptedBench(num_engines=1, max_inflight_per_engine=1).open()
    bench.pool.adapters.load(A)
    bench.submit_with("r", A)
    bench.submit_with("q", A)
    bench.pool.adapters.unload("a")
    bench.pool.abort("q")
    assert bench.loaded() == [["a@f1"]]
    bench.pool.abort("r")
    bench[0].confirm()
    assert bench.loaded() == [[]]


def test_names_and_room_are_checked() -> None:
    bench = AdaptedBench(max_loras=2).open()
    pool = bench.pool.adapters
    pool.load(A)
    with pytest.raises(InvalidValueError, match="lora_name is 'a'; it must be a name that no loaded"):
        pool.load(NEWER_A)
    pool.load(B)
    with pytest.raises(InvalidValueError, match="MAX_LORAS"):
        pool.load(Adapter("c", "", ""))
    assert bench.loaded() == [["a@f1", "b@f2"]] * 2


def test_a_request_that_an_engine_has_no_adapter_for_moves_once() -> None:
    bench = AdaptedBench().open()
    bench.pool.adapters.load(A)
    inbox = bench.submit_with("x", A)
    first = bench.where("x")
    assert first is not None
    bench[first].end("x", FinishReason.ERROR, "lora is 'a'", NOT_STARTED)
    assert bench.where("x") == 1 - first
    bench[1 - first].end("x")
    assert inbox.last.finish is FinishReason.LENGTH


def test_cache_aware_routing_keeps_adapters_apart() -> None:
    bench = AdaptedBench(scheduler_mode="cache_aware").open()
    pool = bench.pool.adapters
    pool.load(A)
    pool.load(B)
    settings, prompt = Settings.resolve({}, {}), list(range(2, 38)) * 3

    def send(name: str, adapter: Adapter | None) -> int:
        with bench.pool.reserve() as ticket:
            work = make_work(bench.info, settings, name, prompt, SamplingParams(), adapter=adapter)
            bench.pool.submit(work, Inbox(), ticket)
        where = bench.where(name)
        assert where is not None
        bench[where].end(name)
        return where

    # Equal loads take turns; only what is cached for the same adapter draws a request to an engine.
    homes = {adapter: send(f"{adapter}", adapter) for adapter in (A, B)}
    assert homes[A] != homes[B]
    for turn in range(3):
        for adapter in (B, A, A):
            assert send(f"{adapter}{turn}", adapter) == homes[adapter]
            bench.log.clear()
