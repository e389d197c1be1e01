"""One way to load a model for the public engine, a served engine's thread and its process."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from mini_sglang import Engine
from mini_sglang.api.starting import Model, make_core
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.process import plain_settings
from mini_sglang.engine.wire import Setup
from mini_sglang.engine.worker import EngineThread
from tests.api.serving import settle


@pytest.fixture
def threads() -> Iterator[None]:
    before, cores = torch.get_num_threads(), os.sched_getaffinity(0)
    yield
    torch.set_num_threads(before)
    os.sched_setaffinity(0, cores)


def silent(line: str) -> None:
    """No lines for the user."""


def resolve(**more: object) -> Settings:
    return Settings.resolve({"dtype": "fp32", "device": "cpu", **more}, {"NUM_THREADS": "1"})


def served_in_process(model: Path, num_engines: int, **more: object) -> EngineCore:
    """The core that a child process would make, made here."""
    settings = resolve(model_local_dir=model, num_engines=num_engines, **more)
    setup = Setup(0, num_engines, plain_settings(settings), {"model": "a/b", "source": "huggingface"})
    return make_core(settings, setup, silent)


def served_in_thread(model: Path, num_engines: int) -> EngineThread:
    settings = resolve(model=str(model), num_engines=num_engines, engine_isolation="thread")
    handle = Model(settings, silent)._make_handle(0)
    assert isinstance(handle, EngineThread)
    settle(lambda: handle.state != "starting", "the engine")
    assert handle.state == "ready", handle.failure
    return handle


def test_served_engines_share_the_memory_and_the_public_one_does_not(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr("mini_sglang.backend.native_model.free_memory", lambda device: 8 << 20)
    with Engine(str(tiny_model), dtype="fp32", num_engines=4) as engine:
        whole = engine.description["kv_tokens"]
    assert served_in_process(tiny_model, 1).info.kv_tokens == whole
    quarter = served_in_process(tiny_model, 4).info.kv_tokens
    assert quarter * 4 <= whole < (quarter + 16) * 4
    thread = served_in_thread(tiny_model, 4)
    thread.close()
    assert thread.core.info.kv_tokens == quarter


def test_engines_in_processes_share_the_cores_of_their_cgroup(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    monkeypatch.setattr("mini_sglang.backend.device.choose_threads", lambda setting: setting or 7)
    for num_engines, each in ((2, 3), (3, 2), (8, 1)):
        core = served_in_process(tiny_model, num_engines, num_threads=0, kv_token_budget=256)
        assert core.info.description["threads"] == each
    core = served_in_process(tiny_model, 2, num_threads=5, kv_token_budget=256)
    assert core.info.description["threads"] == 5


@pytest.mark.parametrize("home", ["public", "thread", "process"])
def test_every_engine_logs_what_was_set_up(
    tiny_model: Path, caplog: pytest.LogCaptureFixture, threads: None, home: str
) -> None:
    with caplog.at_level(logging.INFO, logger="mini_sglang"):
        if home == "public":
            Engine(str(tiny_model), dtype="fp32").close()
        elif home == "thread":
            served_in_thread(tiny_model, 1).close()
        else:
            served_in_process(tiny_model, 1)
    name = "model=a/b source=huggingface" if home == "process" else f"model={tiny_model.name} source=local"
    lines = [record.getMessage() for record in caplog.records]
    (line,) = [line for line in lines if line.startswith("set up ")]
    assert name in line and " device=cpu " in line and line.endswith(" eos_ids=[2]")
    assert " threads=1 " in line and " dtype=float32 " in line


def test_engines_in_processes_keep_to_cores_of_their_own(tiny_model: Path) -> None:
    cores = len(os.sched_getaffinity(0))
    settings = resolve(model=str(tiny_model), num_engines=2, kv_token_budget=512)
    pool = Model(settings, silent).start_pool()
    try:
        settle(lambda: pool.state == "ready", "both engines")
        processes = [p for p in psutil.Process().children() if "process_main" in " ".join(p.cmdline())]
        first, second = (set(process.cpu_affinity()) for process in processes)
        if cores > 1:
            assert first.isdisjoint(second) and len(first | second) == cores
        else:
            assert first == second
    finally:
        pool.close()
