"""Checkpoints in fp8 with a scale per block, made on the spot, against the numbers they stand for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mini_sglang.backend.loading.checkpoint import open_checkpoint
from mini_sglang.backend.loading.fp8_blocks import dequantize_blocks
from mini_sglang.backend.loading.parts import Part
from mini_sglang.errors import ModelLoadError
from tests.backend.harness import greedy, load
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family

PROMPTS = [[5, 6, 7], [(7 * i * i) % 190 + 5 for i in range(30)]]
# Rows and columns that share a scale; matrices of 64 and 96 do not divide by all of them.
BLOCKS = ([128, 128], [32, 16], [40, 24])


def in_blocks(values: Tensor, block: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, scales and the numbers they stand for, by loops over blocks."""
    rows, columns = block
    codes = torch.empty_like(values, dtype=torch.float8_e4m3fn)
    numbers = torch.empty_like(values)
    scales = torch.empty(-(-values.shape[0] // rows), -(-values.shape[1] // columns))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            here = slice(i * rows, (i + 1) * rows), slice(j * columns, (j + 1) * columns)
            scales[i, j] = values[here].abs().max() / 448
            codes[here] = (values[here] / scales[i, j]).to(torch.float8_e4m3fn)
            numbers[here] = codes[here].float() * scales[i, j]
    return codes, scales, numbers


def make_fp8(folder: Path, plain: Path, block: list[int], scales_dtype: torch.dtype = torch.float32) -> Path:
    """The model in ``plain`` in fp8 as published ones are; ``plain`` gets its numbers."""
    tensors = load_file(plain / "model.safetensors")
    written = dict(tensors)
    for name, values in tensors.items():
        if ".layers." in name and values.dim() == 2:
            codes, scales, _ = in_blocks(values, block)
            scales = scales.to(scales_dtype)
            written[name], written[f"{name}_scale_inv"] = codes, scales
            wide = scales.float().repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
            tensors[name] = codes.float() * wide[: values.shape[0], : values.shape[1]]
    folder.mkdir()
    save_file(written, folder / "model.safetensors")
    save_file(tensors, plain / "model.safetensors")
    set_config(plain, folder, {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": block})
    return folder


def set_config(plain: Path, folder: Path, quantization: dict[str, Any]) -> None:
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_part_of_a_matrix(block: list[int], dtype: torch.dtype) -> None:
    codes, scales, numbers = in_blocks(
        torch.randn(150, 200, generator=torch.Generator().manual_seed(0)), block
    )
    both = block[0], block[1]
    assert torch.equal(dequantize_blocks(codes, scales, both, None, dtype), numbers.to(dtype))
    for start, stop in ((0, 1), (7, 130), (100, 150), (30, 30)):
        rows = dequantize_blocks(codes, scales, both, Part(0, start, stop), dtype)
        assert torch.equal(rows, numbers[start:stop].to(dtype))
        columns = dequantize_blocks(codes, scales, both, Part(1, start, stop), dtype)
        assert torch.equal(columns, numbers[:, start:stop].to(dtype))


@pytest.mark.parametrize("block", BLOCKS, ids=str)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_model_is_that_of_its_numbers(family: str, block: list[int], tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain", family, tie_word_embeddings=family == "qwen3")
    folder = make_fp8(tmp_path / "fp8", plain, block)
    backend = load(folder)
    assert greedy(backend, PROMPTS, 4) == greedy(load(plain), PROMPTS, 4)
    assert backend.describe()["dtype"] == "float32"
    # From there on it is a dense model as any.
    found, twin = (load(path, quantization="int8", kernels="reference") for path in (folder, plain))
    assert greedy(found, PROMPTS, 4) == greedy(twin, PROMPTS, 4)


def test_scales_of_half_precision(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    folder = make_fp8(tmp_path / "fp8", plain, [128, 128], torch.bfloat16)
    assert greedy(load(folder), PROMPTS, 4) == greedy(load(plain), PROMPTS, 4)


def test_a_checkpoint_names_the_matrices_alone(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    folder = make_fp8(tmp_path / "fp8", plain, [32, 16])
    found, twin = open_checkpoint(folder, dequantize=None), open_checkpoint(plain, dequantize=None)
    try:
        assert set(found.names()) == set(twin.names())
        name = "model.layers.1.mlp.down_proj.weight"
        assert found.shape(name) == (64, 96) and not found.in_blocks(name) and found.block_size(name) == 1
        assert torch.equal(found.tensor(name, None), twin.tensor(name, None))
        part = Part(1, 20, 70)
        assert torch.equal(
            found.weight(name, torch.float16, part).dequantize(torch.float16),
            twin.weight(name, torch.float16, part).dequantize(torch.float16),
        )
    finally:
        found.close()
        twin.close()


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"quant_method": "fp8"}, "weight_block_size None"),
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size \[128\]"),
        ({"quant_method": "fp8", "weight_block_size": [0, 128]}, "such as"),
        ({"quant_method": "fp8", "weight_block_size": [1, True]}, "such as"),
        (
            {"quant_method": "fp8", "weight_block_size": [8, 8], "fmt": "e5m2"},
            "format 'e5m2'; it must be e4m3",
        ),
        ({"quant_method": "compressed-tensors"}, "quantised .*compressed-tensors.*, which is not supported"),
    ],
)
def test_other_kinds_are_refused(settings: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    folder = make_fp8(tmp_path / "fp8", plain, [32, 16])
    set_config(plain, folder, settings)
    with pytest.raises(ModelLoadError, match=sentence):
        load(folder)


def test_code_of_transformers_is_refused(tmp_path: Path) -> None:
    family = next(family for family in PAGED if family.model_type == "gemma2")
    folder = make_fp8(tmp_path / "fp8", save_family(tiny_family(family), tmp_path / "plain"), [32, 16])
    with pytest.raises(
        ModelLoadError, match=r"quantised \(fp8\), which is read for models of this stack's own"
    ):
        load(folder)
    own = make_fp8(tmp_path / "own", save_tiny_model(tmp_path / "dense"), [32, 16])
    with pytest.raises(ModelLoadError, match="decoder alone"):
        load(own, engine_fast_decode=True)


@pytest.mark.parametrize("damage", ["missing", "shape", "type"])
def test_scales_that_do_not_fit_name_the_tensor(damage: str, tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    folder = make_fp8(tmp_path / "fp8", plain, [32, 16])
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.o_proj.weight_scale_inv"
    scales = tensors.pop(name)
    if damage != "missing":
        tensors[name] = scales[:1].contiguous() if damage == "shape" else scales.double()
    save_file(tensors, folder / "model.safetensors")
    sentence = {
        "missing": "has no tensor",
        "shape": r"the shape \[1, 4\]; it must be \[2, 4\]",
        "type": "F64",
    }
    with pytest.raises(ModelLoadError, match=sentence[damage]) as caught:
        load(folder)
    assert name in str(caught.value)


def test_e4m3_without_blocks_in_the_config_is_refused(tmp_path: Path) -> None:
    plain = save_tiny_model(tmp_path / "plain")
    folder = make_fp8(tmp_path / "fp8", plain, [32, 16])
    (folder / "config.json").write_text((plain / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="has the type F8_E4M3; supported are"):
        load(folder)
