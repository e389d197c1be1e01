"""The engine against Hugging Face streaming and against itself: one stream, a batch, a chat's second turn.

    python benchmarks/engine_bench.py [--model FOLDER_OR_GGUF] [--dtype fp32] [--rounds 5] [--json FILE]

Everything runs in one process on the same weights, prompt ids and token counts; the sides take turns
within a round, and ratios are of medians. Needs transformers (and gguf for a GGUF model).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mini_sglang import Engine, SamplingParams
from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.config import Settings

PROMPT = (
    "Explain to a curious beginner how a language model server answers many people at the same time, "
    "what prefill and decode are, and why a prefix cache helps."
)
SYSTEM = "You are a patient teacher who answers in plain words, with one small example for each idea. " * 8


def greedy(count: int) -> SamplingParams:
    return SamplingParams(max_new_tokens=count, temperature=0, ignore_eos=True)


class HuggingFace:
    """``generate`` with a ``TextIteratorStreamer``, as a user of transformers would stream."""

    def __init__(self, path: Path, dtype: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        folder, file = (path.parent, path.name) if path.is_file() else (path, None)
        kind = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
        extra = {} if file is None else {"gguf_file": file}
        self.tokenizer = AutoTokenizer.from_pretrained(folder, **extra)
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, **extra).eval()
        torch.set_num_threads(threads)

    def run(self, ids: list[int], count: int) -> tuple[list[int], float, float]:
        """Token ids, seconds, seconds to the first chunk of text."""
        import torch
        from transformers import TextIteratorStreamer

        streamer = TextIteratorStreamer(self.tokenizer, skip_prompt=True)
        result: list[Any] = []

        def work() -> None:
            with torch.inference_mode():
                result.append(
                    self.model.generate(
                        torch.tensor([ids]),
                        attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                        max_new_tokens=count,
                        min_new_tokens=count,
                        do_sample=False,
                        pad_token_id=0,
                        streamer=streamer,
                    )
                )

        start = time.perf_counter()
        thread = threading.Thread(target=work)
        thread.start()
        first = None
        for _ in streamer:
            first = first or time.perf_counter() - start
        thread.join()
        return result[0][0, len(ids) :].tolist(), time.perf_counter() - start, first or 0.0


def one_stream(engine: Engine, ids: list[int], count: int) -> tuple[list[int], float, float]:
    start = time.perf_counter()
    first = None
    tokens: list[int] = []
    for delta in engine.stream(ids, greedy(count)):
        first = first or time.perf_counter() - start
        tokens.extend(delta.token_ids)
    return tokens, time.perf_counter() - start, first or 0.0


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    """Run every side once per round, the order turned round each time; the first round is a warm-up."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        names = list(sides) if index % 2 else list(reversed(sides))
        for name in names:
            seconds = sides[name]()
            if index:
                times[name].append(seconds)
    return times


def bench_one_stream(engine: Engine, peer: HuggingFace, rounds: int, count: int) -> dict[str, Any]:
    ids = engine.encode([{"role": "user", "content": PROMPT}])
    answers: dict[str, list[int]] = {}
    firsts: dict[str, list[float]] = {"mini-sglang": [], "Hugging Face": []}

    def ours() -> float:
        engine.clear_cache()
        tokens, seconds, first = one_stream(engine, ids, count)
        answers["mini-sglang"] = tokens
        firsts["mini-sglang"].append(first)
        return seconds

    def theirs() -> float:
        tokens, seconds, first = peer.run(ids, count)
        answers["Hugging Face"] = tokens
        firsts["Hugging Face"].append(first)
        return seconds

    times = alternate(rounds, {"mini-sglang": ours, "Hugging Face": theirs})
    assert all(len(tokens) == count for tokens in answers.values())
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    print(f"\none stream: {len(ids)} prompt tokens, {count} new, nothing cached")
    for name, seconds in times.items():
        middle = statistics.median(seconds)
        ttft = statistics.median(firsts[name][1:])
        print(f"  {name:14} {count / middle:8.1f} tokens/s   first token {ttft * 1e3:7.1f} ms")
    ratio = statistics.median(times["Hugging Face"]) / statistics.median(times["mini-sglang"])
    print(f"  ratio {ratio:.2f}x; {same} of {count} greedy ids equal")
    return {"prompt": len(ids), "new": count, "seconds": times, "ratio": ratio, "same_ids": same}


