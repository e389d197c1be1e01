"""What runs through transformers' code: generate against our loop, batched decodes against single ones.

    python benchmarks/transformers_bench.py generate --model FOLDER [--dtype bf16] [--streams 1] [--rounds 5]
    python benchmarks/transformers_bench.py together [--families mamba2,qwen3_next,bloom] [--streams 8]

Sides run the same prompt ids and token counts in one process and take turns within a round, the order turned
round each time, and the first round is a warm-up. Decode tokens per second of all streams, from the first
token to the last: the median, and the least and greatest round. With --cpu a second is one of the process's
CPU time over its threads, which other processes on the machine disturb less.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mini_sglang.backend.device import choose_threads
from mini_sglang.backend.loader import load_backend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams

PROMPT_TOKENS = 48
_LINEAR = {"layer_types": ["linear_attention", "linear_attention", "linear_attention", "full_attention"] * 2}
# Random models of some 40 million parameters: the weights are far larger than a CPU's second cache.
FAMILIES: dict[str, dict[str, Any]] = {
    "mamba2": {
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "num_heads": 16,
        "head_dim": 64,
        "state_size": 64,
        "n_groups": 1,
    },
    "qwen3_next": {
        **_LINEAR,
        "hidden_size": 512,
        "num_hidden_layers": 8,
        "intermediate_size": 1408,
        "moe_intermediate_size": 256,
        "shared_expert_intermediate_size": 256,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "linear_num_key_heads": 4,
        "linear_num_value_heads": 8,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
    },
    "bloom": {"hidden_size": 512, "n_layer": 8, "n_head": 8},
}


def engine(path: Path, **settings: object) -> tuple[EngineCore, Any]:
    resolved = Settings.resolve({"device": "cpu", **settings})
    backend = load_backend(path, resolved)
    return EngineCore(backend, resolved, frozenset()), backend


Clock = Callable[[], float]


def decode_rate(core: EngineCore, streams: int, tokens: int, clock: Clock) -> float:
    """Decode tokens per second of ``streams`` requests that start together."""
    params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
    for stream in range(streams):
        prompt = [(stream * 31 + i * i * 7 + i * 3) % 900 + 5 for i in range(PROMPT_TOKENS - stream)]
        core.add(core.make_request(str(stream), prompt, params))
    core.step()
    start = clock()
    count = 0
    while core.has_work:
        count += sum(len(event.token_ids) for event in core.step())
    return count / (clock() - start)


def alternate(rounds: int, sides: dict[str, Callable[[], float]]) -> dict[str, list[float]]:
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for index in range(rounds + 1):
        for name in list(sides) if index % 2 else list(reversed(sides)):
            rate = sides[name]()
            if index:
                rates[name].append(rate)
    return rates


def report(title: str, rates: dict[str, list[float]], base: str) -> dict[str, Any]:
    print(f"\n{title}")
    middle = {name: statistics.median(values) for name, values in rates.items()}
    for name, values in rates.items():
        ratio = middle[name] / middle[base]
        print(
            f"  {name:28} {middle[name]:8.1f} tok/s  ({min(values):.1f} to {max(values):.1f})  x{ratio:.2f}"
        )
    return {"title": title, "rates": rates, "base": base}


def bench_generate(options: argparse.Namespace) -> list[dict[str, Any]]:
    """ENGINE_FAST_DECODE off and on, and generate called by itself."""
    import torch
    from transformers import LogitsProcessorList

    path = Path(options.model)
    common = {"dtype": options.dtype, "num_threads": options.threads}
    sides = {
        "our loop, compiled kernels": engine(path, **common)[0],
        "our loop, torch operators": engine(path, kernels="reference", **common)[0],
    }
    fast, backend = engine(path, engine_fast_decode=True, **common)
    sides["ENGINE_FAST_DECODE=1"] = fast
    model = backend._model

    def alone() -> float:
        ids = torch.tensor([[(i * i * 7 + i * 3) % 900 + 5 for i in range(PROMPT_TOKENS)]])
        times: list[float] = []

        def note(input_ids: Any, scores: Any) -> Any:
            times.append(options.clock())
            return scores

        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_length=PROMPT_TOKENS + options.tokens,
                logits_processor=LogitsProcessorList([note]),
            )
        return (len(times) - 1) / (times[-1] - times[0])

    runs: dict[str, Callable[[], float]] = {
        name: (lambda core=core: decode_rate(core, options.streams, options.tokens, options.clock))
        for name, core in sides.items()
    }
    if options.streams == 1:
        runs["generate by itself"] = alone
    title = f"{path.name}, {options.dtype}, {options.streams} stream(s), {options.tokens} tokens"
    return [report(title, alternate(options.rounds, runs), "ENGINE_FAST_DECODE=1")]


def bench_together(options: argparse.Namespace) -> list[dict[str, Any]]:
    """One cache per request: decodes as one batch, one by one, and over a cache of fixed shape."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    results = []
    for family in options.families.split(","):
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            family, vocab_size=8192, max_position_embeddings=2048, **FAMILIES[family]
        )
        with tempfile.TemporaryDirectory() as folder:
            AutoModelForCausalLM.from_config(config).save_pretrained(folder)
            common = {
                "dtype": options.dtype,
                "num_threads": options.threads,
                "max_batch_size": options.streams,
            }
            together, backend = engine(Path(folder), **common)
            single, other = engine(Path(folder), **common)
            other._abilities = replace(other._abilities, no_stacks="for comparison")
            sides = {"together": together, "one by one": single}
            if backend._abilities.token_bytes:
                sides["FORCE_LEGACY_CACHE=1"] = engine(Path(folder), force_legacy_cache=True, **common)[0]
            runs: dict[str, Callable[[], float]] = {
                name: (lambda core=core: decode_rate(core, options.streams, options.tokens, options.clock))
                for name, core in sides.items()
            }
            size = backend.describe()["parameters"] / 1e6
            title = f"{family}, {size:.0f} M random weights, {options.dtype}, {options.streams} streams"
            results.append(report(title, alternate(options.rounds, runs), "one by one"))
    return results


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("generate", "together"))
    parser.add_argument("--model", help="for generate: a folder of safetensors")
    parser.add_argument("--families", default=",".join(FAMILIES))
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--streams", type=int)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--cpu", action="store_true", help="count CPU time")
    parser.add_argument("--json", type=Path, help="write the rates there")
    options = parser.parse_args()
    threads = choose_threads(options.threads)
    options.clock = (lambda: time.process_time() / threads) if options.cpu else time.perf_counter
    options.streams = options.streams or (1 if options.what == "generate" else 8)
    results = (bench_generate if options.what == "generate" else bench_together)(options)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
