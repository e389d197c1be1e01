"""F1 and F7: an engine is killed, or a step hangs. What ran there ends with a word, and the rest goes on."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from benchmarks.reliability.client import ask as http
from benchmarks.reliability.endings import second_sigterm
from benchmarks.reliability.faulty import Fault
from benchmarks.reliability.ledger import Ask
from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import Server, settle
from benchmarks.reliability.witness import (
    Streams,
    Watch,
    asks_of,
    check_aftermath,
    server_of,
    stream_all,
    streaming,
)

SOON = 2.0
"""Seconds after a death within which its streams must have their error event."""
# Long enough for a healthy step while everything else on the machine is busy.
STEP_TIMEOUT = 5.0
TOLD = 4


@dataclass(frozen=True, slots=True)
class Stage:
    """A server of two engines, and streams that fill both: half of each engine's run there, half wait there.

    Attributes:
        told: how many of the streams are of ``/v1/responses``; the others are ``asks``.
        quiet: the streams' undisturbed answers.
    """

    server: Server
    folder: Path
    asks: list[Ask]
    tokens: int
    quiet: Streams

    @property
    def batch(self) -> int:
        return (len(self.asks) + TOLD) // 4

    def fault(self, fault: Fault) -> Path:
        """Have engine 0 fail; the file that has it so."""
        file = self.folder / "fault"
        fault.put(file)
        return file

    def engine(self, index: int) -> psutil.Process:
        found = [one for one in self.server.children() if _arguments(one)[-2:] == ["--engine", str(index)]]
        (engine,) = found
        return engine

    def restarts(self) -> int:
        """How often engine 0 was started again."""
        return int(self.server.metrics()["engines"][0]["restarts"])

    def wait_ready(self) -> None:
        settle(
            lambda: all(one["state"] == "ready" for one in self.server.metrics()["engines"]),
            "every engine",
            every=0.1,
        )

    def aftermath(self, row: Row) -> None:
        check_aftermath(row, self.server, self.asks[0], self.quiet.entries[0])


@contextmanager
def stage(row: Row, streams: int, tokens: int, **settings: Any) -> Iterator[Stage]:
    batch = streams // 4
    settings = {"step_timeout": STEP_TIMEOUT, "drain_timeout": 60, **settings}
    with server_of(
        num_engines=2,
        max_batch_size=batch,
        max_inflight_per_engine=2 * batch,
        module="benchmarks.reliability.faulty",
        **settings,
    ) as (server, folder):
        server.wait_ready()
        asks = asks_of(streams - TOLD, tokens)
        quiet = asyncio.run(stream_all(server.port, asks, TOLD, tokens))
        bad = quiet.unlike(quiet) + quiet.ill_ended()
        row.check("the undisturbed run is whole", bad[:3] or "it is", not bad and not quiet.failed)
        made = Stage(server, folder, asks, tokens, quiet)
        made.wait_ready()
        yield made


def killed(size: Size) -> Row:
    """F1: ``kill -9`` of one engine, then of all."""
    row = Row("F1", "kill -9 of an engine under streams")
    with stage(row, size.of(64, 32), size.of(400, 200)) as on:
        kill_one(row, on)
        kill_all(row, on)
        waits = [float(one) for one in re.findall(r"engine 0 died.* again in ([0-9.]+) s", on.server.said)]
        row.check("back-off grows with each death", waits, waits == sorted(set(waits)) and len(waits) >= 2)
    return row


def hung(size: Size) -> Row:
    """F7: steps that hang, the first of a life too; a stopped process; the end of engines that hang."""
    row = Row("F7", "a step that hangs")
    with stage(row, size.of(64, 32), size.of(400, 200)) as on:
        hang_one(row, on)
        hang_at_start(row, on)
        suspend_one(row, on)
        second_sigterm(row, on.server, hang=True)
    return row


def kill_one(row: Row, on: Stage) -> None:
    with Watch(on.server.port) as watch:
        seen = _disturb(row, on, lambda: on.engine(0).kill())
        settle(
            lambda: watch.states(0)[-2:] == ["starting", "ready"], "the engine to be seen ready", every=0.1
        )
    _truth(row, watch)
    row.check("the dead engine is seen dead, starting, ready", watch.states(0), watch.states(0)[-3] == "dead")
    row.figures["lost"], row.figures["streams"] = seen.failed, len(on.asks) + TOLD
    on.aftermath(row)
    row.check_log(on.server.said)


def hang_one(row: Row, on: Stage) -> None:
    """A hang in the midst of streams."""
    process = on.engine(0)
    with Watch(on.server.port) as watch:
        _disturb(row, on, lambda: on.fault(Fault("hang")), STEP_TIMEOUT)
        settle(
            lambda: watch.states(0)[-2:] == ["starting", "ready"], "the engine to be seen ready", every=0.1
        )
    _truth(row, watch)
    row.check("its process is gone", process.is_running(), not process.is_running())
    said = f"gave no sign of life for {STEP_TIMEOUT:g} s (STEP_TIMEOUT)" in on.server.said
    row.check("the log says what ended it", said, said)
    on.aftermath(row)


def hang_at_start(row: Row, on: Stage) -> None:
    """A restarted engine whose first step hangs is never ready, and is ended as well."""
    before = on.restarts()
    file = on.fault(Fault("hang", stays=True))
    with Watch(on.server.port) as watch:
        on.engine(0).kill()
        settle(lambda: on.restarts() >= before + 2, "its second death", every=0.1)
        states = watch.states(0)
        file.unlink()
        settle(
            lambda: watch.states(0)[-2:] == ["starting", "ready"], "the engine to be seen ready", every=0.1
        )
    _truth(row, watch)
    row.check("never ready while its first step hangs", states, "ready" not in states[1:])
    on.aftermath(row)


def _arguments(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:  # also one that has ended and was not waited for yet
        return []


def suspend_one(row: Row, on: Stage) -> None:
    """A process that the system does not run any more."""
    process = on.engine(0)
    process.suspend()
    seconds = settle(lambda: not process.is_running() or process.status() == psutil.STATUS_ZOMBIE, "its end")
    bound = STEP_TIMEOUT + SOON
    row.check(
        f"a stopped process is ended within {bound:g} s", f"{seconds:.1f} s", seconds < bound, timed=True
    )
    on.wait_ready()


def kill_all(row: Row, on: Stage) -> None:
    """No engine is left: refusals with Retry-After, and all come back."""
    with Watch(on.server.port) as watch:
        for index in (0, 1):
            on.engine(index).kill()
        settle(lambda: on.server.status("/ready") == 503, "no engine to be ready", every=0.005)
        body = on.asks[0].body(stream=True)
        status, headers, _ = asyncio.run(http(on.server.port, on.asks[0].path, body))
        on.wait_ready()
    refused = status == 503 and int(headers.get("retry-after", 0)) >= 1
    row.check("with no engine: 503 and Retry-After", f"{status}, {headers.get('retry-after')}", refused)
    _truth(row, watch, others=False)
    on.aftermath(row)


def _disturb(row: Row, on: Stage, harm: Callable[[], object], delay: float = 0.0) -> Streams:
    """Have the streams run, do harm to engine 0 once both engines are full, and check what became of them."""
    batch = on.batch

    def full() -> bool:
        engines = on.server.metrics()["engines"]
        return all(one["running"] == batch and one["waiting"] == batch for one in engines)

    moved = on.server.metrics()["resubmitted"]
    with streaming(on.server.port, on.asks, TOLD, on.tokens) as found:
        settle(full, "full engines", every=0.005)
        harm()
        at = time.perf_counter()
    (seen,) = found
    bad, messages = seen.ill_ended(), seen.messages()
    row.check(
        "those that end do so with one error event, no [DONE], no bare end", bad[:3] or messages, not bad
    )
    # Fewer where some had their last token by then.
    ran = 0 < seen.failed <= batch
    row.check(f"only what ran there is lost: 1 to {batch}", seen.failed, ran)
    other = seen.unlike(on.quiet)
    row.check("all others have the ids of the undisturbed run", other[:3] or "they have", not other)
    moved = on.server.metrics()["resubmitted"] - moved
    row.check(f"what waited there was moved, once: 1 to {batch}", moved, 0 < moved <= batch)
    late = seen.ended_by() - at - delay
    after = f" after STEP_TIMEOUT of {delay:g} s" if delay else ""
    row.check(f"the error events come within {SOON:g} s{after}", f"{late:.2f} s", late <= SOON, timed=True)
    row.figures["error_events_seconds"] = round(late, 3)
    return seen


def _truth(row: Row, watch: Watch, *, others: bool = True) -> None:
    lies = watch.lies()
    row.check("/health and /ready tell the truth meanwhile", lies[:3] or "they do", not lies)
    if others:
        row.check("the other engine is ready throughout", watch.states(1), watch.states(1) == ["ready"])
