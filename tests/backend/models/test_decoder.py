"""The decoder against transformers, for every family and feature, in float32."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.models.rope import Rotations, inverse_frequencies
from mini_sglang.backend.models.rope_config import RopeConfig
from tests.backend.harness import greedy, load, page_ranges, step, step_logits
from tests.backend.tiny_models import VOCAB_SIZE, tiny_model

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama multi-head tied": ("llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama one kv head, wide heads": ("llama", {"num_key_value_heads": 1, "head_dim": 32}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 3.0}},
    ),
    "llama llama3 rope": ("llama", {"rope_parameters": _LLAMA3}),
    "llama yarn rope": ("llama", {"rope_parameters": _YARN}),
    "llama dynamic rope": (
        "llama",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "qwen2 window": ("qwen2", {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3 bias": ("qwen3", {"attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
    "smollm3 window": (
        "smollm3",
        {
            "no_rope_layers": [1, 0, 1],
            "use_sliding_window": True,
            "sliding_window": 9,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}
_GENERATOR = torch.Generator().manual_seed(1)
PROMPTS = [torch.randint(3, VOCAB_SIZE, (n,), generator=_GENERATOR).tolist() for n in (1, 5, 16, 33, 70)]


@dataclass
class Case:
    oracle: PreTrainedModel
    folder: Path
    logits: list[Tensor]


@pytest.fixture(scope="module")
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    family, overrides = CASES[request.param]
    oracle = tiny_model(family, **overrides)
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return Case(oracle, folder, [oracle_logits(oracle, prompt) for prompt in PROMPTS])


@torch.no_grad()
def oracle_logits(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    logits: Tensor = model(torch.tensor([tokens])).logits[0]
    return logits


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        assert ours.shape == theirs.shape
        assert (ours - theirs).abs().max() < 1e-4


all_cases = pytest.mark.parametrize("case", CASES, indirect=True)
both_kernels = pytest.mark.parametrize("kernels", ["auto", "reference"])


@both_kernels
@all_cases
def test_ragged_prompts_give_transformers_logits_whole_in_chunks_and_from_shared_pages(
    case: Case, kernels: str
) -> None:
    for page_size in (1, 16):
        backend = load(case.folder, page_size_tokens=page_size, kernels=kernels)
        tables = page_ranges(backend, [len(prompt) for prompt in PROMPTS])
        whole = step_logits(backend, [step(p, 0, t) for p, t in zip(PROMPTS, tables, strict=True)])
        assert_close(whole, case.logits)
        assert_close(_in_chunks(backend, 7), case.logits)

        # The longest prompt again, its first 32 positions in the pages of the run above.
        shared = 32 // page_size
        own = page_ranges(backend, [500])[0][-8 * (16 // page_size) :]
        again = step(PROMPTS[-1][32:], 32, tables[-1][:shared] + own)
        assert_close(step_logits(backend, [again]), [case.logits[-1][32:]])


def _in_chunks(backend: ModelBackend, size: int) -> list[Tensor]:
    backend.kv.data.fill_(torch.nan)
    tables = page_ranges(backend, [len(prompt) for prompt in PROMPTS])
    parts: list[list[Tensor]] = [[] for _ in PROMPTS]
    for start in range(0, max(map(len, PROMPTS)), size):
        running = [i for i, prompt in enumerate(PROMPTS) if start < len(prompt)]
        steps = [step(PROMPTS[i][start : start + size], start, tables[i]) for i in running]
        for i, logits in zip(running, step_logits(backend, steps), strict=True):
            parts[i].append(logits)
    return [torch.cat(part) for part in parts]


@both_kernels
@all_cases
def test_64_greedy_tokens_are_those_of_transformers(case: Case, kernels: str) -> None:
    for page_size in (1, 16):
        backend = load(case.folder, page_size_tokens=page_size, kernels=kernels)
        for prompt, answer in zip(PROMPTS[1:], greedy(backend, PROMPTS[1:], 64), strict=True):
            # One pass over prompt and answer shows transformers' own choice after each token of it.
            choices = oracle_logits(case.oracle, prompt + answer).argmax(-1).tolist()
            assert answer == choices[len(prompt) - 1 : -1]


def _without(**changes: Any) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        decoder.config = dataclasses.replace(decoder.config, **changes)

    return change


def _without_tensor(*names: str) -> Callable[[Decoder], None]:
    def change(decoder: Decoder) -> None:
        for layer in decoder.layers:
            for name in names:
                assert getattr(layer, name) is not None
                setattr(layer, name, None)

    return change


def _plain_rope(decoder: Decoder) -> None:
    config = decoder.config
    frequencies = inverse_frequencies(RopeConfig(theta=config.rope.theta), config.head_dim)
    decoder.rotations = Rotations(frequencies, config.rope.attention_factor, decoder.dtype)


def _no_attention_factor(decoder: Decoder) -> None:
    frequencies = inverse_frequencies(decoder.config.rope, decoder.config.head_dim)
    decoder.rotations = Rotations(frequencies, 1.0, decoder.dtype)


def _tie(decoder: Decoder) -> None:
    decoder.lm_head = decoder.embedding


@pytest.mark.parametrize(
    ("case", "change"),
    [
        ("llama", _tie),
        ("llama biases", _without_tensor("qkv_bias")),
        ("llama biases", _without_tensor("o_bias")),
        ("llama biases", _without_tensor("gate_up_bias")),
        ("llama biases", _without_tensor("down_bias")),
        ("llama linear rope", _plain_rope),
        ("llama llama3 rope", _plain_rope),
        ("llama yarn rope", _plain_rope),
        ("llama yarn rope", _no_attention_factor),
        ("mistral", _without(windows=(None,) * 3)),
        ("qwen2", _without_tensor("qkv_bias")),
        ("qwen2 window", _without(windows=(9,) * 3)),
        ("qwen3", _without_tensor("qk_norm")),
        ("qwen3 bias", _without_tensor("o_bias")),
        ("smollm3", _without(rope_layers=(True,) * 3)),
        ("smollm3 window", _without(windows=(None,) * 3)),
    ],
    indirect=["case"],
)
def test_each_feature_shows_in_its_case(case: Case, change: Callable[[Decoder], None]) -> None:
    """The comparison with transformers would fail without the feature."""
    backend = load(case.folder)
    change(backend.decoder)
    (logits,) = step_logits(backend, [step(PROMPTS[-1], 0, page_ranges(backend, [70])[0])])
    assert (logits - case.logits[-1]).abs().max() > 0.05
