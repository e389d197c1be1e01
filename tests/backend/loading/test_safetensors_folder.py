"""Folders of safetensors: whole, in shards, and such that lie."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from mini_sglang.backend.loading.checkpoint import open_checkpoint
from mini_sglang.errors import ModelLoadError
from tests.backend.loading.model_files import dense, load_everything, tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama in one safetensors file."""
    path = tmp_path_factory.mktemp("llama")
    tiny_model("llama").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in shards of 40 kB."""
    path = tmp_path_factory.mktemp("sharded")
    tiny_model("llama").save_pretrained(path, max_shard_size="40KB")
    assert len(list(path.glob("model-*.safetensors"))) > 2
    return path


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def test_shards_equal_the_single_file(folder: Path, sharded: Path) -> None:
    single, parts = (open_checkpoint(path, dequantize=False) for path in (folder, sharded))
    assert set(single.names()) == set(parts.names()) and single.nbytes == parts.nbytes
    for name in single.names():
        assert torch.equal(dense(single, name), dense(parts, name))


def test_generation_config_is_read_or_empty(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    assert open_checkpoint(copy, dequantize=False).generation_config["eos_token_id"] == 2
    (copy / "generation_config.json").unlink()
    assert open_checkpoint(copy, dequantize=False).generation_config == {}


def test_data_off_the_grid_is_read(tmp_path: Path) -> None:
    values = torch.arange(6, dtype=torch.float32)
    header = b'{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    assert (8 + len(header)) % 4
    (tmp_path / "model.safetensors").write_bytes(
        struct.pack("<Q", len(header)) + header + values.numpy().tobytes()
    )
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, dequantize=False)
    assert torch.equal(checkpoint.tensor("w", torch.float32), values.view(2, 3))


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float8_e4m3fn, torch.float64])
def test_other_number_types_are_refused_by_name(tmp_path: Path, dtype: torch.dtype) -> None:
    save_file({"w": torch.zeros(2, 2).to(dtype)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text("{}")
    checkpoint = open_checkpoint(tmp_path, dequantize=False)
    assert checkpoint.shape("w") == (2, 2)
    with pytest.raises(ModelLoadError, match=r"tensor w .* type (I8|I64|F8_E4M3|F64); supported are F32"):
        checkpoint.weight("w", torch.float32)


def header_file(*entries: tuple[str, str, list[Any], list[Any]], data: int = 8) -> bytes:
    fields = ",".join(
        json.dumps(name) + ":" + json.dumps({"dtype": dtype, "shape": shape, "data_offsets": offsets})
        for name, dtype, shape, offsets in entries
    )
    header = ("{" + fields + "}").encode()
    return struct.pack("<Q", len(header)) + header + bytes(data)


BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is empty"),
    "five bytes": (b"12345", "cut short"),
    "header beyond the end": (struct.pack("<Q", 1 << 62) + b"{}", "cut short"),
    "not JSON": (struct.pack("<Q", 4) + b"{{{{", "not valid JSON"),
    "not UTF-8": (struct.pack("<Q", 4) + b'{"\xff"', "not valid JSON"),
    "too deep": (struct.pack("<Q", 200_000) + b"[" * 200_000, "not valid JSON"),
    "a number of 9000 digits": (struct.pack("<Q", 9006) + b'{"a":' + b"9" * 9000 + b"}", "not valid JSON"),
    "not an object": (struct.pack("<Q", 2) + b"[]", "not a JSON object"),
    "entry that is text": (struct.pack("<Q", 9) + b'{"w":"x"}', "entry of the tensor 'w'"),
    "negative shape": (header_file(("w", "F32", [-2], [0, 8])), "entry of the tensor 'w'"),
    "fraction in the shape": (header_file(("w", "F32", [2.0], [0, 8])), "entry of the tensor 'w'"),
    "bool in the shape": (header_file(("w", "F32", [True, 2], [0, 8])), "entry of the tensor 'w'"),
    "three offsets": (header_file(("w", "F32", [2], [0, 8, 8])), "entry of the tensor 'w'"),
    "shape too big for its bytes": (header_file(("w", "F32", [1 << 40], [0, 8])), "has 8 bytes"),
    "end before start": (header_file(("w", "F32", [2], [8, 0])), "has -8 bytes"),
    "unknown type": (header_file(("w", "F4_E2M1", [2], [0, 8])), "'F4_E2M1'"),
    "type that is no text": (header_file(("w", 32, [2], [0, 8])), "type 32"),  # type: ignore[arg-type]
    "beyond the end": (header_file(("w", "F32", [2], [8, 16])), "is incomplete"),
    "overlap": (header_file(("v", "F32", [2], [0, 8]), ("w", "F32", [1], [4, 8])), "'v' and 'w' overlap"),
    "tensor twice": (header_file(("w", "F32", [1], [0, 4]), ("w", "F32", [1], [4, 8])), "'w' occurs twice"),
}


@pytest.mark.parametrize("case", BAD_SAFETENSORS)
def test_a_bad_safetensors_file_is_one_sentence(case: str, tmp_path: Path) -> None:
    data, expected = BAD_SAFETENSORS[case]
    (tmp_path / "model.safetensors").write_bytes(data)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ModelLoadError) as caught:
        open_checkpoint(tmp_path, dequantize=False)
    assert expected in str(caught.value)
    assert str(caught.value).endswith(".") and len(str(caught.value)) < 800


def test_a_safetensors_file_cut_short(folder: Path, tmp_path: Path) -> None:
    copy = copy_of(folder, tmp_path)
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelLoadError, match="is incomplete"):
        open_checkpoint(copy, dequantize=False)


def change_index(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        change(index)
        path.write_text(json.dumps(index))

    return act


def rewrite(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).write_text(text)

    return act


def place(shard: object) -> Callable[[Path], None]:
    return change_index(lambda index: index["weight_map"].update({"model.norm.weight": shard}))


def first_shard(folder: Path) -> Path:
    return sorted(folder.glob("model-*.safetensors"))[0]


def duplicate_shard(folder: Path) -> None:
    shutil.copy(first_shard(folder), folder / "z.safetensors")
    change_index(lambda index: index["weight_map"].update({"more": "z.safetensors"}))(folder)


def remove_weights(folder: Path) -> None:
    for path in [*folder.glob("*.safetensors"), folder / "model.safetensors.index.json"]:
        path.unlink()


def leave_pickle(folder: Path) -> None:
    remove_weights(folder)
    (folder / "pytest_model.bin").write_bytes(b"cos\nsystem\n(S'touch pwned'\ntR.")


def quantise(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )


BAD_FOLDERS: dict[str, tuple[Callable[[Path], None], str]] = {
    "missing shard": (lambda folder: first_shard(folder).unlink(), r"shard 'model-00001.* is missing"),
    "entry not in its shard": (
        change_index(lambda index: index["weight_map"].update({"ghost": min(index["weight_map"].values())})),
        "'ghost' is not in the shard",
    ),
    "shard above the folder": (place("../other.safetensors"), "plain name"),
    "absolute shard": (place("/etc/x.safetensors"), "plain name"),
    "shard with a backslash": (place("..\\x.safetensors"), "plain name"),
    "shard that is a pickle": (place("pytorch_model.bin"), "plain name"),
    "shard that is a number": (place(3), "plain name"),
    "no weight map": (change_index(lambda index: index.pop("weight_map")), "no weight_map"),
    "tensor in two shards": (duplicate_shard, "is in both"),
    "index that is not JSON": (
        rewrite("model.safetensors.index.json", "{"),
        "not valid JSON",
    ),
    "no weights": (remove_weights, "has no model.safetensors and no model.safetensors.index.json"),
    "only pickled weights": (leave_pickle, "pytest_model.bin are never loaded"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
    "config that is a list": (
        rewrite("config.json", "[]"),
        "not a JSON object",
    ),
    "quantised weights": (quantise, "'gptq'"),
}


@pytest.mark.parametrize("case", BAD_FOLDERS)
def test_a_bad_folder_is_one_sentence(case: str, sharded: Path, tmp_path: Path) -> None:
    spoil, expected = BAD_FOLDERS[case]
    copy = copy_of(sharded, tmp_path)
    spoil(copy)
    with pytest.raises(ModelLoadError, match=expected) as caught:
        open_checkpoint(copy, dequantize=False)
    assert str(caught.value).endswith(".")


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_flipped_or_cut_safetensors_headers_load_or_are_refused(
    folder: Path, tmp_path: Path, data: st.DataObject
) -> None:
    content = bytearray((folder / "model.safetensors").read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, header - 1))] = data.draw(st.integers(0, 255))
    if data.draw(st.booleans()):
        del content[data.draw(st.integers(0, len(content))) :]
    (tmp_path / "model.safetensors").write_bytes(content)
    shutil.copy(folder / "config.json", tmp_path)
    try:
        load_everything(tmp_path)
    except ModelLoadError as error:
        assert 0 < len(str(error)) < 1000
