"""MODEL_DTYPE and KV_DTYPE: what a model gets, whatever the CPU, and what is refused."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from mini_sglang.backend import device
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.backend.kernels.twins import VARIANTS
from tests.backend.loading.model_files import tiny_model, write_gguf
from tests.backend.tiny_models import save_tiny_model

FAST = VARIANTS[-1] != "generic"
NAMES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16", "int8": "int8"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("model"), "qwen3")


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads of 24 numbers, which the kernels do not take."""
    return save_tiny_model(tmp_path_factory.mktemp("narrow"), "qwen3", head_dim=24)


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", gguf.GGMLQuantizationType.Q4_1)


def load(path: Path, **settings: object) -> ModelBackend:
    return load_backend(path, Settings.resolve({"device": "cpu", "kv_token_budget": 256, **settings}, env={}))


def kept(backend: ModelBackend) -> tuple[str, str]:
    about = backend.describe()
    assert about["kv_dtype"] == str(backend.kv.dtype).removeprefix("torch.")
    return str(about["dtype"]), str(about["kv_dtype"])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_kv_has_the_dtype_of_plain_weights(folder: Path, narrow: Path, dtype: str) -> None:
    for path in (folder, narrow):
        for settings in ({}, {"kernels": "reference"}, {"kv_dtype": dtype}):
            backend = load(path, dtype=dtype, **settings)
            assert kept(backend) == (NAMES[dtype], NAMES[dtype])
            native = FAST and path is folder and "kernels" not in settings
            computed = torch.float32 if native else backend.kv.dtype
            assert backend.decoder.dtype == computed
            assert (backend.program is not None) == native


@pytest.mark.parametrize("has_bf16", [False, True])
def test_auto_takes_bf16_where_the_cpu_multiplies_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: has_bf16)
    name = "bfloat16" if has_bf16 else "float32"
    assert kept(load(folder)) == (name, name)
    assert kept(load(folder, kernels="reference")) == (name, name)


@pytest.mark.parametrize("has_bf16", [False, True])
def test_blocks_are_computed_in_float32_with_kv_in_16_bits(
    blocks: Path, monkeypatch: pytest.MonkeyPatch, has_bf16: bool
) -> None:
    monkeypatch.setattr(device, "cpu_has_bf16", lambda: has_bf16)
    half = "bfloat16" if VARIANTS[-1] == "avx512bf16" else "float16"
    assert kept(load(blocks, gguf_dequantize=0)) == ("float32", half if FAST else "float32")
    assert kept(load(blocks, gguf_dequantize=0, kernels="reference")) == ("float32", "float32")
    plain = "bfloat16" if has_bf16 else "float32"
    assert kept(load(blocks, gguf_dequantize=1)) == (plain, plain)
    assert kept(load(blocks, gguf_dequantize=0, dtype="bf16", kernels="reference")) == ("bfloat16",) * 2


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_kv_of_another_dtype_needs_the_kernels(
    folder: Path, narrow: Path, blocks: Path, dtype: str, kv_dtype: str
) -> None:
    settings = {"dtype": dtype, "kv_dtype": kv_dtype}
    numbers, scales = 3 * 2 * 2 * 16, 3 * 2 * 2
    if FAST:
        backend = load(folder, **settings)
        assert kept(backend) == (NAMES[dtype], NAMES[kv_dtype])
        size = {"fp32": 4 * numbers, "int8": numbers + 4 * scales}.get(kv_dtype, 2 * numbers)
        assert backend.describe()["kv_bytes_per_token"] == size
        assert backend.kv.data.nbytes == 256 * size
        assert kept(load(blocks, gguf_dequantize=0, **settings))[1] == NAMES[kv_dtype]
    for path, other in ((narrow, {}), (folder, {"kernels": "reference"})):
        if dtype == kv_dtype:
            assert kept(load(path, **settings, **other))[1] == NAMES[kv_dtype]
            continue
        with pytest.raises(InvalidValueError) as caught:
            load(path, **settings, **other)
        assert str(caught.value) == (
            f"KV_DTYPE is '{kv_dtype}'; it must be auto: KV is kept as {NAMES[dtype]} "
            "where the compiled CPU kernels do not run the model."
        )


def test_an_unknown_kv_dtype_is_refused_and_spellings_are_understood() -> None:
    with pytest.raises(InvalidValueError, match="KV_DTYPE is 'int4'; it must be one of auto, fp16, bf16"):
        Settings.resolve({}, env={"KV_DTYPE": "int4"})
    assert Settings.resolve({}, env={"KV_DTYPE": "float16"}).kv_dtype == "fp16"
    assert Settings.resolve({}, env={"KV_DTYPE": "int8"}).kv_dtype == "int8"
    assert Settings.resolve({}, env={}).kv_dtype == "auto"
