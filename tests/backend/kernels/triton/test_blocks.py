"""Products with repacked blocks in Triton, interpreted, against their twin in torch."""

from __future__ import annotations

import random
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import interpreter

from mini_sglang.backend.kernels.triton import block_weight
from mini_sglang.backend.kernels.triton.block_layout import FORMATS
from mini_sglang.backend.kernels.triton.block_weight import TritonWeight, product_launch
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, StackedWeight, accelerate
from tests.backend.harness import greedy, load
from tests.backend.kernels import capture
from tests.backend.loading import model_files
from tests.backend.test_quant import IDS, random_blocks
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family

KINDS = {name: GGML_TYPES[IDS[name]] for name in FORMATS}
BY_KIND = pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
# One of every width of a code, with and without minima and second scales.
SOME = ("Q8_0", "Q4_1", "Q5_K", "Q6_K")
BY_SOME = pytest.mark.parametrize("kind", [KINDS[name] for name in SOME], ids=SOME)
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Of the size of what is added up; the interpreter cuts a bfloat16 off where a GPU rounds.
EXACT = {torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
ROUNDED = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 2e-2}


def pair(
    kind: GGMLType, rows: int, columns: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[QuantizedWeight, TritonWeight]:
    """A matrix in blocks of random bytes, and the same repacked."""
    blocks = torch.from_numpy(random_blocks(kind, rows, columns, seed))
    twin = QuantizedWeight(blocks, kind, dtype)
    return twin, TritonWeight.of(twin, dtype)


def width(kind: GGMLType, blocks: int) -> int:
    return blocks * kind.block_size


def near(actual: Tensor, x: Tensor, twin: QuantizedWeight, bias: Tensor | None, tolerance: float) -> None:
    """Against the exact weights in float64, within ``tolerance`` of the sum of the products' sizes."""
    dense = twin.dequantize(torch.float32).double()
    wide = None if bias is None else bias.double()
    expected = F.linear(x.double(), dense, wide)
    size = F.linear(x.double().abs(), dense.abs(), None if wide is None else wide.abs())
    assert actual.shape == expected.shape and actual.dtype == x.dtype
    assert ((actual.double() - expected).abs() <= tolerance * size).all()


@BY_KIND
def test_every_number_is_kept(kind: GGMLType) -> None:
    for rows, blocks in ((1, 1), (5, 2), (33, 1)):
        twin, weight = pair(kind, rows, width(kind, blocks))
        dense = twin.dequantize(torch.float32)
        assert torch.equal(weight.dequantize(torch.float32), dense)
        half = twin.dequantize(torch.float16)
        assert torch.equal(weight.dequantize(torch.float16), half)
        assert weight.shape == twin.shape and weight.type is kind
        ids = torch.tensor([[0, rows - 1], [rows // 2, 0]])
        assert torch.equal(weight.rows(ids), dense[ids])
        many = torch.arange(4 * rows) % rows
        assert torch.equal(weight.rows(many), dense[many])
        assert torch.equal(weight.rows(many[::2]), dense[many[::2]])
        assert weight.rows(ids[:0]).shape == (0, 2, twin.shape[1])


@BY_KIND
def test_any_bytes_are_kept(kind: GGMLType) -> None:
    """Scales and minima of every size and sign too; what is no number in one is none in the other."""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (30, 2 * kind.block_bytes), dtype=torch.uint8, generator=generator)
    twin = QuantizedWeight(blocks, kind, torch.float32)
    with np.errstate(invalid="ignore"):
        found = TritonWeight.of(twin, torch.float32).dequantize(torch.float32)
    torch.testing.assert_close(found, twin.dequantize(torch.float32), rtol=0, atol=0, equal_nan=True)


def test_repacking_in_pieces_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in KINDS.values():
        whole = pair(kind, 37, width(kind, 3))[1]
        monkeypatch.setattr("mini_sglang.backend.kernels.triton.block_layout._CHUNK_WEIGHTS", 5 * 768)
        pieces = pair(kind, 37, width(kind, 3))[1]
        monkeypatch.undo()
        assert all(torch.equal(*both) for both in zip(whole.planes, pieces.planes, strict=True))


@pytest.mark.parametrize("name", FORMATS)
def test_memory_is_that_of_the_blocks(name: str) -> None:
    twin, weight = pair(KINDS[name], 64, 2048)
    # A Q4_K scale takes 8 bits here and 6 there, a code of 5 bits 6.
    assert weight.nbytes <= (1.21 if name.startswith("Q5") else 1.03) * twin.nbytes


@pytest.mark.parametrize("dtype", DTYPES)
@BY_KIND
def test_a_few_rows_meet_the_exact_weights(kind: GGMLType, dtype: torch.dtype) -> None:
    rng = random.Random(f"{kind.name} {dtype}")
    for rows in (1, rng.randrange(2, 17)):
        features, columns = rng.choice((1, 31, 64, 75)), width(kind, rng.choice((1, 2, 3)))
        twin, weight = pair(kind, features, columns, dtype, rng.randrange(1000))
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bias = rng.choice((None, torch.linspace(-3, 3, features).to(dtype)))
        near(weight.linear(x, bias), x, twin, bias, EXACT[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@BY_KIND
def test_more_rows(kind: GGMLType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """In tiles, and as a dense matrix; in the type of x, whose rounding of the weights is the twin's."""
    monkeypatch.setattr(block_weight, "_DENSE_ROWS", 140)
    rng = random.Random(f"{kind.name} {dtype}")
    for rows in (17, 70, 141):
        features, columns = rng.choice((1, 40, 75)), width(kind, rng.choice((1, 2)))
        twin, weight = pair(kind, features, columns, dtype, rng.randrange(1000))
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(dtype)
        bias = rng.choice((None, torch.linspace(-3, 3, features).to(dtype)))
        near(weight.linear(x, bias), x, twin, bias, ROUNDED[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@BY_SOME
def test_columns_in_parts(kind: GGMLType, dtype: torch.dtype) -> None:
    """Parts that end within what a program walks at a time, and a last part that is shorter."""
    columns = 1280 + kind.block_size
    twin, weight = pair(kind, 40, columns, dtype)
    assert product_launch(3, 40, -(-columns // 64)).parts > 3
    bias = torch.linspace(-2, 2, 40).to(dtype)
    for rows in (3, 20):
        x = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
        near(weight.linear(x, bias), x, twin, bias, ROUNDED[dtype])


@BY_SOME
def test_the_dense_matrix_in_pieces(kind: GGMLType, monkeypatch: pytest.MonkeyPatch) -> None:
    twin, weight = pair(kind, 45, width(kind, 2))
    x = torch.randn(20, twin.shape[1], generator=torch.Generator().manual_seed(0))
    bias = torch.linspace(-1, 1, 45)
    for rows in (7, 45):
        monkeypatch.setattr(block_weight, "_CHUNK_WEIGHTS", rows * twin.shape[1])
        near(weight.linear(x, bias), x, twin, bias, EXACT[torch.float32])


@pytest.mark.parametrize("dtype", DTYPES)
@BY_SOME
def test_a_row_is_the_same_bits_alone_and_beside_others(
    kind: GGMLType, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    # numpy's product adds up a row in an order that depends on its place in the tile, as no GPU does.
    monkeypatch.setattr(interpreter.np, "matmul", lambda a, b, dtype: (a[:, :, None] * b).sum(1, dtype))
    features, columns = 20, 512 + kind.block_size
    _, weight = pair(kind, features, columns, dtype)
    assert product_launch(1, features, -(-columns // 64)).parts > 1
    x = torch.randn(130, columns, generator=torch.Generator().manual_seed(0)).to(dtype)
    # The kinds of 1 to 16, 17 to 64, and more rows; float32 has one of its own, torch's, beyond 16.
    kinds = ((16, 1), (16, 7)) if dtype == torch.float32 else ((16, 5), (64, 17), (130, 65))
    for most, rows in kinds:
        together = weight.linear(x[:most])
        assert torch.equal(weight.linear(x[:rows]), together[:rows])
        assert torch.equal(weight.linear(x[most - rows : most]), together[most - rows :])


def test_what_is_not_a_number_stays_in_its_row() -> None:
    _, weight = pair(KINDS["Q4_1"], 40, 352)
    x = torch.randn(4, 352, generator=torch.Generator().manual_seed(0))
    expected = weight.linear(x)
    x[1] = torch.nan
    x[2, 5] = torch.inf
    found = weight.linear(x)
    assert torch.equal(found[::3], expected[::3]) and not found[1:3].isfinite().any()


@pytest.mark.parametrize("lead", [(), (0,), (3,), (2, 3)])
def test_any_shape_of_x(lead: tuple[int, ...]) -> None:
    twin, weight = pair(KINDS["Q8_0"], 40, 96)
    x = torch.randn(*lead, 96, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.linear(x), twin.linear(x))


def test_x_that_does_not_lie_in_rows() -> None:
    twin, weight = pair(KINDS["Q4_0"], 40, 96)
    x = torch.randn(96, 5, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.linear(x.t()), twin.linear(x.t()))
    wide = torch.randn(5, 128, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(weight.linear(wide[:, 16:112]), twin.linear(wide[:, 16:112]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_codes_under_an_exponent_are_whole_numbers(dtype: torch.dtype) -> None:
    """The trick of ``_whole``, which the interpreter does not use for bfloat16."""
    base, one = (0x4300, 128) if dtype == torch.bfloat16 else (0x6400, 1024)
    codes = torch.arange(64, dtype=torch.int16)
    for offset in (0, 8, 32):
        whole = (codes | base).view(dtype) - (one + offset)
        assert torch.equal(whole.to(torch.int16), codes - offset)


@pytest.mark.parametrize("features", [1, 64, 1024, 9000, 151936])
@pytest.mark.parametrize("columns", [32, 576, 1024, 5120, 17408])
def test_parts_cover_the_columns_and_depend_on_the_matrix_alone(features: int, columns: int) -> None:
    units = -(-columns // 64)
    for ranges in (range(1, 17), range(17, 65), range(65, 513, 50)):
        launches = {product_launch(rows, features, units) for rows in ranges}
        assert len(launches) == 1
        (launch,) = launches
        assert (launch.parts - 1) * launch.units < units <= launch.parts * launch.units
        assert launch.parts == 1 or launch.units >= 4


@pytest.mark.parametrize("name", ["Q4_1", "Q5_K"])
def test_accelerate_takes_the_formats_that_there_are(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(FORMATS) == {kind.name for kind in GGML_TYPES.values() if kind.quantized}
    monkeypatch.setattr(block_weight, "FORMATS", {"Q4_1": FORMATS["Q4_1"]})
    kind = GGML_TYPES[IDS[name]]
    plain = QuantizedWeight(torch.from_numpy(random_blocks(kind, 8, 256)), kind, torch.float16)
    found = accelerate(plain, None, torch.float32, triton=True)
    assert type(found) is (TritonWeight if name == "Q4_1" else QuantizedWeight)
    assert found.dtype == torch.float32 and type(accelerate(plain, None)) is QuantizedWeight
    stacked = accelerate(StackedWeight([plain, DenseWeight(torch.ones(2, 256))]), None, triton=True)
    assert isinstance(stacked, StackedWeight) and type(stacked.parts[0]) is type(found)
    x = torch.randn(3, 256, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(found.linear(x), plain.linear(x))
    moved = found.to(torch.device("cpu"))
    assert type(moved) is type(found)
    assert torch.equal(moved.dequantize(torch.float32), plain.dequantize(torch.float32))


@pytest.mark.parametrize("rows", [1, 17, 513])
def test_a_graph_could_record_it(rows: int) -> None:
    """And torch multiplies where it is its turn alone."""
    _, weight = pair(KINDS["Q4_1"], 3, 512, torch.float16)
    x, bias = torch.ones(rows, 512, dtype=torch.float16), torch.ones(3, dtype=torch.float16)
    assert ("addmm" in capture.operators(lambda: weight.linear(x, bias))) == (rows > 512)
    capture.operators(lambda: weight.rows(torch.zeros(rows, dtype=torch.int64)))


def test_torch_compile_takes_it_as_one_operator() -> None:
    twin, weight = pair(KINDS["Q4_1"], 40, 96)
    calls: list[int] = []

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        calls.append(sum("mini_sglang" in str(node.target) for node in module.graph.nodes))
        return module

    @torch.compile(backend=count, dynamic=True, fullgraph=True)
    def both(ids: Tensor, bias: Tensor) -> Tensor:
        return weight.linear(weight.rows(ids)[..., :96] * 2.0, bias)

    bias = torch.linspace(-1, 1, 40)
    for ids in (torch.tensor([3, 4, 5]), torch.arange(20)):
        dense = twin.dequantize(torch.float32)
        torch.testing.assert_close(both(ids, bias), F.linear(dense[ids] * 2.0, dense, bias))
    assert calls == [2]


PROMPTS = [[(7 * i * i + 3 * i + s) % 190 + 5 for i in range(length)] for s, length in enumerate((1, 20))]


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_a_model_whose_matrices_become_blocks(quantization: str, tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "qwen2", tie_word_embeddings=quantization == "int4")
    expected = greedy(load(folder, kernels="reference", quantization=quantization), PROMPTS, 2)
    backend = load(folder, kernels="triton", quantization=quantization)
    matrices = matrices_of(backend.decoder)  # type: ignore[arg-type]
    assert {type(matrix) for matrix in matrices} == {TritonWeight}
    assert greedy(backend, PROMPTS, 2) == expected


def test_a_gguf_of_blocks(tmp_path: Path) -> None:
    """Of several formats, beside each other in one product too."""
    kinds = gguf.GGMLQuantizationType
    others = {"v_proj": kinds.Q8_0, "mlp.down_proj": kinds.Q5_0, "embed_tokens": kinds.Q4_1}
    model = model_files.tiny_model("llama-tied")
    path = model_files.write_gguf(tmp_path / "m.gguf", model, "llama", kinds.Q4_0, others=others)
    prompts = [[4, 5, 6], list(range(4, 24))]
    expected = greedy(load(path, kernels="reference", gguf_dequantize=0), prompts, 2)
    backend = load(path, kernels="triton", gguf_dequantize=0)
    decoder: Decoder = backend.decoder  # type: ignore[assignment]
    layer = decoder.layers[0]
    assert isinstance(layer.qkv, StackedWeight)
    assert [part.type.name for part in layer.qkv.parts] == ["Q4_0", "Q4_0", "Q8_0"]  # type: ignore[attr-defined]
    assert {type(w) for w in (layer.o, layer.gate_up, layer.down, decoder.lm_head)} == {TritonWeight}
    assert greedy(backend, prompts, 2) == expected


def test_beside_the_code_of_transformers(tmp_path: Path) -> None:
    family = next(family for family in PAGED if family.model_type == "gemma2")
    model = tiny_family(family, num_hidden_layers=1, layer_types=["full_attention"])
    folder = save_family(model, tmp_path)
    prompts = [[5, 6, 7]]
    expected = greedy(load(folder, kernels="reference", quantization="int8"), prompts, 2)
    backend = load(folder, kernels="triton", quantization="int8")
    kinds = {type(m.matrix) for m in backend.decoder.model.modules() if hasattr(m, "matrix")}  # type: ignore[union-attr]
    assert kinds == {TritonWeight}
    assert greedy(backend, prompts, 2) == expected


def matrices_of(decoder: Decoder) -> list[object]:
    inner = [m for layer in decoder.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    return [*inner, decoder.embedding, decoder.lm_head]
