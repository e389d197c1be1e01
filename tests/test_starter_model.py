"""The real starter model against transformers: logits and greedy ids over real prompts, in float32."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mini_sglang import Engine, SamplingParams
from mini_sglang.backend.loader import load_backend
from mini_sglang.config import Settings
from tests.backend.harness import page_ranges, step, step_logits

PROMPTS = [
    "The capital of France is",
    "Water boils at",
    "def fibonacci(n):\n    ",
    "Once upon a time, in a small village by the sea,",
    "The three primary colours are",
    "In 1969, the first person to walk on the Moon",
    "import numpy as np\n\nx = np.",
    "Dear Sir or Madam,\n\nI am writing to",
    "Photosynthesis is the process by which",
    "SELECT name, age FROM users WHERE",
    "The quick brown fox",
    "To make a good cup of tea, first",
    "Q: What is 7 times 8?\nA:",
    "A list of fruits:\n- apple\n- banana\n-",
    "Shakespeare wrote",
    "The derivative of x^2 is",
    "Il était une fois",
    "<html>\n<head>\n<title>",
    "My favourite season is autumn because",
    "The difference between a list and a tuple in Python is",
    "Breaking news: scientists have discovered",
    "Roses are red,\nviolets are blue,",
]
NEW_TOKENS = 64


@pytest.fixture(scope="module")
def reference(starter_gguf: Path) -> PreTrainedModel:
    with pytest.MonkeyPatch.context() as patch:
        # Transformers reads the file twice, and makes the table of names for each module of the model.
        for slow in ("GGUFReader", "get_tensor_name_map"):
            patch.setattr(gguf, slow, functools.cache(getattr(gguf, slow)))
        return AutoModelForCausalLM.from_pretrained(
            starter_gguf.parent, gguf_file=starter_gguf.name, dtype=torch.float32
        ).eval()


@pytest.fixture(scope="module")
def engine(starter_gguf: Path) -> Iterator[Engine]:
    with Engine(str(starter_gguf), dtype="fp32", gguf_dequantize=True, kv_token_budget=4096) as engine:
        yield engine


def assert_greedy(reference: PreTrainedModel, prompt: list[int], answer: list[int]) -> None:
    """Each token is transformers' own next choice after what stands before it, in one forward pass."""
    with torch.inference_mode():
        logits = reference(torch.tensor([prompt + answer])).logits[0]
    assert logits[len(prompt) - 1 : -1].argmax(-1).tolist() == answer


def test_greedy_ids_equal_transformers_together_and_from_the_cache(
    engine: Engine, reference: PreTrainedModel
) -> None:
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS]
    together = engine.generate(prompts, SamplingParams(max_new_tokens=NEW_TOKENS, ignore_eos=True))
    answers = [list(output.token_ids) for output in together]
    for prompt, answer in zip(prompts, answers, strict=True):
        assert len(answer) == NEW_TOKENS
        assert_greedy(reference, prompt, answer)
    # A continuation whose prompt lies in the cache must go on with the same tokens.
    longer = [prompt + answer[: NEW_TOKENS // 2] for prompt, answer in zip(prompts, answers, strict=True)]
    resumed = engine.generate(longer, SamplingParams(max_new_tokens=NEW_TOKENS // 2, ignore_eos=True))
    assert [list(output.token_ids) for output in resumed] == [answer[NEW_TOKENS // 2 :] for answer in answers]
    assert all(output.usage.cached_tokens > 0 for output in resumed)


def test_logits_equal_transformers(starter_gguf: Path, reference: PreTrainedModel, engine: Engine) -> None:
    settings = Settings.resolve(
        {"dtype": "fp32", "device": "cpu", "kv_token_budget": 1024, "gguf_dequantize": True}
    )
    backend = load_backend(starter_gguf, settings)
    prompts = [engine.tokenizer.encode(prompt) for prompt in PROMPTS[:4]]
    tables = page_ranges(backend, [len(ids) for ids in prompts])
    whole = step_logits(backend, [step(ids, 0, t) for ids, t in zip(prompts, tables, strict=True)])
    for ids, got in zip(prompts, whole, strict=True):
        with torch.inference_mode():
            expected = reference(torch.tensor([ids])).logits[0]
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max()


def test_a_chat_answer_is_right(engine: Engine) -> None:
    question = [{"role": "user", "content": "What is the capital of France?"}]
    output = engine.generate(question, SamplingParams(max_new_tokens=32))
    assert "Paris" in output.text and output.finish_reason == "stop"
    again = engine.generate(question, SamplingParams(max_new_tokens=32))
    assert again.token_ids == output.token_ids and again.usage.cached_tokens > 0


def test_the_default_answers_alike_in_any_company(starter_gguf: Path) -> None:
    """On a GGUF's own blocks, whose 8-bit activations would make a thousandfold of one differing bit."""
    params = SamplingParams(max_new_tokens=32, ignore_eos=True)
    prompts = PROMPTS[:10]
    with Engine(str(starter_gguf), dtype="fp32", prefix_cache=False, kv_token_budget=2048) as engine:
        alone = [engine.generate(prompt, params).token_ids for prompt in prompts]
        assert [output.token_ids for output in engine.generate(prompts, params)] == alone
    tight = {"kv_token_budget": 256, "page_size_tokens": 1, "chunked_prefill": True, "prefill_chunk_size": 5}
    with Engine(str(starter_gguf), dtype="fp32", **tight) as engine:
        assert [output.token_ids for output in engine.generate(prompts, params)] == alone
        assert engine.stats()["retractions"] > 0
        ids = [
            engine.encode(prompt) + list(answer[:16]) for prompt, answer in zip(prompts, alone, strict=True)
        ]
        rest = SamplingParams(max_new_tokens=16, ignore_eos=True)
        for prompt, answer in zip(ids, alone, strict=True):
            engine.generate(prompt, rest)
            again = engine.generate(prompt, rest)
            assert again.token_ids == answer[16:] and again.usage.cached_tokens > 0
