"""Products with quantised blocks and with e4m3 on the device against the numbers they stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.fp8 import Fp8Weight, round_rows
from mini_sglang.backend.kernels.triton.block_layout import FORMATS
from mini_sglang.backend.kernels.triton.block_weight import TritonWeight
from mini_sglang.backend.loading.ggml_types import GGML_TYPES, GGMLType
from mini_sglang.backend.weights import QuantizedWeight, accelerate

# Rows of a step: for each way to multiply, its fewest and others.
_ROWS = (1, 16, 40, 65, 300, 600)
# Where each format has its float16 scales.
_HALVES = {
    "Q8_0": (0,), "Q4_0": (0,), "Q4_1": (0, 2), "Q5_0": (0,), "Q5_1": (0, 2), "Q4_K": (0, 2), "Q5_K": (0, 2),
    "Q6_K": (208,),
}  # fmt: skip


def random_blocks(kind: GGMLType, rows: int, columns: int) -> Tensor:
    """Blocks of random bytes with scales of one size, uint8 ``[rows, bytes_per_row]`` on the CPU."""
    generator = torch.Generator().manual_seed(1)
    count = rows * columns // kind.block_size
    blocks = torch.randint(0, 256, (count, kind.block_bytes), dtype=torch.uint8, generator=generator)
    for at in _HALVES[kind.name]:
        scales = (torch.rand(count, 1, generator=generator) * 0.04 - 0.02).half()
        blocks[:, at : at + 2] = scales.view(torch.uint8)
    return blocks.view(rows, -1)


def products(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """The largest error of a product, of any format and number of rows, relative to 1 plus the number."""

    def errors() -> Iterator[float]:
        shapes = ((40, 512),) if tiny else ((1024, 3072), (9216, 1024), (5120, 17408))
        for kind in (kind for kind in GGML_TYPES.values() if kind.name in FORMATS):
            for features, columns in shapes:
                twin = QuantizedWeight(random_blocks(kind, features, columns), kind, dtype).to(device)
                weight = TritonWeight.of(twin, dtype)
                dense = twin.dequantize(torch.float32)
                # Results of about 1.
                size = float(dense.square().mean().sqrt()) * math.sqrt(columns)
                bias = torch.linspace(-1, 1, features, device=device).to(dtype)
                for rows in (1, 20) if tiny else _ROWS:
                    x = (_numbers(rows, columns, device) / size).to(dtype)
                    yield _error(weight.linear(x, bias), F.linear(x.float(), dense, bias.float()))

    return _worst(errors())


def rows_of_blocks(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """The largest error of a whole matrix and of rows of it, relative to 1 plus the number."""

    def errors() -> Iterator[float]:
        rows, columns = (20, 512) if tiny else (2000, 5120)
        ids = torch.tensor([[3, 0], [rows - 1, 3]], device=device)
        for kind in (kind for kind in GGML_TYPES.values() if kind.name in FORMATS):
            twin = QuantizedWeight(random_blocks(kind, rows, columns), kind, dtype).to(device)
            weight = TritonWeight.of(twin, dtype)
            yield _error(weight.dequantize(dtype), twin.dequantize(dtype))
            yield _error(weight.rows(ids), twin.rows(ids))

    return _worst(errors())


def alone_and_beside_others(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """1 where a row has other bits alone than beside others within a way to multiply, else 0."""
    kind = GGML_TYPES[3]
    features, columns = (40, 512) if tiny else (1024, 3072)
    weight = TritonWeight.of(
        QuantizedWeight(random_blocks(kind, features, columns), kind, dtype).to(device), dtype
    )
    x = _numbers(512, columns, device).to(dtype)
    ranges = [(1, 16)] if tiny or dtype == torch.float32 else [(1, 16), (17, 64), (65, 512)]
    for fewest, most in ranges:
        together = weight.linear(x[:most])
        for start in (0,) if tiny else (0, most - fewest):
            if not torch.equal(weight.linear(x[start : start + fewest]), together[start : start + fewest]):
                return 1.0
    return 0.0


def e4m3(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """The largest error of a product of e4m3, in bfloat16 whatever ``dtype``, over 1000 for its rounding.

    Also of what the kernel rounds: how many numbers otherwise than torch. 0 on GPUs that do not multiply it.
    """
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return 0.0
    features, columns = (32, 64) if tiny else (5120, 17408)
    dense = _numbers(features, columns, device) / math.sqrt(columns)
    weight = accelerate(Fp8Weight.of(dense, torch.bfloat16), None, triton=device.type == "cuda")
    assert isinstance(weight, Fp8Weight)
    found = 0.0
    for rows in (1, 5) if tiny else _ROWS:
        x = _numbers(rows, columns, device).bfloat16()
        codes, scales = round_rows(x)
        own, own_scales = weight._rounded(x)
        found = max(found, _error(own_scales, scales), float((own.float() != codes.float()).float().mean()))
        exact = F.linear(codes.float() * scales, weight.dequantize(torch.float32))
        # Of bfloat16's 8 bits, in the tolerance that float32 is held to.
        found = max(found, _error(weight.linear(x), exact) / 1000)
    return found


def _numbers(rows: int, columns: int, device: torch.device) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)).to(device)


def _error(actual: Tensor, expected: Tensor) -> float:
    actual, expected = actual.float(), expected.float()
    return float(((actual - expected).abs() / (1 + expected.abs())).max())


def _worst(errors: Iterator[float]) -> float:
    """The largest; NaN where one is."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


# What is checked, by which kernels.
QUANTISED: tuple[tuple[str, tuple[str, ...], Callable[[torch.device, torch.dtype, bool], float]], ...] = (
    ("products with quantised blocks", ("multiply", "add_parts", "unpack"), products),
    ("rows of quantised blocks", ("unpack",), rows_of_blocks),
    ("a row of a product alone and beside others", ("multiply", "add_parts"), alone_and_beside_others),
    ("products of e4m3", ("round_row",), e4m3),
)
