"""The matrices of transformers' models in our hands: the same products, and blocks where asked for."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.quant import dequantize
from mini_sglang.backend.quantize import quantize
from mini_sglang.backend.transformers_models.linears import PackedLinear, PackedRows
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import page_ranges, step, step_logits
from tests.backend.kernels.twins import VARIANTS
from tests.backend.transformers_models.families import Family, save, tiny_model
from tests.backend.transformers_models.test_families import load, prompts

FAST = VARIANTS[-1] != "generic"
# Gemma scales the rows of its embedding, which is also its head; GLM-4's two are apart, and it has biases.
FAMILIES = (
    Family("Gemma 2", "gemma2", config={"head_dim": 16, "intermediate_size": 64}),
    Family("GLM-4", "glm4", config={"intermediate_size": 64, "attention_bias": True}),
)
PROMPT = prompts()[2]
MODELS = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.model_type)


def logits_of(backend: ModelBackend) -> Tensor:
    (pages,) = page_ranges(backend, [len(PROMPT)])
    (logits,) = step_logits(backend, [step(PROMPT, 0, pages)])
    return logits


@torch.no_grad()
def rounded(model: Any, inner: int, outer: int) -> Any:
    """The model with its matrices rounded to ggml's blocks of these types."""
    other = copy.deepcopy(model)
    for module in other.modules():
        if isinstance(module, nn.Linear):
            kind = GGML_TYPES[outer if module is other.lm_head else inner]
            weight = module.weight.data
            weight.copy_(dequantize(quantize(weight, kind), kind, torch.float32).view(weight.shape))
    return other


@MODELS
def test_every_linear_is_packed_where_there_are_kernels(family: Family, tmp_path: Path) -> None:
    folder = save(tiny_model(family), tmp_path)
    packed, plain = load(folder), load(folder, kernels="reference")
    kinds = [{type(m) for m in b.decoder.model.modules()} for b in (packed, plain)]  # type: ignore[union-attr]
    assert (PackedLinear in kinds[0], nn.Linear in kinds[0]) == (FAST, not FAST)
    assert PackedLinear not in kinds[1]
    tied = family.model_type == "gemma2"
    rows = packed.decoder.model.get_input_embeddings()  # type: ignore[union-attr]
    assert isinstance(rows, PackedRows) == (FAST and tied)
    described = packed.describe(), plain.describe()
    assert described[0]["parameters"] == described[1]["parameters"]
    torch.testing.assert_close(logits_of(packed), logits_of(plain), rtol=1e-3, atol=1e-3)


@MODELS
@pytest.mark.parametrize(("setting", "inner", "outer"), [("int8", 8, 8), ("int4", 3, 8)])
def test_quantised_as_the_blocks_say(
    family: Family, setting: str, inner: int, outer: int, tmp_path: Path
) -> None:
    model = tiny_model(family)
    expected = rounded(model, inner, outer)(torch.tensor([PROMPT])).logits[0]
    folder = save(model, tmp_path)
    plain = load(folder, kernels="reference", quantization=setting)
    torch.testing.assert_close(logits_of(plain), expected, rtol=1e-3, atol=1e-3)
    if setting == "int8":
        # A head that is the embedding counts once.
        matrices = {id(m.weight): m.weight for m in model.modules() if isinstance(m, nn.Linear)}.values()
        spared = sum(w.nbytes - w.numel() * 34 // 32 for w in matrices if w.shape[1] % 32 == 0)
        assert plain.describe()["weight_bytes"] == sum(p.nbytes for p in model.parameters()) - spared
    fast = load(folder, quantization=setting)
    # Activations are rounded to 8 bits in the kernels.
    off = (logits_of(fast) - expected).square().mean().sqrt() / expected.std()
    assert off < 0.05
    assert fast.describe()["quantization"] == setting
    assert int(fast.describe()["weight_bytes"]) < 0.7 * int(load(folder).describe()["weight_bytes"])


def test_a_model_without_whole_blocks_cannot_be_quantised(tmp_path: Path) -> None:
    model = tiny_model(Family("GLM-4", "glm4", config={"hidden_size": 48, "head_dim": 12}))
    with pytest.raises(InvalidValueError, match="QUANTIZATION is 'int8'; it must be none: no matrix"):
        load(save(model, tmp_path), quantization="int8")
