"""Every family through transformers' code over our pages: the ids are those of transformers' ``generate``."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from mini_sglang import Engine
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams
from tests.backend.harness import page_ranges, step, step_logits
from tests.backend.transformers_models.families import PAGED, VOCAB_SIZE, WINDOW, Family, save, tiny_model
from tests.tiny_folders import tiny_folder

NEW_TOKENS = 9
PAGE = 4
# What two long prompts and their answers fill.
BUDGET = 112


def prompts() -> list[list[int]]:
    """Different lengths, most of them far past the window; the last two share a prefix."""
    draw = random.Random(3)
    made = [[draw.randrange(3, VOCAB_SIZE) for _ in range(length)] for length in (2, WINDOW, 21, 33)]
    made.append(made[3][:26] + [draw.randrange(3, VOCAB_SIZE) for _ in range(6)])
    return made


@torch.inference_mode()
def generated(model: PreTrainedModel, prompt: list[int]) -> list[int]:
    """What transformers answers, with its own cache and eager attention."""
    ids = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return ids[0, len(prompt) :].tolist()


def load(folder: Path, **settings: object) -> ModelBackend:
    values = {
        "dtype": "fp32",
        "device": "cpu",
        "page_size_tokens": PAGE,
        "kv_token_budget": BUDGET,
        **settings,
    }
    return load_backend(folder, Settings.resolve(values, env={}))


def answers(engine: EngineCore, wanted: list[list[int]]) -> list[list[int]]:
    """Greedy answers to prompts that run together."""
    params = SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True)
    for index, prompt in enumerate(wanted):
        engine.add(engine.make_request(str(index), prompt, params))
    ids: list[list[int]] = [[] for _ in wanted]
    while engine.has_work:
        for event in engine.step():
            assert event.error is None
            ids[int(event.request_id)].extend(event.token_ids)
        engine.check()
    return ids


def own_logits(backend: ModelBackend, wanted: list[list[int]]) -> list[Tensor]:
    """The logits after every token of each prompt, run in one step."""
    tables = page_ranges(backend, [len(prompt) for prompt in wanted])
    steps = [step(prompt, 0, pages) for prompt, pages in zip(wanted, tables, strict=True)]
    return step_logits(backend, steps)


@pytest.mark.parametrize("family", PAGED, ids=lambda family: family.model_type)
def test_together_cached_chunked_and_retracted_as_transformers_generates(
    family: Family, tmp_path: Path
) -> None:
    model = tiny_model(family)
    wanted = prompts()
    expected = [generated(model, prompt) for prompt in wanted]
    backend = load(save(model, tmp_path))
    backend.kv.data.fill_(torch.nan)
    assert backend.describe()["implementation"] == "transformers paged"
    for logits, prompt in zip(own_logits(backend, wanted), wanted, strict=True):
        torch.testing.assert_close(logits, model(torch.tensor([prompt])).logits[0], rtol=1e-3, atol=1e-3)
    # Chunks that cut a page; a pool that cannot hold all of them to their ends.
    settings = {
        "chunked_prefill": True,
        "prefill_chunk_size": 7,
        "max_batch_size": 8,
        "prefill_cache_size": 0,
        "device": "cpu",
    }
    engine = EngineCore(backend, Settings.resolve(settings, env={}), frozenset({2}))
    assert answers(engine, wanted) == expected
    retractions, hits = engine.scheduler.num_retractions, engine.counters.prefix_hit_tokens
    assert answers(engine, wanted[::-1]) == expected[::-1]
    assert engine.scheduler.num_retractions > retractions
    assert engine.counters.prefix_hit_tokens - hits > 60


def test_the_public_engine_serves_one(tmp_path: Path) -> None:
    folder = tiny_folder(tmp_path, "olmo2")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with Engine(str(folder), dtype="fp32", device="cpu", kv_token_budget=1024) as engine:
        output = engine.generate([40, 50, 60, 70], SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
        assert list(output.token_ids) == generated(model, [40, 50, 60, 70])
