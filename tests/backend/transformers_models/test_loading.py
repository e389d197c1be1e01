"""Loading through transformers: what is refused, and with which sentence."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.transformers_models.kinds import choose_kind
from mini_sglang.backend.transformers_models.loading import load_model
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError
from tests.backend.transformers_models.families import (
    CONTEXT,
    PAGED,
    PER_REQUEST,
    Family,
    save,
    tiny_config,
    tiny_model,
)
from tests.backend.transformers_models.test_families import answers, generated, load, prompts

GLM = Family("GLM-4", "glm4")
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tiny_model(GLM), tmp_path_factory.mktemp("glm4"))


def config_of(folder: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return config


def copy(folder: Path, to: Path, tensors: dict[str, torch.Tensor] | None = None, **config: Any) -> Path:
    to.mkdir(exist_ok=True)
    save_file(load_file(folder / WEIGHTS) if tensors is None else tensors, to / WEIGHTS, {"format": "pt"})
    (to / "config.json").write_text(json.dumps({**config_of(folder), **config}))
    return to


def model_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return load_model(folder, config_of(folder), dtype, torch.device("cpu"), "sdpa", False)


def test_a_loaded_model_is_ready_and_of_the_dtype_asked_for(folder: Path) -> None:
    model = model_of(folder, torch.bfloat16)
    assert not model.training
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert model.config._attn_implementation == "sdpa"


def test_without_transformers_one_sentence_says_what_to_install(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError) as caught:
        load(folder)
    assert str(caught.value) == (
        "A model of the type 'glm4' runs through transformers, which is not installed: "
        'pip install "mini-sglang[transformers]".'
    )


def test_a_missing_tensor_is_named(folder: Path, tmp_path: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["model.layers.1.mlp.down_proj.weight"]
    with pytest.raises(ModelLoadError, match=r"no tensor 'model\.layers\.1\.mlp\.down_proj\.weight', which"):
        model_of(copy(folder, tmp_path, tensors))


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path, tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.o_proj.weight"
    tensors = {**load_file(folder / WEIGHTS), name: torch.zeros(3, 5)}
    with pytest.raises(ModelLoadError, match=rf"another shape of the tensor '{name}', which a glm4"):
        model_of(copy(folder, tmp_path, tensors))


def test_damaged_and_pickled_weights_are_refused(folder: Path, tmp_path: Path) -> None:
    broken = copy(folder, tmp_path)
    (broken / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors is incomplete"):
        load(broken)
    (broken / WEIGHTS).rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"pickled weights such as pytorch_model\.bin are never loaded"):
        load(broken)


def test_the_repositorys_own_code_runs_only_when_trusted(tmp_path: Path) -> None:
    model = tiny_model(GLM)
    folder = copy(
        save(model, tmp_path / "plain"),
        tmp_path / "own",
        model_type="own_glm",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"},
    )
    (folder / "own.py").write_text(
        "from transformers import Glm4Config, Glm4ForCausalLM\n"
        "class OwnConfig(Glm4Config):\n    model_type = 'own_glm'\n"
        "class OwnForCausalLM(Glm4ForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ModelLoadError, match="repository's own code, set TRUST_REMOTE_CODE=1"):
        load(folder)
    backend = load(folder, trust_remote_code=True)
    assert backend.describe()["model_type"] == "own_glm"
    (prompt,) = prompts()[2:3]
    assert answers(engine_of(backend), [prompt]) == [generated(model, prompt)]


def engine_of(backend: Any) -> Any:
    from mini_sglang.engine.engine import EngineCore

    return EngineCore(backend, Settings.resolve({"device": "cpu"}, env={}), frozenset())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context_length": CONTEXT + 1}, f"CONTEXT_LENGTH is {CONTEXT + 1}; it must be at most {CONTEXT}"),
        ({"kv_dtype": "int8"}, "KV_DTYPE is 'int8'; it must be auto"),
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(
    folder: Path, settings: dict[str, Any], sentence: str
) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        load(folder, **settings)


def test_a_gguf_of_another_architecture_is_refused_as_ever(tmp_path: Path) -> None:
    import gguf

    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "gemma2")
    writer.add_uint32("gemma2.block_count", 1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelLoadError, match="the architecture 'gemma2'; supported are"):
        load_backend(tmp_path / "x.gguf", Settings.resolve({"device": "cpu"}, env={}))


@pytest.mark.parametrize("family", PAGED + PER_REQUEST, ids=lambda family: family.model_type)
def test_the_config_tells_the_kind(family: Family, tmp_path: Path) -> None:
    if family.kind == "paged":
        tiny_config(family).save_pretrained(tmp_path)
    else:
        config = {"model_type": family.model_type, **family.config}
        (tmp_path / "config.json").write_text(json.dumps(config))
    config = config_of(tmp_path)
    assert choose_kind(tmp_path, config) == family.kind


@pytest.mark.parametrize("architecture", ["LlamaForCausalLM", "Qwen3ForCausalLM"])
def test_native_families_need_no_transformers(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert choose_kind(Path("/nowhere"), {"architectures": [architecture]}) == "native"