def bench_batch(engine: Engine, rounds: int, count: int, batch: int) -> dict[str, Any]:
    prompts = [engine.encode([{"role": "user", "content": f"Question {i}: {PROMPT}"}]) for i in range(batch)]
    params = greedy(count)

    def together() -> float:
        engine.clear_cache()
        start = time.perf_counter()
        outputs = engine.generate(prompts, params)
        assert sum(len(o.token_ids) for o in outputs) == batch * count
        return time.perf_counter() - start

    def apart() -> float:
        engine.clear_cache()
        start = time.perf_counter()
        for ids in prompts:
            assert len(engine.generate(ids, params).token_ids) == count
        return time.perf_counter() - start

    times = alternate(rounds, {"together": together, "one after another": apart})
    print(f"\n{batch} requests: about {len(prompts[0])} prompt tokens, {count} new each")
    for name, seconds in times.items():
        print(f"  {name:18} {batch * count / statistics.median(seconds):8.1f} tokens/s")
    ratio = statistics.median(times["one after another"]) / statistics.median(times["together"])
    print(f"  ratio {ratio:.2f}x")
    return {"batch": batch, "new": count, "seconds": times, "ratio": ratio}


def bench_second_turn(engine: Engine, rounds: int, count: int) -> dict[str, Any]:
    messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": PROMPT}]
    rows: list[tuple[float, float, int, int]] = []
    for _ in range(rounds + 1):
        engine.clear_cache()
        cold = one_stream(engine, engine.encode(messages), 1)[2]
        first = engine.generate(messages, greedy(count))
        later = [
            *messages,
            {"role": "assistant", "content": first.text},
            {"role": "user", "content": "Go on."},
        ]
        ids = engine.encode(later)
        start = time.perf_counter()
        output = engine.generate(ids, greedy(1))
        rows.append(
            (cold, time.perf_counter() - start, output.usage.prompt_tokens, output.usage.cached_tokens)
        )
    rows = rows[1:]
    cold, warm = (statistics.median(row[i] for row in rows) for i in (0, 1))
    prompt, cached = rows[-1][2:]
    print(f"\nsecond turn of a chat: {prompt} prompt tokens, {cached} from the cache")
    print(f"  first turn's first token {cold * 1e3:.1f} ms, second turn's {warm * 1e3:.1f} ms")
    return {"prompt": prompt, "cached": cached, "cold_ttft": cold, "warm_ttft": warm}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="a local folder or .gguf file; by default what the engine would take")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new", type=int, default=64, help="tokens per answer")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--skip-peer", action="store_true", help="leave Hugging Face out")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    settings = Settings.resolve({"model": args.model})
    path = resolve_model(settings, notify=lambda line: print(line, file=sys.stderr)).path
    report: dict[str, Any] = {"argv": sys.argv[1:], "cpus": len(os.sched_getaffinity(0))}
    with Engine(str(path), dtype=args.dtype) as engine:
        print(" ".join(f"{name}={value}" for name, value in engine.description.items()))
        report["engine"] = {name: str(value) for name, value in engine.description.items()}
        if not args.skip_peer:
            peer = HuggingFace(path, args.dtype, int(engine.description["threads"]))
            report["one_stream"] = bench_one_stream(engine, peer, args.rounds, args.new)
        report["batch"] = bench_batch(engine, args.rounds, args.new, args.batch)
        report["second_turn"] = bench_second_turn(engine, args.rounds, args.new)
    if args.json:
        args.json.write_text(json.dumps(report, indent=1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
