"""What the caches save: the same prompts with each of them off and on.

    python benchmarks/cache_bench.py MODEL [--prompt-tokens 1000] [--rounds 7]

Prints one JSON object per line. Times are in milliseconds: the median of the rounds, and the fastest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from mini_sglang import Engine, SamplingParams

ONE = SamplingParams(max_new_tokens=1, ignore_eos=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompt-tokens", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--num-threads", type=int, default=0)
    options = parser.parse_args()
    draw = random.Random(1)
    for measure in (first_tokens, cost_of_keeping, host_tier, gaps, restart):
        for row in measure(options, draw):
            print(json.dumps({"what": measure.__name__, **row}), flush=True)


def engine_of(options: argparse.Namespace, **settings: Any) -> Engine:
    return Engine(options.model, num_threads=options.num_threads, **settings)


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(100, 4000) for _ in range(length)]


def timed(act: Callable[[], object]) -> float:
    start = time.perf_counter()
    act()
    return (time.perf_counter() - start) * 1000


def figures(times: Sequence[float]) -> dict[str, float]:
    return {"median_ms": round(statistics.median(times), 2), "least_ms": round(min(times), 2)}


def first_tokens(options: argparse.Namespace, draw: random.Random) -> Any:
    """The first token of a prompt: new, its whole pages cached, and seen whole before."""
    cases: dict[str, list[float]] = {"cold": [], "prefix cache": [], "exact prompt": []}
    with engine_of(options, prefill_cache_size=0) as plain, engine_of(options) as exact:
        for _ in range(options.rounds):
            ids = prompt(draw, options.prompt_tokens)
            cases["cold"].append(timed(lambda ids=ids: plain.generate(ids, ONE)))
            cases["prefix cache"].append(timed(lambda ids=ids: plain.generate(ids, ONE)))
            exact.generate(ids, ONE)
            cases["exact prompt"].append(timed(lambda ids=ids: exact.generate(ids, ONE)))
    for name, times in cases.items():
        yield {"case": name, "prompt_tokens": options.prompt_tokens, **figures(times)}


def cost_of_keeping(options: argparse.Namespace, draw: random.Random) -> Any:
    """Prompts that never come again, with and without the exact-prompt cache."""
    with engine_of(options, prefill_cache_size=0) as off, engine_of(options, prefill_cache_size=8) as on:
        cases: dict[str, list[float]] = {"off": [], "on": []}
        for _ in range(options.rounds * 6):
            for name, engine in (("off", off), ("on", on)):
                ids = prompt(draw, 40)
                cases[name].append(timed(lambda engine=engine, ids=ids: engine.generate(ids, ONE)))
    for name, times in cases.items():
        yield {"case": name, "prompt_tokens": 40, **figures(times)}


def host_tier(options: argparse.Namespace, draw: random.Random) -> Any:
    """Six prefixes in turn over a pool that holds two of them."""
    length = options.prompt_tokens - options.prompt_tokens % 16
    prefixes = [prompt(draw, length) for _ in range(6)]
    for budget in (0, 8 * length):
        settings = {"kv_token_budget": 2 * length + 256, "page_token_budget": budget}
        with engine_of(options, prefill_cache_size=0, **settings) as engine:
            times: list[float] = []
            for turn in range(options.rounds // 2 + 1):
                for ids in prefixes:
                    taken = timed(lambda ids=[*ids, 100 + turn]: engine.generate(ids, ONE))
                    times += [taken] if turn else []
            stats = engine.stats()
        yield {
            "case": "on" if budget else "off",
            "prefix_tokens": length,
            "restored_tokens": stats["host_restored_tokens"],
            "spilled_tokens": stats["host_spilled_tokens"],
            **figures(times),
        }


def gaps(options: argparse.Namespace, draw: random.Random) -> Any:
    """The worst gap between the tokens of a running answer while a prefix of the host comes back."""
    from mini_sglang.engine import host_link

    length = options.prompt_tokens - options.prompt_tokens % 16
    first, second = prompt(draw, length), prompt(draw, length)
    usual = host_link.INLINE_BYTES
    cases: dict[str, list[float]] = {"nothing comes": [], "in the step loop": [], "in the thread": []}
    settings = {"kv_token_budget": length + 1024, "page_token_budget": 8 * length}
    with engine_of(options, prefill_cache_size=0, **settings) as engine:
        for _ in range(options.rounds):
            for case, inline in (
                ("nothing comes", None),
                ("in the step loop", 1 << 40),
                ("in the thread", 0),
            ):
                host_link.INLINE_BYTES = usual if inline is None else inline
                engine.generate([*first, 100], ONE)
                engine.generate([*second, 100], ONE)
                times: list[float] = []
                with engine.stream([100, 101], SamplingParams(max_new_tokens=60, ignore_eos=True)) as stream:
                    other = None
                    for index, _delta in enumerate(stream):
                        times.append(time.perf_counter())
                        if index == 10 and inline is not None:
                            other = engine.stream([*first, 101], ONE)
                    if other is not None:
                        other.output()
                cases[case].append(1000 * max(b - a for a, b in pairwise(times[5:])))
    host_link.INLINE_BYTES = usual
    for name, worst in cases.items():
        yield {"case": name, "prefix_tokens": length, **figures(worst)}


def restart(options: argparse.Namespace, draw: random.Random) -> Any:
    """A saved cache: what writing and loading it take, beside computing it again."""
    prefixes = [prompt(draw, options.prompt_tokens) for _ in range(4)]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "cache.safetensors"
        with engine_of(options, prefill_cache_size=0) as engine:
            computed = timed(lambda: [engine.insert_prefix(ids) for ids in prefixes])
            saved = timed(lambda: engine.save_prefix_cache(path))
            size = path.stat().st_size
        with engine_of(options, prefill_cache_size=0) as engine:
            loaded = timed(lambda: engine.load_prefix_cache(path))
            usage = engine.generate([*prefixes[0], 100], ONE).usage
    yield {
        "tokens": 4 * options.prompt_tokens,
        "file_mib": round(size / 2**20, 1),
        "computed_ms": round(computed),
        "saved_ms": round(saved),
        "loaded_ms": round(loaded),
        "cached_tokens_of_the_next": usage.cached_tokens,
    }


if __name__ == "__main__":
    main()
