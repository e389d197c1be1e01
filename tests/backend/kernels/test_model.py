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
from tests.backend.tiny_models import tiny_model as hf_model

FAST = VARIANTS[-1] != "generic"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return write_gguf(path, tiny_model("llama-tied"), "llama", Q8_0)


def logits(backend: ModelBackend, ids: list[int]) -> torch.Tensor:
    (pages,) = page_ranges(backend, [len(ids)])
    return step_logits(backend, [step(ids, 0, pages)])[0]


NATIVE = f"native ({VARIANTS[-1]})"
REFERENCE = "torch: KERNELS=reference"


@pytest.mark.parametrize(
    ("settings", "kind", "format", "used"),
    [
        ({}, PackedWeight if FAST else DenseWeight, "Q8_0", NATIVE),
        ({"gguf_dequantize": 0}, PackedWeight, "Q8_0", NATIVE),
        ({"gguf_dequantize": 1}, PackedWeight if FAST else DenseWeight, "F32", NATIVE),
        ({"gguf_dequantize": 1, "dtype": "fp16"}, PackedWeight if FAST else DenseWeight, "F16", NATIVE),
        ({"gguf_dequantize": 1, "dtype": "bf16"}, PackedWeight if FAST else DenseWeight, "BF16", NATIVE),
        ({"kernels": "reference"}, DenseWeight, "", REFERENCE),
        ({"kernels": "reference", "gguf_dequantize": 0}, QuantizedWeight, "Q8_0", REFERENCE),
    ],
)
def test_settings_choose_the_weights(
    path: Path, settings: dict[str, object], kind: type, format: str, used: str
) -> None:
    backend = load(path, **settings)
    layer = backend.decoder.layers[0]
    weights = [layer.qkv, layer.o, layer.gate_up, layer.down, backend.decoder.embedding]
    assert {type(weight) for weight in weights} == {kind}
    assert kind is DenseWeight or {weight.type.name for weight in weights} == {format}
    assert backend.decoder.lm_head is backend.decoder.embedding
    assert backend.describe()["kernels"] == used
    native = FAST and settings.get("kernels") != "reference"
    assert isinstance(backend.decoder.operations, NativeOperations if native else TorchOperations)
    # Whatever the weights, the kernels compute in float32 between them.
    if native:
        assert {weight.dtype for weight in weights} == {backend.decoder.final_norm.dtype} == {torch.float32}


def test_dense_logits_are_near_the_reference(path: Path) -> None:
    ids = list(range(4, 40))
    reference = logits(load(path, kernels="reference", gguf_dequantize=1), ids)
    dense = logits(load(path, gguf_dequantize=1), ids)
    # The tiny random model makes a thousandfold of a rounding.
    assert (dense - reference).abs().max() < 1e-3 * reference.std()


def test_logits_on_blocks_are_those_of_the_exact_twin(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def twin(weight: PackedWeight, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        assert bias is None
        product, _ = exact_product(x.contiguous().numpy(), weight._blocks(), weight.type, None, VARIANTS[-1])
        return torch.from_numpy(product).float()

    backend = load(path, gguf_dequantize=0, kv_dtype="auto")
    ids = list(range(4, 40))
    native = logits(backend, ids)
    monkeypatch.setattr(PackedWeight, "linear", twin)
    errors = (logits(backend, ids) - native).abs().amax(-1) / native.std()
    # At some position a number may lie on the border of two of 8 bits, and fall to the other side: then the
    # error is what rounding makes, thousands of times as much, there and where it is attended to.
    assert errors.quantile(0.75) < 1e-5
    assert errors.max() < 0.1


@pytest.mark.parametrize("kv_dtype", ["fp32", "fp16", "bf16", "int8"] if FAST else ["auto"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_logits_are_those_of_transformers_with_the_same_numbers(
    tmp_path: Path, dtype: str, kv_dtype: str
) -> None:
    """In float32 from rounded matrices; what is left is the rounding of KV, and of x to bfloat16."""
    oracle = hf_model("qwen3")
    oracle.save_pretrained(tmp_path)
    rounded = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[dtype]
    with torch.no_grad():
        for parameter in oracle.parameters():
            if parameter.ndim == 2:
                parameter.copy_(parameter.to(rounded))
        ids = list(range(4, 60))
        expected = oracle(torch.tensor([ids])).logits[0]
    backend = load(tmp_path, dtype=dtype, kv_dtype=kv_dtype)
    error = (logits(backend, ids) - expected).abs().mean() / expected.std()
    units = {"fp32": 2.0**-24, "fp16": 2.0**-11, "bf16": 2.0**-8, "int8": 1 / 254, "auto": 0.0}
    unit = 2.0**-24 + units[kv_dtype]
    if not FAST:
        unit += units[dtype]
    elif VARIANTS[-1] == "avx512bf16" and dtype == "bf16":
        unit += units["bf16"]
    assert error < 8 * unit
    # Nor is it better than its storage: the setting is honoured.
    assert error > unit / 64 or unit < 2.0**-22


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
    weight = load(path).decoder.layers[0].o
    assert weight.type.name == "F32" if isinstance(weight, PackedWeight) else isinstance(weight, DenseWeight)
