"""QUANTIZATION=fp8: matrices and activations in e4m3 against the numbers they stand for."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from mini_sglang.backend import fp8, loader
from mini_sglang.backend.fp8 import Fp8Weight, refuse_fp8, round_rows
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.models.quantization import FP8, quantized
from mini_sglang.backend.weights import DenseWeight, StackedWeight, Weight, accelerate, stack_rows
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError
from tests.backend.harness import greedy, load, page_ranges, step, step_logits
from tests.backend.kernels import capture
from tests.backend.loading import model_files
from tests.backend.tiny_models import VOCAB_SIZE, save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family

CPU = torch.device("cpu")
IDS = torch.randint(3, VOCAB_SIZE, (40,), generator=torch.Generator().manual_seed(1)).tolist()
# Every number of e4m3 that is not negative, by its bits.
GRID = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).double()


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale


def nearest(values: Tensor) -> Tensor:
    """By brute force: each number of a row, over the row's scale, to the nearest of the grid; float64."""
    wide = values.double()
    scale = wide.abs().amax(1, keepdim=True).float().div(448).double().clamp_min(1e-30)
    # Quotients are float32's; of two numbers equally near, the one whose last bit is 0.
    units = (wide / scale).abs().float().double()
    distance = (units[..., None] - GRID).abs() + 1e-12 * (torch.arange(127) % 2)
    return GRID[distance.argmin(-1)] * wide.sign() * scale


class Twin(DenseWeight):
    """What ``Fp8Weight`` does, by brute force."""

    def __init__(self, exact: Weight) -> None:
        super().__init__(nearest(exact.dequantize(torch.float32)))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        wide = F.linear(nearest(x), self.tensor, None if bias is None else bias.double())
        return wide.to(x.dtype)


@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e4, 1e-20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_number_is_the_nearest_that_its_row_has(scale: float, dtype: torch.dtype) -> None:
    values = normal(24, 64, scale=scale).to(dtype)
    values[3, 7] = 60 * scale
    codes, scales = round_rows(values)
    assert codes.dtype == torch.float8_e4m3fn and scales.shape == (24, 1) and scales.dtype == torch.float32
    found = codes.double() * scales.double()
    # Of two that are equally near either will do.
    error, best = (found - values.double()).abs(), (nearest(values) - values.double()).abs()
    assert (error <= best + 1e-6 * values.double().abs().amax(1, keepdim=True)).all()
    assert (codes.double().abs().amax(1) == 448).all()


@pytest.mark.parametrize("number", [0.0, 1e-45, 1e-38, 3e38])
def test_rows_of_the_smallest_and_largest_numbers(number: float) -> None:
    codes, scales = round_rows(torch.full((2, 16), number))
    assert codes.float().isfinite().all() and scales.isfinite().all() and (scales > 0).all()
    if number > 1e-30:
        torch.testing.assert_close(codes.double() * scales, torch.full((2, 16), number).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(), (0,), (1,), (5,), (2, 3)])
@pytest.mark.parametrize("biased", [False, True])
def test_the_product_of_rounded_rows(dtype: torch.dtype, lead: tuple[int, ...], biased: bool) -> None:
    weight = Fp8Weight.of(normal(48, 64, seed=1), dtype)
    x = normal(*lead, 64).to(dtype)
    bias = torch.linspace(-2, 2, 48).to(dtype) if biased else None
    rounded = nearest(x.reshape(-1, 64)).view(*lead, 64)
    expected = F.linear(rounded, weight.dequantize(torch.float64), None if bias is None else bias.double())
    out = weight.linear(x, bias)
    assert out.shape == (*lead, 48) and out.dtype == dtype
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}[dtype]
    torch.testing.assert_close(out.double(), expected, rtol=tolerance, atol=10 * tolerance)


