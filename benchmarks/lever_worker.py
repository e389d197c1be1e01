"""An engine or a pool with given settings, and the workloads of ``levers.py`` and ``chunked_prefill.py``.

Options: model, settings (of ``Engine``), pool (an ``EnginePool`` in place of one engine). ``do`` names a
workload, which answers with figures by name. Prompts are random ids, the same for the same ``turn``, and no
round's are those of another; greedy, end-of-text ignored. Times are taken where the engine
hands a token over.
"""

from __future__ import annotations

import random
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from worker_protocol import serve

from mini_sglang import Engine, SamplingParams
from mini_sglang.api.starting import Model
from mini_sglang.config import Settings
from mini_sglang.engine.limits import make_work
from mini_sglang.types import TokenEvent

LIMIT_SECONDS = 600.0
Figures = dict[str, float]


@dataclass
class Job:
    """A request on its way. Times are ``time.perf_counter``'s."""

    ids: list[int]
    sent: float = 0.0
    tokens: list[float] = field(default_factory=list)
    cached: int = 0
    error: str | None = None
    ended: threading.Event = field(default_factory=threading.Event)
    reached: dict[int, threading.Event] = field(default_factory=dict)

    def take(self, event: TokenEvent) -> None:
        now = time.perf_counter()
        self.tokens += [now] * len(event.token_ids)
        for count, reached in self.reached.items():
            if len(self.tokens) >= count:
                reached.set()
        if event.finish is not None:
            self.cached, self.error = event.cached_tokens, event.error
            self.ended.set()

    @property
    def first(self) -> float:
        """Seconds to the first token."""
        return self.tokens[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        return [b - a for a, b in zip(self.tokens, self.tokens[1:], strict=False)]

    def wait(self) -> None:
        if not self.ended.wait(LIMIT_SECONDS):
            raise RuntimeError("a request does not end")
        if self.error is not None:
            raise RuntimeError(self.error)


class OneEngine:
    def __init__(self, options: dict[str, Any]) -> None:
        self.engine = Engine(options["model"], **options["settings"])
        self.about: dict[str, Any] = self.engine.description
        self.vocab_size = self.engine._thread.core.info.vocab_size
        self._made = 0

    def submit(self, job: Job, params: SamplingParams) -> None:
        thread, self._made = self.engine._thread, self._made + 1
        job.sent = time.perf_counter()
        request = thread.core.make_request(
            f"lever{self._made}", job.ids, params, inflight=thread.in_flight + 1
        )
        thread.submit(request, job.take)

    def clear(self) -> None:
        self.engine.clear_cache()


class Pool:
    def __init__(self, options: dict[str, Any]) -> None:
        given = {"model": options["model"], **options["settings"]}
        self.settings = Settings.resolve(given)
        self.pool = Model(self.settings, lambda line: None).start_pool()
        self.pool.wait_ready(LIMIT_SECONDS)
        while self.pool.state != "ready":
            time.sleep(0.05)
        self.about: dict[str, Any] = self.pool.info.description
        self.vocab_size = self.pool.info.vocab_size
        self._made = 0

    def submit(self, job: Job, params: SamplingParams) -> None:
        self._made += 1
        job.sent = time.perf_counter()
        with self.pool.reserve() as ticket:
            work = make_work(
                self.pool.info, self.settings, f"lever{self._made}", job.ids, params, inflight=ticket.inflight
            )
            self.pool.submit(work, job.take, ticket)

    def clear(self) -> None:
        """Nothing: the prompts of a round are its own."""


class Lever:
    """The workloads. Each of their arguments but ``turn`` is given by a row of the table."""

    def __init__(self, options: dict[str, Any]) -> None:
        begun = time.perf_counter()
        self._target = (Pool if options.get("pool") else OneEngine)(options)
        self._load_seconds = time.perf_counter() - begun
        self.about = self._target.about
        self._plain_ids = range(300, 3000) if self._target.vocab_size >= 3000 else range(3, 250)

    def load(self, turn: int) -> Figures:
        """How long the start took; the same each time."""
        return {"seconds": self._load_seconds}

    def burst(
        self, turn: int, requests: int, prompt: int, new: int, spread: bool = False, pause: float = 0.0
    ) -> Figures:
        """Requests at once, or ``pause`` seconds apart. ``spread``: every other answer is 8 times as long."""
        self._target.clear()
        jobs = [Job(self._ids(f"{turn} {n}", prompt)) for n in range(requests)]
        longer = [new * 8 if spread and n % 2 == 0 else new for n in range(requests)]
        start = time.perf_counter()
        for job, count in zip(jobs, longer, strict=True):
            self._target.submit(job, greedy(count))
            time.sleep(pause)
        return self._figures(jobs, start)

    def returning(
        self, turn: int, prefixes: int, length: int, question: int, new: int, order: Sequence[int]
    ) -> Figures:
        """One request after another, each a prefix (its number is in ``order``) and a question of its own."""
        self._target.clear()
        common = [self._ids(f"{turn} prefix {n}", length) for n in range(prefixes)]
        jobs = [
            Job([*common[n], *self._ids(f"{turn} question {at}", question)]) for at, n in enumerate(order)
        ]
        start = time.perf_counter()
        for job in jobs:
            self._target.submit(job, greedy(new))
            job.wait()
        return self._figures(jobs, start)

    def long_beside(self, turn: int, streams: int, prompt: int, new: int, long: int) -> Figures:
        """A prompt of ``long`` tokens comes in while ``streams`` answers are being made."""
        self._target.clear()
        jobs = [Job(self._ids(f"{turn} {n}", prompt)) for n in range(streams)]
        for job in jobs:
            job.reached[10] = threading.Event()
        start = time.perf_counter()
        for job in jobs:
            self._target.submit(job, greedy(new))
        for job in jobs:
            job.reached[10].wait(LIMIT_SECONDS)
        late = Job(self._ids(f"{turn} long", long))
        self._target.submit(late, greedy(4))
        figures = self._figures([*jobs, late], start)
        if late.tokens[0] > min(job.tokens[-1] for job in jobs):
            raise RuntimeError("the answers ended before the long prompt was computed: give them more tokens")
        gaps = [gap for job in jobs for gap in job.gaps]
        during = [
            b - a
            for job in jobs
            for a, b in zip(job.tokens, job.tokens[1:], strict=False)
            if b > late.sent and a < late.tokens[0]
        ]
        figures |= {
            "worst_gap": max(gaps),
            "gap_during": statistics.median(during),
            "gap_otherwise": statistics.median(gaps),
            "long_first": late.first,
            # Prompt tokens too: the same work whatever the settings.
            "all_tokens_per_s": (long + streams * (prompt + new)) / figures["seconds"],
        }
        return figures

    def urgent(self, turn: int, waiting: int, prompt: int, new: int, priority: int) -> Figures:
        """A request of some priority behind many that wait."""
        self._target.clear()
        jobs = [Job(self._ids(f"{turn} {n}", prompt)) for n in range(waiting)]
        start = time.perf_counter()
        for job in jobs:
            self._target.submit(job, greedy(new))
        late = Job(self._ids(f"{turn} late", prompt))
        self._target.submit(late, greedy(new, priority=priority))
        return self._figures([*jobs, late], start) | {"late_first": late.first}

    def _ids(self, name: str, count: int) -> list[int]:
        return random.Random(name).choices(self._plain_ids, k=count)

    def _figures(self, jobs: Sequence[Job], start: float) -> Figures:
        for job in jobs:
            job.wait()
        seconds = max(job.tokens[-1] for job in jobs) - start
        made = sum(len(job.tokens) for job in jobs)
        firsts = [job.first for job in jobs]
        return {
            "seconds": seconds,
            "tokens_per_s": made / seconds,
            "first": statistics.median(firsts),
            "first_mean": statistics.fmean(firsts),
            "gap": statistics.median(gap for job in jobs for gap in job.gaps),
            "cached": sum(job.cached for job in jobs) / sum(len(job.ids) for job in jobs),
        }


def greedy(new: int, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True, **more)


def workload(name: str) -> Callable[..., Figures]:
    """For a test that a row names a workload and its arguments."""
    found: Callable[..., Figures] = getattr(Lever, name)
    return found


if __name__ == "__main__":
    with suppress(BrokenPipeError, KeyboardInterrupt):
        serve(Lever)
