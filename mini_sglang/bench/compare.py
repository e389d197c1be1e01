"""The rounds of a comparison: each side in a process of its own, one after another, in alternating order."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

from mini_sglang.bench.machine import busy_seconds
from mini_sglang.bench.process import PeerError, Process
from mini_sglang.bench.runs import QUIET, Run, read_reply
from mini_sglang.bench.sides import START_SECONDS, Side

REST = 0.4
"""Seconds before each answer; Intel's OpenMP spins for 0.2 after its last work."""
WARM_NEW = 64
"""New ids of a turn of the warm-up, at most: enough for whatever is made or compiled at first use."""


@dataclass
class Seat:
    """A side at work, and what came of it.

    Attributes:
        process: None before it starts, and once it has failed.
        runs: of the measured rounds.
        reason: why it has no figures, in one sentence.
        start_seconds: until it took requests.
        about: what its process said of itself.
    """

    side: Side
    process: Process | None = None
    runs: list[Run] = field(default_factory=list)
    reason: str | None = None
    start_seconds: float | None = None
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """How sides are compared.

    Args:
        prompt: the ids of a turn (from 0) of a round; round 0 is the warm-up.
        turns: of a round.
        new: ids of each answer.
        rounds: that are measured, after one that is not.
        answer_seconds: after which a side that does not answer is ended.
        start_seconds: the same for its start.
        wait: seconds that are waited at most for other processes to be quiet, before each answer.
        step: is told what begins.
        clock: of the outer times.
    """

    prompt: Callable[[int, int], list[int]]
    turns: int
    new: int
    rounds: int
    answer_seconds: float
    start_seconds: float = START_SECONDS
    wait: float = 0.0
    step: Callable[[str], None] = lambda line: None
    clock: Callable[[], float] = time.perf_counter

    def run(self, sides: Sequence[Side]) -> list[Seat]:
        """All rounds of a group; a side that fails does not take part any more, and the others go on."""
        seats = [Seat(side, reason=side.missing) for side in sides]
        end = Process.kill
        try:
            with _terminable():
                for seat in seats:
                    if seat.reason is None:
                        self._start(seat)
                for number in range(self.rounds + 1):
                    for seat in seats if number % 2 else seats[::-1]:
                        if seat.process is not None:
                            self._converse(seat, seat.process, number)
            end = Process.close
        finally:
            for seat in seats:
                if seat.process is not None:
                    end(seat.process)
                    seat.process = None
        return seats

    def _start(self, seat: Seat) -> None:
        self.step(f"{seat.side.name}: starting")
        begun = self.clock()
        try:
            seat.process = seat.side.start(self.start_seconds)
        except PeerError as error:
            seat.reason = _sentence(seat, error)
            return
        seat.start_seconds = self.clock() - begun
        seat.about = seat.process.about
        seat.process.usage.hold()

    def _converse(self, seat: Seat, process: Process, number: int) -> None:
        process.usage.resume()
        for turn in range(self.turns):
            what = f"round {number}, turn {turn + 1}" if number else f"warm-up, turn {turn + 1}"
            self.step(f"{seat.side.name}: {what}")
            try:
                run = self._ask(seat.side, process, number, turn)
            except PeerError as error:
                seat.reason = _sentence(seat, error)
            else:
                seat.reason = run.reason
                if number:
                    seat.runs.append(run)
            if seat.reason:
                process.kill()
                seat.process = None
                return
        process.usage.hold()

    def _ask(self, side: Side, process: Process, number: int, turn: int) -> Run:
        ids = self.prompt(number, turn)
        new = self.new if number else min(self.new, WARM_NEW)
        rest(self.wait)
        cpu, busy, begun = process.usage.cpu_seconds(), busy_seconds(), self.clock()
        reply = process.ask(self.answer_seconds, ids=[ids], new=new, cold=False)
        wall = self.clock() - begun
        busy, cpu = busy_seconds() - busy, process.usage.cpu_seconds() - cpu
        fields, reason = read_reply(reply, new, wall)
        return Run(
            peer=side.name,
            group=side.group,
            round=number,
            turn=turn + 1,
            prompt_tokens=len(ids),
            wall=wall,
            cpu_seconds=cpu,
            peak_bytes=process.usage.peak_bytes(),
            others=max(0.0, busy - cpu) / wall if wall > 0 else 0.0,
            reason=reason,
            **fields,
        )


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM is an exception meanwhile: what is held still would otherwise stay behind, and for ever."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def rest(wait: float) -> None:
    """Let threads that spin go to sleep; then wait for other processes, at most ``wait`` seconds."""
    end = time.perf_counter() + wait
    time.sleep(REST)
    while time.perf_counter() < end:
        busy = busy_seconds()
        time.sleep(REST)
        if busy_seconds() - busy < QUIET * REST:
            break


def _sentence(seat: Seat, error: PeerError) -> str:
    """The reason without the worker's name, which the row has already."""
    worker = seat.side.worker
    name = worker.stem.removeprefix("run_") if isinstance(worker, Path) else worker
    return str(error).removeprefix(f"{name}: ")
