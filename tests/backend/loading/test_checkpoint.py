"""Checkpoints: the same model as safetensors and as GGUF, and what GGUF metadata means."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mini_sglang.backend.loading.checkpoint import open_checkpoint
from mini_sglang.backend.loading.gguf import read_gguf
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight
from mini_sglang.errors import ModelLoadError
from tests.backend.loading.model_files import (
    FAMILIES,
    Q8_0,
    dense,
    interleave,
    load_everything,
    tiny_model,
    write_gguf,
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one safetensors file."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", Q8_0)


@pytest.mark.parametrize("family", FAMILIES)
def test_safetensors_and_gguf_of_one_model_are_equal(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path / "hf")
    write_gguf(tmp_path / "m.gguf", model, FAMILIES[family][2])
    folder = open_checkpoint(tmp_path / "hf", dequantize=False)
    file = open_checkpoint(tmp_path / "m.gguf", dequantize=False)
    expected = model.state_dict()
    if model.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    assert set(folder.names()) == set(file.names()) == set(expected)
    assert folder.nbytes == file.nbytes == sum(value.nbytes for value in expected.values())
    for name, value in expected.items():
        assert folder.shape(name) == file.shape(name) == value.shape
        assert torch.equal(dense(folder, name), value), name
        assert torch.equal(dense(file, name), value), name
    ours = ModelConfig.from_hf(file.config, file.generation_config)
    assert ours == ModelConfig.from_hf(folder.config, folder.generation_config)
    assert file.config["bos_token_id"] == 1 and file.config["pad_token_id"] == 3


@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantised_gguf_equals_what_transformers_loads(kind: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama-tied"), "llama", gguf.GGMLQuantizationType[kind])
    reference = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf").state_dict()
    for dequantize in (False, True):
        checkpoint = open_checkpoint(tmp_path / "m.gguf", dequantize=dequantize)
        for name in checkpoint.names():
            assert torch.equal(dense(checkpoint, name), reference[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_chooses_the_kind_of_weight(tiny_gguf: Path, dtype: torch.dtype) -> None:
    name = "model.layers.0.self_attn.q_proj.weight"
    kept = open_checkpoint(tiny_gguf, dequantize=False).weight(name, dtype)
    made = open_checkpoint(tiny_gguf, dequantize=True).weight(name, dtype)
    assert isinstance(kept, QuantizedWeight) and isinstance(made, DenseWeight)
    assert kept.dtype == made.dtype == dtype
    assert kept.nbytes == 64 * 2 * 34
    assert torch.equal(kept.dequantize(dtype), made.tensor)


@pytest.mark.parametrize(
    ("fast_types", "kept"), [({"Q8_0", "Q4_0"}, True), ({"Q4_0"}, False), (frozenset(), False)]
)
def test_blocks_are_kept_where_every_type_is_fast(
    tiny_gguf: Path, fast_types: frozenset[str], kept: bool
) -> None:
    checkpoint = open_checkpoint(tiny_gguf, dequantize=None, fast_types=fast_types)
    weight = checkpoint.weight("model.layers.0.self_attn.q_proj.weight", torch.float32)
    assert isinstance(weight, QuantizedWeight if kept else DenseWeight)


def test_blocks_are_the_bytes_of_the_file(tiny_gguf: Path) -> None:
    weight = open_checkpoint(tiny_gguf, dequantize=False).weight(
        "model.layers.1.mlp.up_proj.weight", torch.float32
    )
    assert isinstance(weight, QuantizedWeight)
    with read_gguf(tiny_gguf) as file:
        assert weight.blocks.numpy().tobytes() == file.view("blk.1.ffn_up.weight").tobytes()


def test_safetensors_in_the_compute_dtype_are_not_copied(folder: Path) -> None:
    checkpoint = open_checkpoint(folder, dequantize=False)
    pointers = {checkpoint.tensor("lm_head.weight", torch.float32).data_ptr() for _ in range(2)}
    assert len(pointers) == 1


def test_weights_outlive_a_closed_checkpoint(folder: Path, tiny_gguf: Path) -> None:
    for path in (folder, tiny_gguf):
        checkpoint = open_checkpoint(path, dequantize=False)
        name = "model.layers.0.mlp.up_proj.weight"
        weight, copied = checkpoint.weight(name, torch.float32), dense(checkpoint, name).clone()
        checkpoint.close()
        checkpoint.close()
        assert torch.equal(weight.dequantize(torch.float32), copied)


def resident_bytes(path: Path) -> int:
    """What this process has in memory of its maps of a file."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in line.split()[0]:
            inside = line.endswith(str(path))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def test_released_bytes_leave_the_memory_and_can_be_read_again(folder: Path, starter_gguf: Path) -> None:
    for path, file in ((folder, folder / "model.safetensors"), (starter_gguf, starter_gguf)):
        checkpoint = open_checkpoint(path, dequantize=False)
        names = [name for name in sorted(checkpoint.names()) if name.endswith("proj.weight")]
        weights = [checkpoint.weight(name, torch.float32) for name in names]
        sums = [float(weight.dequantize(torch.float32).double().sum()) for weight in weights]
        read = resident_bytes(file)
        checkpoint.release()
        assert resident_bytes(file) < read / 10
        again = [float(weight.dequantize(torch.float32).double().sum()) for weight in weights]
        assert again == sums
        checkpoint.close()


