"""A whole model on the kernels: which weights it gets, and that its answers are as they should be."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.operations import TorchOperations
from mini_sglang.backend.weights import DenseWeight, PackedWeight, QuantizedWeight
from tests.backend.harness import load, page_ranges, step, step_logits
from tests.backend.kernels.twins import VARIANTS, exact_product
from tests.backend.loading.model_files import Q8_0, tiny_model, write_gguf

FAST = VARIANTS[-1] != "generic"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", Q8_0)


def logits(backend: ModelBackend, ids: list[int]) -> torch.Tensor:
    (pages,) = page_ranges(backend, [len(ids)])
    return step_logits(backend, [step(ids, 0, pages)])[0]


@pytest.mark.parametrize(
    ("settings", "kind", "used"),
    [
        ({}, PackedWeight if FAST else DenseWeight, f"native ({VARIANTS[-1]})"),
        ({"gguf_dequantize": 0}, PackedWeight, f"native ({VARIANTS[-1]})"),
        ({"gguf_dequantize": 1}, DenseWeight, f"native ({VARIANTS[-1]})"),
        ({"kernels": "reference"}, DenseWeight, "torch: KERNELS=reference"),
        ({"kernels": "reference", "gguf_dequantize": 0}, QuantizedWeight, "torch: KERNELS=reference"),
    ],
)
def test_settings_choose_the_weights(path: Path, settings: dict[str, object], kind: type, used: str) -> None:
    backend = load(path, **settings)
    layer = backend.decoder.layers[0]
    assert {type(weight) for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)} == {kind}
    assert type(backend.decoder.embedding) is kind and backend.decoder.lm_head is backend.decoder.embedding
    assert backend.describe()["kernels"] == used
    native = FAST and settings.get("kernels") != "reference"
    assert isinstance(backend.decoder.operations, NativeOperations if native else TorchOperations)


def test_dense_logits_are_near_the_reference(path: Path) -> None:
    ids = list(range(4, 40))
    reference = logits(load(path, kernels="reference", gguf_dequantize=1), ids)
    dense = logits(load(path, gguf_dequantize=1), ids)
    # The tiny random model makes a thousandfold of a rounding.
    assert (dense - reference).abs().max() < 1e-3 * reference.std()


def test_logits_on_blocks_are_those_of_the_exact_twin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert bias is None
        return torch.from_numpy(exact_product(x.contiguous().numpy(), weight._blocks(), weight.type, None))

    backend = load(path, gguf_dequantize=0)
    ids = list(range(4, 40))
    expected = logits(backend, ids)
    monkeypatch.setattr(PackedWeight, "linear", twin)
    assert torch.equal(logits(backend, ids), expected)


@pytest.mark.parametrize("dequantize", [0, 1])
def test_a_sequence_has_the_same_logits_alone_and_among_others(path: Path, dequantize: int) -> None:
    backend = load(path, gguf_dequantize=dequantize)
    prompts = [list(range(4, 4 + length)) for length in (1, 9, 30)]
    tables = page_ranges(backend, [len(ids) for ids in prompts])
    together = step_logits(backend, [step(ids, 0, t) for ids, t in zip(prompts, tables, strict=True)])
    for ids, expected in zip(prompts, together, strict=True):
        torch.testing.assert_close(logits(backend, ids), expected, rtol=1e-5, atol=1e-5)


def test_a_format_without_a_kernel_makes_the_whole_model_dense(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama-tied"), "llama", gguf.GGMLQuantizationType.Q5_0)
    assert isinstance(load(path).decoder.layers[0].o, DenseWeight)
