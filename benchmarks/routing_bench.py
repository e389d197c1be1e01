"""What cache-aware routing is worth: prompts with shared prefixes over two engines, against taking turns.

    python benchmarks/routing_bench.py [--model FOLDER_OR_GGUF | --tiny] [--rounds 4] [--json FILE]

Each prompt is one of ``--groups`` long prefixes and a question of its own. An engine's KV pool holds a good
half of the prefixes: shared out between two engines they fit, all of them in each they do not. For each
scheduler mode there is a pool of real engines, each in a process of its own; the pools get the same prompts,
``--running`` at a time, and take turns over rounds. The hit rate is cached tokens over prompt tokens, cold
start included; the time to first token counts from the request's way into the pool.

Exit status 1 where a request fails, cache_aware has no higher hit rate than rr, or an engine gets less than
``--least-share`` of its pool's requests.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_sglang.api.starting import Model
from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.config import Settings
from mini_sglang.engine.limits import make_work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.types import FinishReason, SamplingParams, TokenEvent

MODES = ("rr", "cache_aware")
LIMIT_SECONDS = 600.0


@dataclass
class Workload:
    """Prompts as token ids; ``kv_tokens`` is what an engine's pool is to hold."""

    groups: int
    prefix: int
    question: int
    new: int
    running: int
    seed: int = 1
    first_id: int = 3
    ids: int = 256

    @property
    def kv_tokens(self) -> int:
        sequence = self.prefix + self.question + self.new + 16
        running = -(-self.running // 2) + 1
        return round(0.6 * self.groups) * sequence + running * (self.question + self.new + 32)

    def prompts(self, round_: int, count: int) -> list[list[int]]:
        """The same for every pool; no question comes twice, and each prefix about as often as any other."""
        chance = random.Random(f"{self.seed} {round_}")
        order = [number % self.groups for number in range(count)]
        chance.shuffle(order)
        return [[*self._ids(f"prefix {g}", self.prefix), *self._ids(f"{round_} {n}", self.question)]
                for n, g in enumerate(order)]  # fmt: skip

    def _ids(self, name: str, count: int) -> list[int]:
        chance = random.Random(f"{self.seed} {name}")
        return chance.choices(range(self.first_id, self.first_id + self.ids), k=count)


@dataclass
class Outcome:
    """What one pool made of its prompts."""

    prompt_tokens: int = 0
    cached_tokens: int = 0
    first_tokens: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)

    @property
    def hit_rate(self) -> float:
        return self.cached_tokens / max(1, self.prompt_tokens)


def serve(pool: EnginePool, settings: Settings, load: Workload, prompts: Sequence[list[int]], out: Outcome,
          name: str = "r") -> None:  # fmt: skip
    """Run the prompts through a pool, ``load.running`` at a time, and add what came to ``out``."""
    params = SamplingParams(max_new_tokens=load.new, temperature=0, ignore_eos=True)
    room = threading.BoundedSemaphore(load.running)
    lock = threading.Lock()

    def submit(number: int, ids: list[int]) -> None:
        work = make_work(pool.info, settings, f"{name}{number}", ids, params)
        started = time.perf_counter()
        heard = False

        def sink(event: TokenEvent) -> None:
            nonlocal heard
            with lock:
                if event.token_ids and not heard:
                    heard = True
                    out.first_tokens.append(time.perf_counter() - started)
                if event.finish is None:
                    return
                out.prompt_tokens += event.prompt_tokens
                out.cached_tokens += event.cached_tokens
                if event.finish is not FinishReason.LENGTH:
                    out.failures.append(event.error or str(event.finish))
            room.release()

        with pool.reserve() as ticket:
            pool.submit(work, sink, ticket)

    for number, ids in enumerate(prompts):
        assert room.acquire(timeout=LIMIT_SECONDS), "a request does not end"
        submit(number, ids)
    for _ in range(load.running):
        assert room.acquire(timeout=LIMIT_SECONDS), "a request does not end"


