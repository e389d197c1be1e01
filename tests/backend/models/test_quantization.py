"""QUANTIZATION: which matrices become blocks, and that the model then computes with their numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.quantize import quantize
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, StackedWeight
from mini_sglang.errors import InvalidValueError, ModelLoadError
from tests.backend.harness import load, page_ranges, step, step_logits
from tests.backend.loading import model_files
from tests.backend.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model

IDS = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()
Q4_1, Q8_0 = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0
# Of the matrices in layers, and of the embedding and head.
FORMATS = {"int8": (Q8_0, Q8_0), "int4": (Q4_1, Q8_0)}


def encode(values: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Our blocks, or plain numbers as the gguf package writes them."""
    if kind not in (Q4_1, Q8_0):
        return gguf.quants.quantize(values, kind)
    return quantize(torch.from_numpy(values), GGML_TYPES[kind]).numpy()


def logits(backend: ModelBackend, ids: list[int] = IDS) -> Tensor:
    (pages,) = page_ranges(backend, [len(ids)])
    return step_logits(backend, [step(ids, 0, pages)])[0]


def dequantized(model: PreTrainedModel, folder: Path, quantization: str) -> Path:
    """The model with each matrix turned into our blocks and, by the gguf package, back into float32."""
    inner, outer = FORMATS[quantization]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            kind = inner if ".layers." in name else outer
            if parameter.dim() == 2 and parameter.shape[1] % 32 == 0:
                numbers = gguf.quants.dequantize(encode(parameter.numpy(), kind), kind)
                parameter.copy_(torch.from_numpy(numbers))
    model.save_pretrained(folder)
    return folder


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama untied": ("llama", {"tie_word_embeddings": False}),
    "qwen2 tied, biases": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 tied": ("qwen3", {"tie_word_embeddings": True}),
    "a matrix that stays dense": ("llama", {"intermediate_size": 80}),
}


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_the_dequantised_weights(case: str, quantization: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    folder = save_tiny_model(tmp_path / "plain", family, **overrides)
    twin = dequantized(tiny_model(family, **overrides), tmp_path / "twin", quantization)
    backend = load(folder, quantization=quantization, kernels="reference")
    expected = logits(load(twin, kernels="reference"))
    assert torch.equal(logits(backend), expected)
    # On the kernels activations are rounded to 8 bits too.
    exact = logits(load(folder, kernels="reference"))
    native = logits(load(folder, quantization=quantization))
    tolerance = 0.1 if quantization == "int8" else 0.6
    assert (native - exact).std() < tolerance * exact.std()
    assert (native - expected).std() < 0.1 * exact.std()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("tied", [True, False])
def test_formats_and_sizes(tied: bool, quantization: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, tie_word_embeddings=tied)
    plain, backend = load(folder), load(folder, quantization=quantization)
    decoder = backend.decoder
    inner, outer = (kind.name for kind in FORMATS[quantization])
    for layer in decoder.layers:
        assert {weight.type.name for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)} == {inner}
    assert decoder.embedding.type.name == decoder.lm_head.type.name == outer
    assert (decoder.lm_head is decoder.embedding) is tied
    about, before = backend.describe(), plain.describe()
    assert (before["quantization"], about["quantization"]) == ("none", quantization)
    assert about["dtype"] == "float32" and about["parameters"] == before["parameters"]
    assert about["weight_bytes"] < before["weight_bytes"] * (0.27 if quantization == "int8" else 0.19)


def test_a_matrix_whose_rows_are_not_whole_blocks_stays_dense(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, intermediate_size=80)
    layer = load(folder, quantization="int4", kernels="reference").decoder.layers[0]
    assert isinstance(layer.down, DenseWeight)
    assert {type(weight) for weight in (layer.qkv, layer.o, layer.gate_up)} == {QuantizedWeight}


