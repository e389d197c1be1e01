"""What a step costs without the model: schedule, and the whole step, with few and many requests waiting.

    python benchmarks/scheduler_bench.py [--running 64] [--waiting 0 100 1000] [--priorities 1 7]

The backend computes nothing. Figures are microseconds of CPU time a step: the least of ``--repeats`` runs,
each the mean of ``--steps`` steps. ``--priorities`` is how many different ones the requests have.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mini_sglang import SamplingParams
from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore


class Nothing:
    """A backend of endless pages that always says the same token."""

    vocab_size, context_length, page_size, num_pages = 1000, 8192, 16, 64 * 1024
    shares_prefixes = chunks_prompts = True

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        return [SequenceResult(7 if step.sample else None) for step in steps]


def core_with(running: int, waiting: int, priorities: int, prompt: int) -> EngineCore:
    settings = Settings.resolve(
        {"max_batch_size": running, "max_prefill_tokens": 1 << 20, "chunked_prefill": False}, {}
    )
    core = EngineCore(Nothing(), settings, frozenset({0}))
    chance = random.Random(1)

    def add(name: str, priority: int) -> None:
        more = {"priority": priority} if priorities > 1 else {}
        params = SamplingParams(max_new_tokens=100_000, ignore_eos=True, **more)
        core.add(core.make_request(name, [chance.randrange(1, 1000) for _ in range(prompt)], params))

    for number in range(running):
        add(f"r{number}", number % priorities)
    core.step()
    for number in range(waiting):
        add(f"w{number}", number % priorities)
    assert (core.stats()["running"], core.stats()["waiting"]) == (running, waiting)
    return core


def measure(core: EngineCore, steps: int) -> tuple[float, float]:
    """Microseconds of ``schedule`` and of all else of a step."""
    scheduling = 0.0
    schedule = core.scheduler.schedule

    def timed() -> object:
        nonlocal scheduling
        start = time.thread_time()
        plan = schedule()
        scheduling += time.thread_time() - start
        return plan

    core.scheduler.schedule = timed  # type: ignore[method-assign,assignment]
    start = time.thread_time()
    for _ in range(steps):
        core.step()
    whole = time.thread_time() - start
    core.scheduler.schedule = schedule  # type: ignore[method-assign]
    return scheduling / steps * 1e6, (whole - scheduling) / steps * 1e6


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--running", type=int, default=64)
    parser.add_argument("--waiting", type=int, nargs="+", default=[0, 100, 1000])
    parser.add_argument("--priorities", type=int, nargs="+", default=[1, 7])
    parser.add_argument("--prompt", type=int, default=256, help="tokens")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{args.running} running, prompts of {args.prompt} tokens; microseconds a step")
    print("waiting  priorities  schedule  the rest")
    for waiting in args.waiting:
        for priorities in args.priorities:
            core = core_with(args.running, waiting, priorities, args.prompt)
            runs = [measure(core, args.steps) for _ in range(args.repeats)]
            scheduling, rest = (min(column) for column in zip(*runs, strict=True))
            print(f"{waiting:7} {priorities:11} {scheduling:9.1f} {rest:9.1f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