@contextmanager
def pools(path: str, load: Workload, **settings: Any) -> Iterator[dict[str, tuple[EnginePool, Settings]]]:
    """A pool of two engines for each mode."""
    found: dict[str, tuple[EnginePool, Settings]] = {}
    try:
        for mode in MODES:
            resolved = Settings.resolve(
                {
                    "model_local_dir": path,
                    "num_engines": 2,
                    "scheduler_mode": mode,
                    "kv_token_budget": load.kv_tokens,
                    "prefix_cache": True,
                    **settings,
                }
            )
            found[mode] = Model(resolved, lambda line: None).start_pool(), resolved
        for pool, _ in found.values():
            pool.wait_ready(LIMIT_SECONDS)
            deadline = time.monotonic() + LIMIT_SECONDS
            while pool.state != "ready" and time.monotonic() < deadline:
                time.sleep(0.05)
        yield found
    finally:
        for pool, _ in found.values():
            pool.close()


def compare(path: str, load: Workload, rounds: int, requests: int, **settings: Any) -> dict[str, Outcome]:
    """Every mode's outcome for the same prompts."""
    outcomes = {mode: Outcome() for mode in MODES}
    with pools(path, load, **settings) as found:
        for round_ in range(rounds):
            prompts = load.prompts(round_, requests)
            for mode in MODES if round_ % 2 else MODES[::-1]:
                pool, resolved = found[mode]
                serve(pool, resolved, load, prompts, outcomes[mode], f"{round_}.")
        for mode, (pool, _) in found.items():
            # An engine tells its counters a few times a second.
            deadline = time.monotonic() + 30
            counts: list[int] = []
            while sum(counts) < rounds * requests and time.monotonic() < deadline:
                time.sleep(0.1)
                counts = [engine.counters.get("requests", 0) for engine in pool.stats().engines]
            outcomes[mode].shares = [count / max(1, sum(counts)) for count in counts]
    return outcomes


def problems(outcomes: dict[str, Outcome], least_share: float) -> list[str]:
    """What must hold and does not."""
    found = [f"{mode}: {one.failures[0]}" for mode, one in outcomes.items() if one.failures]
    mine, theirs = outcomes["cache_aware"], outcomes["rr"]
    if mine.hit_rate <= theirs.hit_rate:
        found.append(f"cache_aware hits {mine.hit_rate:.3f}, rr {theirs.hit_rate:.3f}")
    for mode, one in outcomes.items():
        if min(one.shares) < least_share:
            found.append(f"{mode}: an engine got {min(one.shares):.0%} of the requests")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a local folder or .gguf file; by default what the engine would take")
    parser.add_argument("--tiny", action="store_true", help="a tiny random model")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--requests", type=int, default=60, help="of each pool in a round")
    parser.add_argument("--groups", type=int, default=10, help="prefixes")
    parser.add_argument("--prefix", type=int, default=384, help="tokens of a prefix")
    parser.add_argument("--question", type=int, default=32, help="tokens of what follows it")
    parser.add_argument("--new", type=int, default=8, help="tokens of an answer")
    parser.add_argument("--running", type=int, default=4, help="requests at a time")
    parser.add_argument("--least-share", type=float, default=0.25)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    load = Workload(args.groups, args.prefix, args.question, args.new, args.running)
    with tempfile.TemporaryDirectory() as folder:
        if args.tiny:
            from tests.tiny_folders import tiny_folder

            path = str(tiny_folder(Path(folder) / "tiny", max_position_embeddings=4096))
        else:
            settings = Settings.resolve({"model": args.model})
            path = str(resolve_model(settings, notify=lambda line: print(line, file=sys.stderr)).path)
        outcomes = compare(path, load, args.rounds, args.requests)

    print(
        f"{Path(path).name}: {args.rounds} x {args.requests} requests, {args.groups} prefixes of "
        f"{args.prefix} tokens, {args.running} at a time, KV {load.kv_tokens} tokens an engine, "
        f"{len(os.sched_getaffinity(0))} cores"
    )
    report: dict[str, Any] = {"argv": sys.argv[1:], "kv_tokens": load.kv_tokens}
    for mode, one in outcomes.items():
        times = sorted(one.first_tokens)
        middle, slow = statistics.median(times), times[int(0.9 * len(times))]
        shares = " ".join(f"{share:.0%}" for share in one.shares)
        print(
            f"  {mode:12} hit rate {one.hit_rate:6.1%}   first token {middle * 1e3:8.1f} ms median "
            f"{slow * 1e3:8.1f} ms p90   engines {shares}"
        )
        report[mode] = {
            "hit_rate": one.hit_rate, "ttft_median": middle, "ttft_p90": slow, "shares": one.shares,
        }  # fmt: skip
    wrong = problems(outcomes, args.least_share)
    for line in wrong:
        print(f"  WRONG: {line}")
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