@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_the_blocks_are_made_from_the_numbers_of_the_file(dtype: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    backend = load(folder, quantization="int8", kernels="reference", dtype=dtype)
    assert backend.decoder.dtype == {"fp16": torch.float16, "bf16": torch.bfloat16}.get(dtype, torch.float32)
    tensors = load_file(folder / "model.safetensors")
    down = backend.decoder.layers[1].down
    expected = quantize(tensors["model.layers.1.mlp.down_proj.weight"], GGML_TYPES[Q8_0])
    assert isinstance(down, QuantizedWeight) and torch.equal(down.blocks, expected)
    exact = logits(load(folder, quantization="int8", kernels="reference"))
    assert (logits(backend) - exact).std() < 0.15 * exact.std()


@pytest.mark.parametrize("quantization", FORMATS)
@pytest.mark.parametrize("family", ["llama", "llama-tied", "qwen2"])
def test_a_dense_gguf_a_folder_and_a_gguf_of_our_blocks_are_one_model(
    family: str, quantization: str, tmp_path: Path
) -> None:
    model = model_files.tiny_model(family)
    model.save_pretrained(tmp_path / "folder")
    architecture = model_files.FAMILIES[family][2]
    inner, outer = FORMATS[quantization]
    dense = model_files.write_gguf(tmp_path / "dense.gguf", model, architecture)
    others = {"embed_tokens": outer, "lm_head": outer}
    blocks = model_files.write_gguf(
        tmp_path / "blocks.gguf", model, architecture, inner, others=others, encode=encode
    )
    ids = list(range(4, 40))
    expected = logits(load(blocks, gguf_dequantize=0), ids)
    for path in (tmp_path / "folder", dense):
        assert torch.equal(logits(load(path, quantization=quantization), ids), expected)


@pytest.mark.parametrize("kind", [gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.BF16])
def test_a_gguf_of_half_precision(kind: gguf.GGMLQuantizationType, tmp_path: Path) -> None:
    model = model_files.tiny_model("llama-tied")
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", kind)
    half = torch.float16 if kind == gguf.GGMLQuantizationType.F16 else torch.bfloat16
    expected = quantize(model.model.layers[2].mlp.down_proj.weight.detach().to(half), GGML_TYPES[Q8_0])
    down = load(path, quantization="int8", kernels="reference").decoder.layers[2].down
    assert isinstance(down, QuantizedWeight) and torch.equal(down.blocks, expected)


@pytest.mark.parametrize("dequantize", ["auto", 0, 1])
def test_blocks_are_not_quantised_again(dequantize: object, tmp_path: Path) -> None:
    model = model_files.tiny_model("llama-tied")
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", Q8_0)
    sentence = "QUANTIZATION is 'int4'; it must be none: .* in quantised blocks already"
    with pytest.raises(InvalidValueError, match=sentence):
        load(path, quantization="int4", gguf_dequantize=dequantize)


def test_of_a_gguf_with_both_only_dense_matrices_are_quantised(tmp_path: Path) -> None:
    model = model_files.tiny_model("llama-tied")
    others = {"k_proj": Q4_1, "mlp.down_proj": Q4_1, "embed_tokens": Q4_1}
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", others=others)
    decoder = load(path, quantization="int8", kernels="reference", gguf_dequantize=0).decoder
    layer = decoder.layers[0]
    assert [weight.type.name for weight in (layer.down, decoder.embedding)] == ["Q4_1", "Q4_1"]
    assert [weight.type.name for weight in (layer.o, layer.gate_up)] == ["Q8_0", "Q8_0"]
    assert isinstance(layer.qkv, StackedWeight)
    assert [part.type.name for part in layer.qkv.parts] == ["Q8_0", "Q4_1", "Q8_0"]


def test_a_model_without_whole_blocks_is_refused(tmp_path: Path) -> None:
    sizes = {"hidden_size": 40, "intermediate_size": 80, "head_dim": 10}
    folder = save_tiny_model(tmp_path, **sizes)
    with pytest.raises(InvalidValueError, match=r"must be none: no matrix .* multiple of 32"):
        load(folder, quantization="int8")


@pytest.mark.parametrize("number", [torch.nan, torch.inf, 1e9])
def test_a_weight_that_no_block_holds_names_the_tensor(number: float, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 7] = number
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelLoadError, match=f"The tensor {name} cannot be quantised: a number"):
        load(folder, quantization="int4")
