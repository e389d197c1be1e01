"""One load on one server, from its sessions to its figures."""

from __future__ import annotations

import asyncio
import gc
import itertools
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

from tqdm import tqdm

from mini_sglang.bench.load.arrivals import planned
from mini_sglang.bench.load.figures import row
from mini_sglang.bench.load.generator import Generator, Load, Request
from mini_sglang.bench.load.options import Work
from mini_sglang.bench.wire.client import Client
from mini_sglang.bench.wire.detect import Found

SAMPLE = 1000
"""Sessions that are looked at for how many requests one has on average."""
LATE = 0.01
"""Seconds; what a busy machine's timers are off by is less."""
OWN_CPU = 0.7
"""Of a core: with more, this client itself may be what is slow."""


@dataclass(frozen=True)
class Pace:
    """How fast, and how long: ``rate`` requests a second or ``concurrency`` at once; one of each pair."""

    rate: float | None
    concurrency: int | None
    requests: int | None
    duration: float | None


@dataclass
class Measured:
    """``cpu_seconds``: what this process worked meanwhile."""

    load: Load
    row: dict[str, Any]
    cpu_seconds: float


async def measure(
    server: Found,
    client: Client,
    work: Work,
    pace: Pace,
    *,
    seed: int | None = None,
    title: str = "",
    on_generator: Callable[[Generator], None] = lambda generator: None,
) -> Measured:
    """Put one load on a server.

    Args:
        seed: of prompts and arrivals; that of ``work`` by default.
        title: before the progress bar.
        on_generator: is given the generator, which can be stopped.

    Raises:
        MiniSglangError: a dataset that cannot be made.
    """
    form = work.form(server.dialect)
    seed = work.seed if seed is None else seed
    sessions = work.sessions(form, seed)
    sample = list(itertools.islice(sessions, SAMPLE))
    each = sum(len(session.turns) for session in sample) / len(sample)
    sessions = itertools.chain(sample, sessions)
    wanted = None if pace.requests is None else max(1, round(pace.requests / each))
    with _bar(title, None if pace.requests is None else round((wanted or 0) * each)) as done:
        generator = Generator(
            partial(client.ask, server.dialect), form, {**work.asked, "model": server.model}, done
        )
        on_generator(generator)
        if pace.rate is not None:
            times = planned(pace.rate / each, seed, wanted, pace.duration)
            ready = list(itertools.islice(sessions, len(times)))
            with _without_garbage():
                cpu = time.process_time()
                load = await generator.open_loop(times, ready)
        else:
            assert pace.concurrency is not None
            with _without_garbage():
                cpu = time.process_time()
                endless = sessions if wanted is None else itertools.islice(sessions, wanted)
                load = await generator.closed_loop(pace.concurrency, endless, pace.duration)
        cpu = time.process_time() - cpu
    figures = row(load, work.goals)
    return Measured(load, {**pace_json(pace), **figures, "client_cpu_seconds": cpu}, cpu)


def pace_json(pace: Pace) -> dict[str, Any]:
    rate = "inf" if pace.rate == float("inf") else pace.rate
    return {"request_rate": rate, "concurrency": pace.concurrency}


@contextmanager
def stopped_by_ctrl_c(stop: Callable[[], None]) -> Iterator[None]:
    """The first Ctrl-C calls ``stop``, the next one is as always."""
    loop = asyncio.get_running_loop()

    def pressed() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        stop()

    # Only the main thread of a Unix has them.
    with suppress(NotImplementedError, RuntimeError, ValueError):
        loop.add_signal_handler(signal.SIGINT, pressed)
    try:
        yield
    finally:
        with suppress(NotImplementedError, RuntimeError, ValueError):
            loop.remove_signal_handler(signal.SIGINT)


def warnings(server: Found, work: Work, measured: Measured) -> list[str]:
    """What a reader of the figures has to know, a sentence each without its full stop."""
    figures, found = measured.row, []
    if figures["itl_of"] == "pieces" or not server.dialect.gives_ids:
        found.append(server.dialect.note or "gaps are those between pieces of text")
    if work.form(server.dialect) != "ids" and not work.is_file:
        found.append("prompts are texts: lengths asked for are words, prompt tokens are the server's count")
    if figures["short"]:
        found.append(f"{figures['short']} answers ended before the tokens that were asked for")
    lag = figures["lag"]
    if lag is not None and figures["concurrency"] is None and lag["p99"] > LATE:
        late = f"p99 {lag['p99'] * 1e3:.0f} ms"
        found.append(f"the generator fell behind, {late}; believe the figures from planned times")
    share = measured.cpu_seconds / measured.load.duration if measured.load.duration else 0.0
    if share > OWN_CPU:
        found.append(f"this client worked {share:.0%} of a core, and may be the limit itself")
    if measured.load.interrupted:
        found.append(f"stopped before its end; {figures['unfinished']} requests were given up")
    return found


@contextmanager
def _without_garbage() -> Iterator[None]:
    """The collector does not walk over the prepared prompts while times are taken."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def _bar(title: str, total: int | None) -> Iterator[Callable[[Request], None]]:
    tokens = failed = 0
    with tqdm(
        total=total, desc=title or None, unit=" requests", file=sys.stderr, disable=None, leave=False
    ) as bar:
        start = time.monotonic()

        def done(request: Request) -> None:
            nonlocal tokens, failed
            tokens += request.output_tokens or 0
            failed += request.error is not None
            bar.update()
            if not bar.disable:
                rate = tokens / max(1e-9, time.monotonic() - start)
                bar.set_postfix_str(f"{rate:.0f} tokens/s" + (f", {failed} failed" if failed else ""))

        yield done
