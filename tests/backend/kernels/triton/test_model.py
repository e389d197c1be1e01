"""Whole models on Triton's kernels, interpreted, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.kernels.triton import available
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import greedy, load
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family

PROMPTS = [[(7 * i * i + 3 * i + s) % 190 + 5 for i in range(length)] for s, length in enumerate((1, 20, 37))]


@pytest.mark.parametrize(("family", "fields"), [("mistral", {"sliding_window": 12}), ("qwen3", {})])
def test_the_ids_of_torch(family: str, fields: dict[str, object], tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family, **fields)
    expected = greedy(load(folder, kernels="reference"), PROMPTS, 5)
    backend = load(folder, kernels="triton")
    assert isinstance(backend.decoder.operations, TritonOperations)  # type: ignore[union-attr]
    assert isinstance(backend.attention, TritonAttention)
    said = backend.describe()
    assert said["kernels"] == "triton" and said["attention"] == "paged, triton"
    assert greedy(backend, PROMPTS, 5) == expected


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_attention_alone(kernels: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "llama")
    expected = greedy(load(folder, kernels="reference"), PROMPTS, 3)
    backend = load(folder, kernels=kernels, attn_impl="triton")
    assert isinstance(backend.attention, TritonAttention) and backend.program is None
    assert greedy(backend, PROMPTS, 3) == expected


def test_beside_the_code_of_transformers(tmp_path: Path) -> None:
    """Gemma 2 has a soft cap, a scale of its own and windows in every other layer."""
    family = next(family for family in PAGED if family.model_type == "gemma2")
    folder = save_family(tiny_family(family), tmp_path)
    expected = greedy(load(folder, kernels="reference"), PROMPTS, 3)
    backend = load(folder, kernels="reference", attn_impl="triton")
    assert backend.describe()["attention"] == "paged, triton"
    assert greedy(backend, PROMPTS, 3) == expected


@pytest.mark.parametrize("setting", ["kernels", "attn_impl"])
def test_a_cpu_without_the_interpreter_is_refused(
    setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(InvalidValueError, match="run on CUDA, and the device is cpu") as caught:
        load(folder, **{setting: "triton"})
    assert caught.value.field == setting.upper()


def test_without_triton_cuda_does_without(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    assert available.triton_wanted("auto", cuda) and not available.triton_wanted("reference", cuda)
    monkeypatch.setattr(available.importlib.util, "find_spec", lambda name: None)
    assert not available.triton_wanted("auto", cuda)
    with pytest.raises(InvalidValueError, match="triton is not installed"):
        available.triton_wanted("triton", cuda)


def test_a_cpu_takes_its_own_kernels_by_default() -> None:
    assert not available.triton_wanted("auto", torch.device("cpu"))


def test_compiling_is_refused_beside_them(tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match="KERNELS=triton"):
        load(save_tiny_model(tmp_path), kernels="triton", compile_model="1")