def test_starter_model(starter_gguf: Path) -> None:
    checkpoint = open_checkpoint(starter_gguf, dequantize=False)
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    assert (config.family, config.num_layers, config.hidden_size) == ("llama", 30, 576)
    assert config.eos_ids == (2,) and config.tied_embeddings and config.norm_eps == 1e-5
    assert len(checkpoint.names()) == 272
    name = "model.layers.7.self_attn.k_proj.weight"
    blocks = read_gguf(starter_gguf).view("blk.7.attn_k.weight").reshape(192, -1)
    stored = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1)
    assert np.array_equal(interleave(dense(checkpoint, name).numpy(), heads=3), stored)


def gguf_config(tmp_path: Path, family: str, extra: Callable[[gguf.GGUFWriter], None]) -> dict[str, Any]:
    path = write_gguf(tmp_path / "m.gguf", tiny_model(family), FAMILIES[family][2], extra=extra)
    return open_checkpoint(path, dequantize=False).config


def test_yarn(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(4.0)
        writer.add_rope_scaling_orig_ctx_len(64)

    rope = gguf_config(tmp_path, "qwen2", extra)["rope_parameters"]
    assert rope == {
        "rope_type": "yarn",
        "rope_theta": 1_000_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
    }


@pytest.mark.parametrize("typed", [True, False])
def test_linear_scaling_with_and_without_its_type(tmp_path: Path, typed: bool) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_rope_scaling_factor(2.0)
        if typed:
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)

    rope = gguf_config(tmp_path, "qwen2", extra)["rope_parameters"]
    assert rope == {"rope_type": "linear", "rope_theta": 1_000_000.0, "factor": 2.0}


def test_rope_factors(tmp_path: Path) -> None:
    factors = np.array([1, 1, 1.5, 4, 8, 8, 8, 8], dtype=np.float32)
    config = gguf_config(tmp_path, "llama", lambda writer: writer.add_tensor("rope_freqs.weight", factors))
    assert config["rope_parameters"]["rope_type"] == "factors"
    assert config["rope_parameters"]["factors"] == factors.tolist()
    assert ModelConfig.from_hf(config).rope.divisors == tuple(factors.tolist())


def test_every_fourth_layer_of_smollm3_has_no_rope(tmp_path: Path) -> None:
    config = gguf_config(tmp_path, "smollm3", lambda writer: None)
    assert config["no_rope_layers"] == tiny_model("smollm3").config.no_rope_layers == [1, 1, 1, 0]


