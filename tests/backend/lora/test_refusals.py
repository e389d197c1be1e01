"""Folders that are no adapter for this model: one sentence each, and nothing is loaded."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mini_sglang.backend.lora.config import AdapterConfig
from mini_sglang.backend.lora.files import open_adapter, parse_adapters
from mini_sglang.backend.lora.source import adapter_in, find_adapters
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError, ModelLoadError
from mini_sglang.types import Adapter
from tests.backend.harness import load
from tests.backend.lora.tiny_adapters import save_tiny_adapter
from tests.backend.tiny_models import tiny_model

Q0 = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> ModelBackend:
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    return load(folder, max_loras=2, max_lora_rank=16)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_adapter(tmp_path_factory.mktemp("adapters") / "whole", tiny_model())


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole, tmp_path / "adapter"))


def refusal(backend: ModelBackend, folder: Path) -> str:
    """The sentence that says why the adapter is not loaded."""
    assert backend.adapters is not None
    with pytest.raises((InvalidValueError, ModelLoadError)) as caught:
        backend.adapters.read(open_adapter("a", folder))
    sentence = str(caught.value)
    assert sentence.endswith(".") and "\n" not in sentence
    return sentence


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"task_type": "SEQ_CLS"}, "task_type is 'SEQ_CLS'"),
        ({"bias": "lora_only"}, "bias is 'lora_only'"),
        ({"lora_bias": True}, "lora_bias is True"),
        ({"use_dora": True}, "use_dora is True"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save is \['lm_head'\]"),
        ({"target_modules": ["q_proj", "c_attn"]}, "target_modules is 'c_attn'"),
        ({"target_modules": ["embed_tokens"]}, "target_modules is 'embed_tokens'"),
        ({"target_modules": ["q_proj"]}, "has weights for .* which its configuration does not name"),
        ({"layers_to_transform": [0]}, "has weights for model.layers.1"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out is True"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa'"),
        ({"a_field_of_tomorrow": 3}, "a_field_of_tomorrow is 3"),
        ({"r": 4}, r"lora_A of model.layers.0.self_attn.q_proj .* must be \[4, 64\]"),
        ({"r": 0}, "r is 0"),
        ({"r": 99}, r"r is 99; it must be at most 16 \(MAX_LORA_RANK\)"),
        ({"lora_alpha": "much"}, "lora_alpha is 'much'"),
        ({"use_rslora": 1}, "use_rslora is 1"),
        ({"rank_pattern": {"(a+)+b": 2}}, "rank_pattern is '\\(a\\+\\)\\+b'"),
        ({"rank_pattern": {"q_proj": "x"}}, "rank_pattern is 'x'"),
        ({"alpha_pattern": {"[": 2}}, "alpha_pattern is '\\['"),
        ({"layers_pattern": "blocks"}, "layers_pattern is 'blocks'"),
    ],
)
def test_what_the_configuration_asks_for(
    backend: ModelBackend, folder: Path, changes: dict[str, Any], told: str
) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    assert re.search(told, refusal(backend, folder))


def _without(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        del tensors[name]

    return change


def _with(name: str, value: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: value})


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (_without(Q0.format("B")), "no lora_B of model.layers.0.self_attn.q_proj"),
        (
            lambda tensors: [tensors.pop(Q0.format(x)) for x in "AB"],
            "no weights for model.layers.0.self_attn",
        ),
        (lambda tensors: tensors.clear(), "has no weights"),
        (_with(Q0.format("A"), torch.ones(8, 63)), r"shape \[8, 63\]"),
        (_with(Q0.format("B"), torch.ones(96, 8)), r"shape \[96, 8\]"),
        (_with(Q0.format("A"), torch.full((8, 64), torch.nan)), "not finite"),
        (_with(Q0.format("A"), torch.ones(8, 64, dtype=torch.int8)), "has the type I8"),
        (_with(Q0.format("A").replace("lora_A", "lora_magnitude_vector"), torch.ones(64)), "magnitude"),
        (_with("base_model.model.lm_head.lora_A.weight", torch.ones(8, 64)), "lm_head"),
        (
            lambda tensors: tensors.update(
                {Q0.format(x).replace("layers.0", "layers.3"): tensors[Q0.format(x)].clone() for x in "AB"}
            ),
            "layers.3.self_attn.q_proj, which the model does not have",
        ),
    ],
)
def test_what_its_weights_are(backend: ModelBackend, folder: Path, change: Any, told: str) -> None:

    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    assert re.search(told, refusal(backend, folder))


@pytest.mark.parametrize(
    "damage", ["cut", "empty", "noise", "json", "pickle", "no config", "no folder", "list"]
)
def test_damage(backend: ModelBackend, folder: Path, damage: str) -> None:
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    if damage == "cut":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif damage == "empty":
        weights.write_bytes(b"")
    elif damage == "noise":
        weights.write_bytes(b"\xff" * 300)
    elif damage == "json":
        config.write_text("{")
    elif damage == "list":
        config.write_text("[]")
    elif damage == "pickle":
        weights.rename(folder / "adapter_model.bin")
    elif damage == "no config":
        config.unlink()
    else:
        shutil.rmtree(folder)
    assert str(folder) in refusal(backend, folder)


def test_a_folder_that_changes_while_it_is_loaded(backend: ModelBackend, folder: Path) -> None:
    adapter = open_adapter("a", folder)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text() + " ")
    assert backend.adapters is not None
    with pytest.raises(ModelLoadError, match="has changed"):
        backend.adapters.read(adapter)
    assert open_adapter("a", folder).key != adapter.key


def test_there_is_room_for_so_many(backend: ModelBackend, whole: Path) -> None:
    adapters = backend.adapters
    assert adapters is not None
    prepared = adapters.read(open_adapter("a", whole))
    ids = [adapters.attach(prepared), adapters.attach(prepared)]
    with pytest.raises(InvalidValueError, match="MAX_LORAS"):
        adapters.attach(prepared)
    for adapter_id in ids:
        adapters.detach(adapter_id)
    with pytest.raises(InvalidValueError, match="adapter is 1"):
        adapters.check([0, 1])


def test_names_and_places() -> None:
    assert parse_adapters(None) == [] == parse_adapters(" , ")
    assert parse_adapters("a=/x/y, b = owner/name ,/z/c/") == [
        ("a", "/x/y"),
        ("b", "owner/name"),
        ("c", "/z/c/"),
    ]
    for text in ("a=", "=b", "a=x,a=y", "a b=x", "a@b=x", "../a=x"):
        with pytest.raises(InvalidValueError):
            parse_adapters(text)


def test_more_than_there_is_room_for_is_no_start(whole: Path) -> None:
    settings = Settings.resolve({"lora_adapters": f"a={whole},b={whole}", "max_loras": 1}, {})
    with pytest.raises(InvalidValueError, match=r"at most 1 adapters \(MAX_LORAS\)"):
        find_adapters(settings, print)


@pytest.mark.parametrize("place", ["../secret", "/", "link", "..", "nothing", "a\0b", "x" * 5000, "file"])
def test_a_client_stays_within_the_root(tmp_path: Path, whole: Path, place: str) -> None:
    root = tmp_path / "root"
    root.mkdir()
    shutil.copytree(whole, tmp_path / "secret")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "file").write_text("")
    with pytest.raises(MiniSglangError) as caught:
        adapter_in(root, "a", place)
    assert str(tmp_path) not in str(caught.value)
    shutil.copytree(whole, root / "inner" / "fine")
    found = adapter_in(root, "a", "inner/../inner/fine")
    assert found == Adapter("a", str(root / "inner" / "fine"), open_adapter("b", whole).fingerprint)


def test_a_pattern_is_met_as_peft_meets_it() -> None:
    text = json.dumps(
        {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "rank_pattern": {"q_proj": 2, "0.mlp.up": 3}}
    )
    config = AdapterConfig.read(text.encode(), Path())
    assert config.rank_of("model.layers.1.self_attn.q_proj") == 2
    assert config.rank_of("model.layers.0.mlp.up_proj") == 4
    assert config.scale_of("model.layers.1.self_attn.q_proj") == 4.0
