"""A model that is not native, through transformers' own ``generate`` and through this stack's pages.

    python benchmarks/transformers_models.py [--model-type olmo2] [--tokens 48] [--streams 1,16]

Makes a random model of SmolLM2-135M's shape in bfloat16. Prints tokens per second after the first of each
request, medians of alternating rounds, in wall time and in the CPU time of one thread, which other work on
the machine disturbs less.
"""

from __future__ import annotations

import argparse
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mini_sglang.backend.loader import load_backend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams

VOCAB_SIZE = 49_152
PROMPT_TOKENS = 38
Rates = tuple[float, float]
Run = Callable[[list[list[int]], int], Rates]


def make_model(model_type: str) -> PreTrainedModel:
    config = AutoConfig.for_model(
        model_type,
        vocab_size=VOCAB_SIZE,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def through_generate(model: PreTrainedModel) -> Run:
    """A static batch, as all prompts are equally long; the first token is timed apart."""

    def timed(prompts: list[list[int]], tokens: int) -> Rates:
        ids = torch.tensor(prompts)
        wall, cpu = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                do_sample=False,
            )
        return time.perf_counter() - wall, time.process_time() - cpu

    def run(prompts: list[list[int]], tokens: int) -> Rates:
        first, whole = timed(prompts, 1), timed(prompts, tokens)
        made = len(prompts) * (tokens - 1)
        return made / (whole[0] - first[0]), made / (whole[1] - first[1])

    return run


def through_pages(core: EngineCore) -> Run:
    def run(prompts: list[list[int]], tokens: int) -> Rates:
        params = SamplingParams(max_new_tokens=tokens, ignore_eos=True)
        for index, prompt in enumerate(prompts):
            core.add(core.make_request(str(index), prompt, params))
        waiting, made = {str(index) for index in range(len(prompts))}, 0
        wall, cpu = 0.0, 0.0
        while core.has_work:
            for event in core.step():
                if event.request_id not in waiting:
                    made += len(event.token_ids)
                waiting.discard(event.request_id)
            if not waiting and not wall:
                wall, cpu, made = time.perf_counter(), time.process_time(), 0
        return made / (time.perf_counter() - wall), made / (time.process_time() - cpu)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model-type", default="olmo2")
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--streams", default="1,16")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    model = make_model(args.model_type)
    runs: dict[str, Run] = {}
    with tempfile.TemporaryDirectory() as name:
        model.save_pretrained(name)
        for label, changed in (
            ("paged, KERNELS=reference", {"kernels": "reference"}),
            ("paged", {}),
            ("paged, int8", {"quantization": "int8"}),
        ):
            settings = Settings.resolve(
                {
                    "device": "cpu",
                    "dtype": "bf16",
                    "kv_token_budget": 16384,
                    "prefix_cache": False,
                    "num_threads": args.threads,
                    **changed,
                },
                env={},
            )
            runs[label] = through_pages(EngineCore(load_backend(Path(name), settings), settings, frozenset()))
    torch.set_num_threads(args.threads)
    runs = {"transformers generate": through_generate(model), **runs}
    draw = random.Random(0)
    print("| way | streams | tokens/s | tokens per CPU second |\n| --- | --- | --- | --- |")
    for streams in map(int, args.streams.split(",")):
        found: dict[str, list[Rates]] = {label: [] for label in runs}
        for _ in range(args.rounds):
            prompts = [[draw.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(streams)]
            for label, run in runs.items():
                found[label].append(run(prompts, args.tokens))
        for label, rates in found.items():
            wall, cpu = (statistics.median(column) for column in zip(*rates, strict=True))
            print(f"| {label} | {streams} | {wall:.1f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
