"""An engine's process that saves its cache at its end gets the time it takes, and no more than it needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest

from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.process import ProcessEngine
from mini_sglang.engine.wire import Setup

from .fake_backend import EOS_IDS, FakeBackend, FakeStore
from .test_process import gone, submit, until

PROMPT = [2 + i % 9 for i in range(40)]


class SlowStore(FakeStore):
    def read(self, pages: Sequence[int], slots: Sequence[int]) -> Iterator[bytes]:
        time.sleep(1.5)
        return super().read(pages, slots)


def slow_to_save(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    """What the child loads."""
    backend = FakeBackend(256, 4)
    backend._store = SlowStore(backend)
    core = EngineCore(backend, settings, EOS_IDS)
    core.saved_cache = settings.prefix_cache_file
    return core


@pytest.mark.parametrize("hurry", [False, True])
def test_the_parent_waits_for_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hurry: bool) -> None:
    monkeypatch.setattr("mini_sglang.engine.process.CLOSE_GRACE", 0.5)
    path = tmp_path / "cache"
    settings = Settings.resolve({"prefix_cache_file": path, "max_context_margin": 0}, {})
    lines: list[str] = []
    backend = "tests.engine.test_saving_process:slow_to_save"
    engine = ProcessEngine(0, settings, backend, notify=lines.append)
    until(lambda: engine.state != "starting")
    assert engine.state == "ready", engine.failure
    pid = engine.pid
    assert pid is not None
    submit(engine, "r", PROMPT).wait()
    if hurry:
        engine.kill("at once")
    engine.close()
    assert gone(pid)
    assert path.exists() is not hurry
    assert (lines == [f"Saving the prefix cache to {path} …"]) is not hurry
