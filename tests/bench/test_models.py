"""One model in the forms that peers read."""

from __future__ import annotations

import sys
from pathlib import Path

import gguf
import pytest
import torch
import transformers

from mini_sglang.bench import models
from mini_sglang.bench.models import dequantized, find_bench_model
from mini_sglang.bench.process import PeerError
from mini_sglang.config import Settings
from tests.tiny_folders import tiny_folder


def quiet(line: str) -> None:
    """Nobody listens."""


TOKENS = 1000
"""What is kept of the vocabulary: gguf's reader takes seconds for the whole."""


@pytest.fixture(scope="module")
def two_layers(starter_gguf: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The starter model with few tokens and two layers, for each of which transformers takes seconds."""
    reader = gguf.GGUFReader(starter_gguf)
    path = tmp_path_factory.mktemp("gguf") / starter_gguf.name
    writer = gguf.GGUFWriter(path, "llama")
    tokens = set(reader.fields["tokenizer.ggml.tokens"].contents(slice(TOKENS)))
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            value = {"llama.block_count": 2, "llama.vocab_size": TOKENS}.get(name)
            if value is None:
                value = field.contents(slice(TOKENS)) if len(field.types) > 1 else field.contents()
            if name == "tokenizer.ggml.merges":
                value = [merge for merge in value if merge.replace(" ", "") in tokens]
            element = field.types[1] if len(field.types) > 1 else None
            writer.add_key_value(name, value, field.types[0], element)
    for tensor in reader.tensors:
        if not tensor.name.startswith("blk.") or tensor.name.startswith(("blk.0.", "blk.1.")):
            rows = TOKENS if tensor.name == "token_embd.weight" else len(tensor.data)
            writer.add_tensor(tensor.name, tensor.data[:rows], raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def theirs(two_layers: Path) -> dict[str, torch.Tensor]:
    """The weights as transformers reads them from the file, in float32."""
    load = transformers.AutoModelForCausalLM.from_pretrained
    return dict(load(two_layers.parent, gguf_file=two_layers.name, dtype=torch.float32).state_dict())


@pytest.mark.parametrize(("dtype", "torch_dtype"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_the_folder_has_the_weights_that_transformers_reads_from_the_file(
    dtype: str,
    torch_dtype: torch.dtype,
    two_layers: Path,
    theirs: dict[str, torch.Tensor],
    tmp_path: Path,
) -> None:
    said: list[str] = []
    folder = dequantized(two_layers, dtype, tmp_path, sys.executable, said.append)
    assert len(said) == 1 and dtype in folder.name
    ours = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype="auto").state_dict()
    assert set(ours) == set(theirs)
    for name, value in theirs.items():
        assert ours[name].dtype == torch_dtype
        assert torch.equal(ours[name], value.to(torch_dtype)), name
    # The second time it is there, and nothing is made.
    assert dequantized(two_layers, dtype, tmp_path, "/nowhere/python", said.append) == folder
    assert len(said) == 1
    assert not list((tmp_path / "bench").glob(f"{models._WORK_PREFIX}*"))
    found = find_bench_model(Settings.resolve({"model": str(folder)}), quiet)
    assert found.gguf is None and found.blocks is None and found.context == 8192


def test_a_folder_that_cannot_be_made_is_not_there(starter_gguf: Path, tmp_path: Path) -> None:
    with pytest.raises(PeerError, match="cannot be run as a Python interpreter"):
        dequantized(starter_gguf, "bf16", tmp_path, "/nowhere/python", quiet)
    broken = tmp_path / "broken.gguf"
    writer = gguf.GGUFWriter(broken, "nobody-knows-it")
    writer.add_context_length(77)
    writer.add_tensor("x", torch.ones(4, 4).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    # What a process that was killed left is swept away.
    (tmp_path / "bench" / f"{models._WORK_PREFIX}x" / "folder").mkdir(parents=True)
    with pytest.raises(PeerError, match="nobody-knows-it"):
        dequantized(broken, "bf16", tmp_path, sys.executable, quiet)
    assert [path.name for path in (tmp_path / "bench").iterdir()] == ["folders.lock"]


def test_facts_of_a_file_and_a_folder(starter_gguf: Path, tmp_path: Path) -> None:
    settings = Settings.resolve({"model": str(starter_gguf), "cache_dir": tmp_path / "cache"})
    found = find_bench_model(settings, quiet)
    assert (found.gguf, found.blocks, found.context) == (starter_gguf.resolve(), "Q4_1", 8192)
    folder = tiny_folder(tmp_path / "tiny")
    found = find_bench_model(Settings.resolve({"model": str(folder)}), quiet)
    assert (found.gguf, found.blocks, found.context) == (None, None, 512)
    assert found.folder("bf16", settings, "/nowhere/python", quiet) == folder.resolve()
