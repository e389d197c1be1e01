"""Adapters from the hubs: the two files that make one, from the first hub that has them or its cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from mini_sglang.backend.lora.source import find_adapters
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError, ModelLoadError, ModelNotFoundError
from mini_sglang.types import Adapter

from .test_source import World, world

__all__ = ["world"]

FILES = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"weights" * 40}


def find(world: World, text: str) -> list[Adapter]:
    world.notices.clear()
    settings = Settings.resolve({"lora_adapters": text, "download_timeout": 20.0}, {})
    return find_adapters(settings, world.notices.append)


def test_an_adapter_is_its_two_files(world: World) -> None:
    world.hf.repositories["me/sql"] = FILES | {"README.md": b"# SQL", "optimizer.pt": b"pickle"}
    (found,) = find(world, "sql=me/sql")
    assert found.name == "sql" and {path.name for path in Path(found.path).iterdir()} == set(FILES)
    assert all((Path(found.path) / name).read_bytes() == data for name, data in FILES.items())
    assert world.ms.requests == []
    # The hub is away: the copy in its cache is the same adapter.
    world.point_hf("http://127.0.0.1:1")
    world.ms.repositories.clear()
    assert find(world, "other=me/sql") == [Adapter("other", found.path, found.fingerprint)]


def test_a_folder_asks_no_hub(world: World) -> None:
    folder = world.root / "mine"
    folder.mkdir()
    for name, data in FILES.items():
        (folder / name).write_bytes(data)
    assert [adapter.name for adapter in find(world, f"{folder},x={folder}")] == ["mine", "x"]
    assert world.hf.requests == world.ms.requests == []
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no adapter_model\.safetensors"):
        find(world, str(folder))


def test_the_other_hub_is_asked_where_the_first_has_none(world: World) -> None:
    world.hf.repositories["me/sql"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"pickle"}
    world.ms.repositories["me/sql"] = FILES
    (found,) = find(world, "sql=me/sql")
    assert (Path(found.path) / "adapter_model.safetensors").read_bytes() == FILES["adapter_model.safetensors"]
    world.ms.repositories.clear()
    with pytest.raises(ModelNotFoundError, match=r"has no file adapter_model\.safetensors in me/else"):
        world.hf.repositories["me/else"] = {"adapter_config.json": b"{}"}
        find(world, "sql=me/else")


@pytest.mark.parametrize("place", ["./nothing", "/no/x", "a b", "a/b/c", "me/nobody", "me/../x"])
def test_what_is_nowhere(world: World, place: str) -> None:
    with pytest.raises((InvalidValueError, ModelNotFoundError)) as caught:
        find(world, f"x={place}")
    assert isinstance(caught.value, MiniSglangError) and "\n" not in str(caught.value)
