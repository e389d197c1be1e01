"""Logits of a loaded model for chosen steps, and steps with pages laid out by hand."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.types import SamplingParams

GREEDY = SamplingParams()


def load(folder: Path, **settings: object) -> ModelBackend:
    """A float32 CPU backend whose pool is full of NaN, so that reading an unwritten slot shows."""
    defaults = {"dtype": "fp32", "device": "cpu", "kv_token_budget": 2048, "page_size_tokens": 16}
    backend = load_backend(folder, Settings.resolve({**defaults, **settings}, env={}))
    # All bits set: NaN as a number of every dtype, and as a scale of int8.
    backend.kv.data.view(torch.uint8).fill_(255)
    return backend


def page_ranges(backend: ModelBackend, lengths: Sequence[int], shuffle: bool = True) -> list[array[int]]:
    """Pages for sequences of ``lengths`` positions, in scattered order unless told."""
    order = list(range(backend.num_pages))
    if shuffle:
        order = torch.randperm(len(order), generator=torch.Generator().manual_seed(5)).tolist()
    tables: list[array[int]] = []
    for length in lengths:
        count = -(-length // backend.page_size)
        tables.append(array("i", order[:count]))
        del order[:count]
    return tables


def step(tokens: Sequence[int], start: int, pages: array[int], sample: bool = False) -> SequenceStep:
    spec = SampleSpec(GREEDY, seed=0, index=0) if sample else None
    return SequenceStep(token_ids=tokens, start=start, pages=pages, sample=spec)


@torch.inference_mode()
def step_logits(backend: ModelBackend, steps: Sequence[SequenceStep]) -> list[Tensor]:
    """Logits after every token of every step, in the order given: ``[len(token_ids), V]`` each."""
    everything = [
        SequenceStep(s.token_ids, s.start, s.pages, prompt_targets=[0] * len(s.token_ids), adapter=s.adapter)
        for s in steps
    ]
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    batch = Batch.build(everything, limits, torch.device("cpu"))
    chosen = [backend.adapters.begin(batch)] if backend.adapters and batch.adapters else []
    hidden = backend.decoder.forward(batch, backend.kv, backend.attention, *chosen)
    logits = backend.decoder.logits(hidden)
    result: list[Tensor] = [logits] * len(steps)
    for place, first, stop in batch.prompts:
        result[place] = logits[first:stop]
    return result


def greedy(backend: ModelBackend, prompts: Sequence[Sequence[int]], count: int) -> list[list[int]]:
    """``count`` greedy tokens for each prompt, all of them in one batch through ``run``."""
    tables = page_ranges(backend, [len(prompt) + count for prompt in prompts])
    steps = [step(p, 0, t, sample=True) for p, t in zip(prompts, tables, strict=True)]
    answers: list[list[int]] = [[] for _ in prompts]
    for _ in range(count):
        for answer, result in zip(answers, backend.run(steps), strict=True):
            assert result.error is None and result.token_id is not None
            answer.append(result.token_id)
        steps = [
            step([a[-1]], len(p) + len(a) - 1, t, sample=True)
            for p, a, t in zip(prompts, answers, tables, strict=True)
        ]
    return answers