def test_what_is_not_a_number_stays_in_its_row() -> None:
    weight = Fp8Weight.of(normal(32, 64, seed=1), torch.float32)
    x = normal(4, 64)
    expected = weight.linear(x)
    x[1], x[2, 5] = torch.nan, torch.inf
    found = weight.linear(x)
    assert torch.equal(found[::3], expected[::3]) and not found[1:3].isfinite().any()


def test_a_graph_could_record_it() -> None:
    weight = Fp8Weight.of(normal(32, 64, seed=1), torch.bfloat16)
    x, bias = normal(4, 64).bfloat16(), normal(32).bfloat16()
    assert "_scaled_mm" in capture.operators(lambda: weight.linear(x, bias))


def test_torch_compile_takes_it_whole() -> None:
    weight = accelerate(Fp8Weight.of(normal(32, 64, seed=1), torch.float32), None, triton=True)
    compiled = torch.compile(weight.linear, backend="aot_eager", fullgraph=True, dynamic=True)
    plain = Fp8Weight.of(normal(32, 64, seed=1), torch.float32)
    for rows in (1, 5):
        x = normal(rows, 64, seed=rows)
        torch.testing.assert_close(compiled(x), plain.linear(x))


def test_rows_stacking_and_moving_keep_the_numbers() -> None:
    dense = normal(48, 64, seed=2)
    parts = [Fp8Weight.of(part, torch.float32) for part in dense.split((32, 16))]
    whole = stack_rows(parts)
    assert isinstance(whole, Fp8Weight) and whole.shape == (48, 64)
    assert whole.nbytes == 48 * 64 + 48 * 4
    assert torch.equal(
        whole.dequantize(torch.float32), Fp8Weight.of(dense, torch.float32).dequantize(torch.float32)
    )
    ids = torch.tensor([[3, 47], [0, 3]])
    assert torch.equal(whole.rows(ids), whole.dequantize(torch.float32)[ids])
    moved = accelerate(whole.to(CPU), None, torch.float32)
    assert isinstance(moved, Fp8Weight) and torch.equal(moved.linear(dense), whole.linear(dense))
    kernel = accelerate(whole, None, torch.bfloat16, triton=True)
    assert isinstance(kernel, Fp8Weight) and kernel.to(CPU).triton and kernel.dtype == torch.bfloat16
    mixed = stack_rows([parts[0], DenseWeight(dense[:5])])
    assert isinstance(mixed, StackedWeight)


