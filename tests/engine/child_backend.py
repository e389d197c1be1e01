"""What an engine's child process loads in tests: the fake backend, with tokens that do harm."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence

from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.wire import Setup
from mini_sglang.errors import ModelLoadError

from .fake_backend import EOS_IDS, FakeBackend, KVCorruption

KILL, HANG, CRASH = 39, 38, 37
"""A prompt of five of these ends the process, never ends, or raises what ends the engine."""


class HarmfulBackend(FakeBackend):
    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        told = {
            step.token_ids[0]
            for step in steps
            if len(step.token_ids) == 5 and len(set(step.token_ids)) == 1 and step.start == 0
        }
        if KILL in told:
            os.kill(os.getpid(), signal.SIGKILL)
        if HANG in told:
            time.sleep(3600)
        if CRASH in told:
            raise KVCorruption("a bug")
        return super().run(steps)


def make_core(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    notify(f"Loading engine {setup.index} …")
    print("a library that prints")  # must not reach the journal
    backend = HarmfulBackend(256, 4, delay=float(os.environ.get("FAKE_DELAY", "0")))
    return EngineCore(backend, settings, EOS_IDS, {**setup.description, "made": "fake"})


def broken(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    raise ModelLoadError("model.gguf ends after 12 of 4096 bytes.")


def buggy(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    raise KeyError("rope_theta")


def slow(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    notify("slow")
    time.sleep(3600)
    raise AssertionError
