"""Fixtures for the command line: the fake engine in this process, and the driver on a terminal."""

from __future__ import annotations

import io
import logging
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from mini_sglang.cli import doors, main
from mini_sglang.logs import LOGGER_NAME
from tests.cli.fake_engine import FakeEngine
from tests.cli.process import OnTerminal


@dataclass
class Ran:
    status: int
    out: str
    err: str
    engine: Any


@pytest.fixture(autouse=True)
def _same_logging_after() -> Iterator[None]:
    logger = logging.getLogger(LOGGER_NAME)
    before = (logger.level, list(logger.handlers), logger.propagate)
    yield
    logger.level, logger.handlers[:], logger.propagate = before
    logger.setLevel(before[0])


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Run a command in this process: ``cli("generate", "hi", stdin=b"…")``."""

    def run(*args: str, stdin: bytes = b"", door: str = "main") -> Ran:
        engines: list[FakeEngine] = []
        monkeypatch.setattr(FakeEngine, "made", staticmethod(engines.append))
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin), encoding="ascii"))
        doorway = {"main": main, "demo": doors.demo, "smoke": doors.smoke_test}[door]
        status = doorway(args, FakeEngine)
        captured = capsys.readouterr()
        return Ran(status, captured.out, captured.err, engines[0] if engines else None)

    return run


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., OnTerminal]]:
    """Start the driver on a pseudo-terminal: ``on_terminal("main", "chat")``."""
    started: list[OnTerminal] = []

    def start(*args: str, stdout: int | None = None) -> OnTerminal:
        started.append(OnTerminal(args, stdout))
        return started[-1]

    yield start
    for terminal in started:
        terminal.close()
