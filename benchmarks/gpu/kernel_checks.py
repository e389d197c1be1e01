"""Every Triton kernel against its twin in torch, on the device, in bfloat16 and float32."""

from __future__ import annotations

import math
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.quantised_checks import QUANTISED
from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.kernels.triton.choosing import take_chosen
from mini_sglang.backend.kernels.triton.few_rows import FEW_ROWS
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.operations import TorchOperations
from mini_sglang.backend.models.rope import Rotations
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.backend.weights import DenseWeight
from mini_sglang.types import SamplingParams

# Of numbers around 1: some units in the last place of a product's result, or of a softmax weight.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
PAGE = 16
EPS = 1e-6
# Heads, KV heads, size of a head: of the two models, and of others that take other tiles.
SHAPES = ((16, 8, 128), (40, 8, 128), (9, 3, 64), (8, 2, 256))
_TINY_SHAPES = ((4, 2, 16),)


@dataclass(frozen=True)
class Check:
    """``run`` gives the largest error, relative to 1 plus the number that is right."""

    name: str
    kernels: tuple[str, ...]
    run: Callable[[torch.device, torch.dtype, bool], float]


def error_of(actual: Tensor, expected: Tensor) -> float:
    """NaN, which is no error below any tolerance, where only one of the two is finite."""
    actual, expected = actual.float(), expected.float()
    return float(((actual - expected).abs() / (1 + expected.abs())).max())


