"""Adapters against PEFT: the same logits and the same greedy tokens, alone and mixed in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.types import SamplingParams
from tests.backend.harness import load, page_ranges
from tests.backend.kernels.twins import VARIANTS
from tests.backend.lora.tiny_adapters import peft_greedy, peft_logits, save_tiny_adapter
from tests.backend.tiny_models import tiny_model

FAST = VARIANTS[-1] != "generic"
# The second has patterns, and ranks that fill no group of rows.
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "patterns": {
        "r": 5,
        "lora_alpha": 7,
        "rank_pattern": {"q_proj": 3, "model.layers.1.mlp.down_proj": 20, r"layers\.2\.self_attn\.o_proj": 1},
        "alpha_pattern": {"v_proj": 40, "^model.layers.0.mlp.up_proj": 3},
    },
    "rslora": {"r": 32, "use_rslora": True, "targets": ("q_proj", "v_proj")},
    "layers": {"targets": ("k_proj", "gate_proj", "down_proj"), "layers_to_transform": [1, 2]},
    "pattern of targets": {"targets": r".*layers\.[02]\.(mlp\.up|self_attn\.o)_proj"},
    "exclusion": {"exclude_modules": ["layers.1.self_attn.q_proj", "up_proj"], "bias": "none"},
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"head_dim": 32}),
}
_SAMPLE = SampleSpec(SamplingParams(), seed=0, index=0)
PROMPTS = [[3 + (7 * i + 5 * j) % 290 for j in range(n)] for i, n in enumerate((1, 40, 17, 33))]


@torch.inference_mode()
def forward(backend: ModelBackend, steps: Sequence[SequenceStep], program: bool) -> list[Tensor]:
    """Logits after each sequence's last token."""
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    batch = Batch.build(steps, limits, torch.device("cpu"))
    if program:
        assert backend.program is not None
        hidden = backend.program.forward(batch).clone()
    else:
        adapters = backend.adapters.begin(batch) if batch.adapters else None  # type: ignore[union-attr]
        hidden = backend.decoder.forward(batch, backend.kv, backend.attention, adapters)
    logits = backend.decoder.logits(hidden)
    found = [logits[0]] * len(steps)
    for place, row in batch.samples:
        found[place] = logits[row]
    return found


def attach(backend: ModelBackend, folder: Path) -> int:
    assert backend.adapters is not None
    return backend.adapters.attach(backend.adapters.read(open_adapter(folder.name, folder)))


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder, the model in it, and the adapters' folders by name."""
    family, overrides = MODELS[request.param]
    root = tmp_path_factory.mktemp(request.param)
    reference = tiny_model(family, **overrides)
    reference.save_pretrained(root / "model")
    folders = {
        name: save_tiny_adapter(root / name.replace(" ", "-"), reference, seed=seed, **config)
        for seed, (name, config) in enumerate(ADAPTERS.items())
    }
    return root / "model", reference, folders


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_prompt_in_chunks(model: Any, name: str, kernels: str) -> None:
    folder, reference, folders = model
    backend = load(folder, kernels=kernels)
    adapter = attach(backend, folders[name])
    prompt = PROMPTS[1]
    expected = peft_logits(reference, folders[name], prompt)
    assert (expected - peft_logits(reference, None, prompt)).abs().max() > 0.1, "it must change something"
    for program in [False, True] if backend.program else [False]:
        (pages,) = page_ranges(backend, [len(prompt)])
        backend.kv.data.view(torch.uint8).fill_(255)
        for start, end in ((0, 23), (23, 24), (24, 40)):
            step = SequenceStep(prompt[start:end], start, pages, _SAMPLE, adapter=adapter)
            (logits,) = forward(backend, [step], program)
            torch.testing.assert_close(logits, expected[end - 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_three_adapters_and_none_in_one_batch(model: Any, kernels: str) -> None:
    folder, reference, folders = model
    backend = load(folder, kernels=kernels)
    chosen = [folders["patterns"], None, folders["plain"], folders["rslora"]]
    ids = [0 if path is None else attach(backend, path) for path in chosen]
    tables = page_ranges(backend, [len(prompt) + 8 for prompt in PROMPTS])
    answers: list[list[int]] = [[] for _ in PROMPTS]
    for _ in range(6):
        steps = [
            SequenceStep([*p, *a][-1:] if a else p, len(p) + len(a) - 1 if a else 0, t, _SAMPLE, adapter=i)
            for p, a, t, i in zip(PROMPTS, answers, tables, ids, strict=True)
        ]
        for answer, result in zip(answers, backend.run(steps), strict=True):
            assert result.error is None and result.token_id is not None
            answer.append(result.token_id)
    expected = [peft_greedy(reference, path, p, 6) for path, p in zip(chosen, PROMPTS, strict=True)]
    assert answers == expected