def test_all_ends_of_text_are_kept(tmp_path: Path) -> None:
    def extra(writer: gguf.GGUFWriter) -> None:
        writer.add_eot_token_id(7)
        writer.add_eom_token_id(2)

    assert gguf_config(tmp_path, "qwen2", extra)["eos_token_id"] == [2, 7]


REFUSED_KEYS: dict[str, tuple[Callable[[gguf.GGUFWriter], None], str]] = {
    "experts": (lambda w: w.add_expert_count(8), "llama.expert_count is 8"),
    "a part of a split model": (lambda w: w.add_uint16("split.count", 3), "llama-gguf-split"),
    "longrope": (lambda w: w.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE), "'longrope'"),
    "attention factor without yarn": (lambda w: w.add_rope_scaling_attn_factors(1.5), "attn_factor is 1.5"),
    "end of text outside the vocabulary": (lambda w: w.add_eot_token_id(96), "from 0 to 95"),
    "a foreign tensor": (
        lambda w: w.add_tensor("blk.0.ssm_a", np.zeros(4, dtype=np.float32)),
        "'blk.0.ssm_a'",
    ),
    "factors of a wrong length": (
        lambda w: w.add_tensor("rope_freqs.weight", np.ones(5, dtype=np.float32)),
        r"\(5,\)",
    ),
    "factors that are not positive": (
        lambda w: w.add_tensor("rope_freqs.weight", np.zeros(8, dtype=np.float32)),
        "above 0",
    ),
}


@pytest.mark.parametrize("case", REFUSED_KEYS)
def test_what_cannot_be_honoured_is_refused(case: str, tmp_path: Path) -> None:
    extra, expected = REFUSED_KEYS[case]
    with pytest.raises(ModelLoadError, match=expected):
        gguf_config(tmp_path, "llama-tied", extra)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    write_gguf(tmp_path / "m.gguf", tiny_model("llama-tied"), "gemma3")
    with pytest.raises(ModelLoadError, match=r"'gemma3'.*llama, qwen2, qwen3, smollm3"):
        open_checkpoint(tmp_path / "m.gguf", dequantize=True)


@pytest.mark.parametrize(
    "suffix", ["block_count", "embedding_length", "attention.head_count", "attention.layer_norm_rms_epsilon"]
)
def test_a_missing_key_is_named(tiny_gguf: Path, tmp_path: Path, suffix: str) -> None:
    data = tiny_gguf.read_bytes()
    renamed = f"llama.{suffix}".encode()
    assert data.count(renamed) >= 1
    (tmp_path / "m.gguf").write_bytes(data.replace(renamed, renamed[:-1] + b"X", 1))
    with pytest.raises(ModelLoadError, match=f"llama.{suffix} is 'missing'"):
        open_checkpoint(tmp_path / "m.gguf", dequantize=True)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_or_cut_gguf_headers_load_or_are_refused(
    tiny_gguf: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray(tiny_gguf.read_bytes())
    header = min(tensor.offset for tensor in read_gguf(tiny_gguf).tensors.values())
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, header - 1))
        content[position] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    try:
        load_everything(path)
    except ModelLoadError as error:
        assert 0 < len(str(error)) < 1000


def test_unknown_names_and_vectors_asked_for_as_matrices(folder: Path, tiny_gguf: Path) -> None:
    for path in (folder, tiny_gguf):
        checkpoint = open_checkpoint(path, dequantize=False)
        for ask in (checkpoint.weight, checkpoint.tensor):
            with pytest.raises(ModelLoadError, match=r"no tensor 'model\.foo'"):
                ask("model.foo", torch.float32)
        with pytest.raises(ModelLoadError, match="no tensor"):
            checkpoint.shape("x" * 5000)
        with pytest.raises(ModelLoadError, match="must be a matrix"):
            checkpoint.weight("model.norm.weight", torch.float32)