class Scene:
    """A step of sequences given as (new tokens, tokens before), in pages that lie anywhere."""

    def __init__(
        self,
        sequences: Sequence[tuple[int, int]],
        shape: tuple[int, int, int],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        heads, kv_heads, head_dim = shape
        generator = torch.Generator().manual_seed(1)
        counts = [-(-(new + before) // PAGE) for new, before in sequences]
        order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
        self.kv = self._pool(len(order), kv_heads, head_dim, device, dtype)
        # What no sequence has must not be read.
        self.kv.data.fill_(torch.nan)
        steps = []
        for count, (new, before) in zip(counts, sequences, strict=True):
            pages, order = order[:count], order[count:]
            steps.append(SequenceStep([0] * new, before, array("i", pages)))
            slots = [pages[p // PAGE] * PAGE + p % PAGE for p in range(new + before)]
            numbers = torch.randn(len(slots), 2 * kv_heads * head_dim, generator=generator)
            self.kv.write(0, torch.tensor(slots, device=device), numbers.to(device, dtype))
        limits = Limits(PAGE, self.kv.num_pages, vocab_size=1, context_length=1 << 20)
        self.batch = Batch.build(steps, limits, device)
        query = torch.randn(self.batch.query_starts[-1], heads, head_dim, generator=generator)
        self.query = query.to(device, dtype)
        self.own = self.kv.layer(0)[self.batch.slot_mapping]

    @staticmethod
    def _pool(pages: int, kv_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> KVPool:
        return KVPool(
            num_layers=1,
            num_pages=pages,
            page_size=PAGE,
            kv_heads=kv_heads,
            head_dim=head_dim,
            dtype=dtype,
            device=device,
        )

    def error(self, window: int | None = None, form: AttentionForm = PLAIN) -> float:
        key, value = self.own.unbind(1)
        step = TritonAttention().begin(self.batch, self.kv)
        actual = step(0, window, self.query, key, value, form)
        wide = self._pool(
            self.kv.num_pages, self.kv.kv_heads, self.kv.head_dim, self.kv.data.device, torch.float32
        )
        wide.data.copy_(self.kv.data.float().nan_to_num(0.0))
        twin = PagedAttention().begin(self.batch, wide)
        return error_of(actual, twin(0, window, self.query.float(), key.float(), value.float(), form))


def attention(
    sequences: Sequence[tuple[int, int]], window: int | None = None, form: AttentionForm = PLAIN
) -> Callable[[torch.device, torch.dtype, bool], float]:
    def run(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
        shapes = _TINY_SHAPES if tiny else SHAPES
        return worst(Scene(sequences, shape, device, dtype).error(window, form) for shape in shapes)

    return run


def sinks(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    def errors() -> Iterator[float]:
        for shape in _TINY_SHAPES if tiny else SHAPES[:2]:
            form = AttentionForm(0.4, 2.0, torch.linspace(-2, 3, shape[0], device=device))
            yield Scene([(1, 80), (9, 3), (1, 0)], shape, device, dtype).error(None, form)

    return worst(errors())


def norm(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    def errors() -> Iterator[float]:
        for width in (48,) if tiny else (1024, 5120, 1536):
            for delta in (None, numbers((7, width), 1, device, dtype)):
                weight = numbers((width,), 2, device, dtype)
                hidden = [numbers((7, width), 3, device, dtype) for _ in range(2)]
                sides = (TritonOperations(EPS), TorchOperations(EPS))
                both = [side.norm(one, delta, weight) for side, one in zip(sides, hidden, strict=True)]
                yield error_of(*both)
                yield error_of(*hidden)

    return worst(errors())


def rotation(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    def errors() -> Iterator[float]:
        for heads, kv_heads, head_dim in _TINY_SHAPES if tiny else SHAPES:
            slots = torch.tensor([9, 0, 31, 17], device=device)
            base = 1.0 / 1e6 ** (torch.arange(0, head_dim, 2, device=device) / head_dim)
            turns = Rotations(base, 1.0, dtype).at(torch.tensor([0, 3, 700, 41], device=device), 701)
            head_norm = numbers((heads + kv_heads, head_dim), 1, device, dtype)
            found = []
            for side in (TritonOperations(EPS), TorchOperations(EPS)):
                kv = Scene._pool(2, kv_heads, head_dim, device, dtype)
                kv.data.zero_()
                qkv = numbers((4, heads + 2 * kv_heads, head_dim), 0, device, dtype)
                side.rotate_and_store(qkv, head_norm, turns, kv, 0, slots)
                found.append((qkv, kv.data))
            yield from (error_of(ours, twin) for ours, twin in zip(*found, strict=True))

    return worst(errors())


def silu(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    def errors() -> Iterator[float]:
        for width in (40,) if tiny else (3072, 17408, 1000):
            gate_up = numbers((5, 2 * width), 0, device, dtype)
            sides = (TritonOperations(EPS), TorchOperations(EPS))
            yield error_of(*(side.silu_and_mul(gate_up.clone()) for side in sides))

    return worst(errors())


def few(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """Products beside the norm, the gate and the sum; NaN where a row has other bits beside others."""

    def errors() -> Iterator[float]:
        for width, inner in ((48, 40),) if tiny else ((1024, 3072), (5120, 17408)):
            gate_up = DenseWeight(numbers((2 * inner, width), 1, device, dtype).div_(math.sqrt(width)))
            down = DenseWeight(numbers((width, inner), 2, device, dtype).div_(math.sqrt(inner)))
            bias, weight = (numbers((size,), 3, device, dtype) for size in (2 * inner, width))
            x, hidden = (numbers((FEW_ROWS + 1, size), 4, device, dtype) for size in (inner, width))
            rows_of: list[list[Tensor]] = []
            for rows in range(1, FEW_ROWS + 2):
                found = []
                for side in (TritonOperations(EPS), TorchOperations(EPS)):
                    own = hidden[:rows].clone()
                    delta = side.linear_add(x[:rows], down, None, own)
                    gated = side.norm_gated(own, delta, weight, gate_up, None)
                    plain = side.norm_linear(own, None, weight, gate_up, bias)
                    found.append([own, gated, plain])
                yield from (error_of(ours, twin) for ours, twin in zip(*found, strict=True))
                rows_of.append(found[0])
            for few_rows in rows_of[1:FEW_ROWS]:
                pairs = zip(rows_of[0], few_rows, strict=True)
                # In float32 torch multiplies.
                same = dtype == torch.float32 or all(torch.equal(one[0], many[0]) for one, many in pairs)
                yield 0.0 if same else math.nan

    return worst(errors())


_PLAIN_WAYS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.6},
    {"temperature": 1.0},
    {"temperature": 0.8, "min_p": 0.01},
)
_WAYS: tuple[dict[str, Any], ...] = (
    *_PLAIN_WAYS[:2],
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 50, "min_p": 0.01},
)


def choosing(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """How many of the tokens that the device chooses are others than those that the host would."""
    return worst(
        [
            _other_tokens(device, dtype, rows, vocab, ways)
            for vocab in ((500,) if tiny else (151936, 49152))
            for rows, ways in ((16, _WAYS), (16, _PLAIN_WAYS), (1, _PLAIN_WAYS[1:]), (48, _PLAIN_WAYS))
        ]
    )


def _other_tokens(
    device: torch.device, dtype: torch.dtype, rows: int, vocab: int, ways: Sequence[dict[str, Any]]
) -> float:
    logits = 3 * numbers((rows, vocab), 5, device, dtype)
    specs = [
        SampleSpec(SamplingParams(max_new_tokens=1, seed=row, **ways[row % len(ways)]), row, row)
        for row in range(rows)
    ]
    ours = DeviceSampler(vocab, kernels=True).sample(logits.clone(), specs)
    twin = Sampler(vocab).sample(logits.float().cpu(), specs)
    return sum(a.token_id != b.token_id for a, b in zip(ours, twin, strict=True)) / rows


def followed(device: torch.device, dtype: torch.dtype, tiny: bool) -> float:
    """How many tokens that a step before chose are not taken, exactly."""
    ids = torch.arange(1000, 1600, device=device)
    tokens = torch.arange(300, device=device)
    tokens[::2] = -1 - 2 * tokens[::2]
    wanted = torch.where(tokens < 0, 999 - tokens, tokens)
    take_chosen(tokens, ids)
    return float((tokens != wanted).double().mean())


def numbers(shape: tuple[int, ...], seed: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def worst(errors: Iterator[float] | Sequence[float]) -> float:
    """The largest; NaN where one is."""
    found = list(errors)
    return math.nan if any(map(math.isnan, found)) else max(found)


CHECKS = (
    Check("attention: decodes", ("attend",), attention([(1, 40), (1, 0), (1, 127), (1, 200)])),
    Check(
        "attention: long decodes in parts", ("attend", "merge"), attention([(1, 2500), (1, 300), (20, 900)])
    ),
    Check("attention: chunks", ("attend", "attend_chunk"), attention([(140, 0), (70, 33), (1, 90), (35, 0)])),
    Check(
        "attention: sliding window", ("attend", "merge"), attention([(1, 699), (60, 100), (1, 5)], window=100)
    ),
    Check("attention: scale, soft cap, sinks", ("attend",), sinks),
    Check("norm with the residual", ("add_and_norm",), norm),
    Check("norm and rotation of heads, KV write", ("rotate_and_store",), rotation),
    Check("SiLU times up", ("silu_and_mul",), silu),
    Check("products of few rows", ("few_rows",), few),
    Check(
        "choosing tokens",
        (
            "find_best",
            "weigh_parts",
            "pick_tokens",
            "find_peaks",
            "find_thresholds",
            "gather_largest",
            "pick_ranked",
        ),
        choosing,
    ),
    Check("tokens that were chosen", ("take_chosen",), followed),
    *(Check(*entry) for entry in QUANTISED),
)
