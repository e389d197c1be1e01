"""Hugging Face's ``generate`` and its continuous batching on the same workload, model and type."""

from __future__ import annotations

import importlib.util
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.gpu.workload import requests, write_config

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Part

MODEL = "Qwen3-0.6B"
_END_SECONDS = 5.0


def load(part: Part) -> Any:
    """The model with random weights of transformers' own, in eval mode; None where it cannot be had."""
    if importlib.util.find_spec("transformers") is None:
        part.row("transformers", None, note="skipped: transformers is not installed")
        return None
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as folder:
        write_config(MODEL, Path(folder), part.tiny)
        config = AutoConfig.from_pretrained(folder)
    dtype = torch.bfloat16 if part.device == "cuda" else torch.float32
    with torch.device(part.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    return model.eval()


def sampling(**more: Any) -> Any:
    from transformers import GenerationConfig

    return GenerationConfig(
        do_sample=True, temperature=0.6, top_k=0, top_p=1.0, eos_token_id=None, pad_token_id=0, **more
    )


def generate(part: Part) -> None:
    """One stream, then batches in the order of the workload, each as long as the longest answer in it."""
    model = load(part)
    if model is None:
        return
    import torch

    size = part.size
    prompts, counts = requests(size)

    def run(rows: list[list[int]], count: int) -> None:
        longest = max(map(len, rows))
        ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=part.device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], device=part.device)
        with torch.inference_mode():
            model.generate(
                ids,
                attention_mask=mask,
                generation_config=sampling(max_new_tokens=count, min_new_tokens=count),
            )

    prompt = prompts[0][: size.shortest]
    run([prompt], 4)
    part.wait()
    start = time.perf_counter()
    run([prompt], size.stream // 2)
    part.wait()
    rate = size.stream // 2 / (time.perf_counter() - start)
    part.row("generate, one stream", rate, "tokens/s", f"a prompt of {len(prompt)} tokens included")
    made, start = 0, time.perf_counter()
    for first in range(0, size.requests, size.together):
        rows = slice(first, first + size.together)
        run(prompts[rows], max(counts[rows]))
        part.wait()
        made += sum(counts[rows])
        note = f"batches of {size.together}, {min(first + size.together, size.requests)} of {size.requests}"
        rate = made / (time.perf_counter() - start)
        part.row("generate, output tokens per second", rate, "tokens/s", f"{note}; what was asked for counts")


def batching(part: Part) -> None:
    """All requests at once to transformers' continuous batching."""
    model = load(part)
    if model is None:
        return
    if not hasattr(model, "continuous_batching_context_manager"):
        part.row("continuous batching", None, note="skipped: this transformers has none")
        return
    prompts, counts = requests(part.size)
    given = {"generation_config": sampling(max_new_tokens=part.size.longest)}
    if part.tiny:
        # Else its cache takes most of the memory there is.
        from transformers import ContinuousBatchingConfig

        given["continuous_batching_config"] = ContinuousBatchingConfig(num_blocks=64, max_batch_tokens=256)
    with model.continuous_batching_context_manager(block=True, timeout=_END_SECONDS, **given) as manager:
        # Whatever is made with the first request is made before.
        manager.add_request(prompts[0], max_new_tokens=4)
        _next_answer(manager)
        start = time.perf_counter()
        for prompt, count in zip(prompts, counts, strict=True):
            manager.add_request(prompt, max_new_tokens=count)
        made = 0
        for done in range(1, len(prompts) + 1):
            made += _next_answer(manager)
            rate = made / (time.perf_counter() - start)
            note = f"{made} tokens, {done} of {len(prompts)} answers"
            part.row("continuous batching, output tokens per second", rate, "tokens/s", note)


def _next_answer(manager: Any) -> int:
    """Wait for an answer; gives how many tokens it has."""
    while True:
        result = manager.get_result(timeout=1)
        if result is None:
            if not manager.is_running():
                raise RuntimeError("transformers' continuous batching ended by itself")
        elif result.is_finished():
            if result.error is not None:
                raise RuntimeError(f"transformers' continuous batching: {result.error}")
            return len(result.generated_tokens)