def test_a_part_that_does_not_fit_stays_dense() -> None:
    assert isinstance(quantized(normal(32, 24), FP8, torch.float32, CPU), DenseWeight)
    assert isinstance(quantized(normal(32, 48), FP8, torch.float32, CPU), Fp8Weight)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU, and float32, pass for a GPU that multiplies e4m3: torch multiplies it there too."""
    monkeypatch.setattr(loader, "refuse_fp8", lambda settings, device: None)


def decoder_of(backend: ModelBackend) -> Decoder:
    assert isinstance(backend.decoder, Decoder)
    return backend.decoder


def logits(backend: ModelBackend) -> Tensor:
    (pages,) = page_ranges(backend, [len(IDS)])
    return step_logits(backend, [step(IDS, 0, pages)])[0]


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.usefixtures("allowed")
def test_a_model(family: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, family, num_attention_heads=4)
    backend = load(folder, quantization="fp8", kernels="reference")
    decoder, plain = decoder_of(backend), load(folder, kernels="reference")
    exact = logits(plain)
    for layer, other in zip(decoder.layers, decoder_of(plain).layers, strict=True):
        for name in ("qkv", "o", "gate_up", "down"):
            found, twin = getattr(layer, name), Twin(getattr(other, name))
            assert isinstance(found, Fp8Weight)
            torch.testing.assert_close(found.dequantize(torch.float64), twin.tensor, rtol=1e-6, atol=1e-6)
            setattr(other, name, twin)
    assert type(decoder.embedding) is type(decoder.lm_head) is DenseWeight
    assert backend.describe()["quantization"] == "fp8"
    found, expected = logits(backend), logits(plain)
    # A sum in another order can move a rounding by one.
    assert (found - expected).std() < 0.02 * expected.std()
    assert 0.01 * exact.std() < (found - exact).std() < 0.3 * exact.std()


@pytest.mark.usefixtures("allowed")
def test_the_numbers_come_from_the_file_whatever_the_dtype(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    codes = [
        decoder_of(load(folder, quantization="fp8", kernels="reference", dtype=dtype)).layers[1].down
        for dtype in ("fp32", "bf16")
    ]
    assert all(isinstance(weight, Fp8Weight) for weight in codes)
    assert torch.equal(*(weight.dequantize(torch.float32) for weight in codes))


@pytest.mark.usefixtures("allowed")
def test_matrices_that_do_not_fit_stay_dense(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path / "some", intermediate_size=88)
    layer = decoder_of(load(folder, quantization="fp8", kernels="reference")).layers[0]
    assert isinstance(layer.down, DenseWeight) and isinstance(layer.qkv, Fp8Weight)
    sizes = {"hidden_size": 40, "intermediate_size": 88, "head_dim": 10}
    with pytest.raises(InvalidValueError, match=r"none: no matrix .* rows and columns .* multiple of 16"):
        load(save_tiny_model(tmp_path / "none", **sizes), quantization="fp8")


@pytest.mark.usefixtures("allowed")
def test_blocks_of_a_gguf_stay_what_they_are(tmp_path: Path) -> None:
    model = model_files.tiny_model("llama-tied")
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", gguf.GGMLQuantizationType.Q8_0)
    with pytest.raises(InvalidValueError, match="in quantised blocks already"):
        load(path, quantization="fp8", gguf_dequantize=0)


@pytest.mark.usefixtures("allowed")
def test_a_weight_that_is_not_finite_names_the_tensor(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 7] = torch.inf
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(
        ModelLoadError, match=f"The tensor {name} cannot be quantised: a number is not finite"
    ):
        load(folder, quantization="fp8")


@pytest.mark.usefixtures("allowed")
def test_beside_the_code_of_transformers(tmp_path: Path) -> None:
    family = next(family for family in PAGED if family.model_type == "gemma2")
    folder = save_family(tiny_family(family), tmp_path)
    prompts = [[5, 6, 7], list(range(5, 30))]
    backend = load(folder, kernels="reference", quantization="fp8")
    kinds = {type(m.matrix) for m in backend.decoder.model.modules() if hasattr(m, "matrix")}  # type: ignore[union-attr]
    assert kinds == {Fp8Weight}
    assert len(greedy(backend, prompts, 3)) == 2


def test_a_cpu_is_refused(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    sentence = (
        "QUANTIZATION is 'fp8'; it must be none, int8 or int4 here: .* 8.9 or above, and the device is cpu"
    )
    with pytest.raises(InvalidValueError, match=sentence):
        load(folder, quantization="fp8")


@pytest.mark.parametrize(
    ("capability", "dtype", "sentence"),
    [
        ((8, 9), "auto", None),
        ((9, 0), "bf16", None),
        ((12, 0), "auto", None),
        ((8, 6), "auto", "QUANTIZATION is 'fp8'.* and this GPU has 8.6"),
        ((9, 0), "fp16", "MODEL_DTYPE is 'fp16'; it must be auto or bf16 with QUANTIZATION=fp8"),
    ],
)
def test_which_gpus(
    capability: tuple[int, int], dtype: str, sentence: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fp8.torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(fp8.torch.cuda, "is_bf16_supported", lambda **given: True)
    settings = Settings.resolve({"quantization": "fp8", "dtype": dtype}, env={})
    if sentence is None:
        refuse_fp8(settings, torch.device("cuda"))
    else:
        with pytest.raises(InvalidValueError, match=sentence):
            refuse_fp8(settings, torch.device("cuda"))
