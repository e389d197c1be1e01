"""The compiled kernels under transformers' modelling code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from tests.backend.harness import page_ranges, step, step_logits
from tests.backend.kernels.twins import VARIANTS
from tests.backend.transformers_models.families import WINDOW, Family, save, tiny_model
from tests.backend.transformers_models.test_families import answers, generated, load, prompts
from tests.backend.transformers_models.test_loading import engine_of

FAST = VARIANTS[-1] != "generic"
# Heads of 16, which the compiled attention takes; a scale, a window and a scaling of logits of their own.
GEMMA = Family(
    "Gemma 3",
    "gemma3_text",
    config={
        "layer_types": ["sliding_attention", "full_attention"],
        "head_dim": 16,
        "query_pre_attn_scalar": 9,
        "final_logit_softcapping": 4.0,
        "sliding_window": WINDOW,
    },
)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_with_and_without_kernels_the_ids_are_those_of_transformers(kernels: str, tmp_path: Path) -> None:
    model = tiny_model(GEMMA)
    backend = load(save(model, tmp_path), kernels=kernels, kv_token_budget=512)
    native = kernels == "auto" and FAST
    assert isinstance(backend.attention, NativeAttention if native else PagedAttention)
    assert answers(engine_of(backend), prompts()) == [generated(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_sixteen_bits_stay_near_float32(kernels: str, dtype: str, tmp_path: Path) -> None:
    model = tiny_model(GEMMA)
    backend = load(save(model, tmp_path), kernels=kernels, dtype=dtype, kv_token_budget=512)
    wanted = prompts()
    tables = page_ranges(backend, [len(prompt) for prompt in wanted])
    steps = [step(prompt, 0, pages) for prompt, pages in zip(wanted, tables, strict=True)]
    for prompt, logits in zip(wanted, step_logits(backend, steps), strict=True):
        expected = model(torch.tensor([prompt])).logits[0]
        off = (logits - expected).square().mean().sqrt() / expected.square().mean().sqrt()
        assert off < 0.05
