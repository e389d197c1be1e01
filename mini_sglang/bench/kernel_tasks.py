"""What ``bench kernels`` times: each compiled kernel as a step calls it, and its twin in torch.

Data that a step reads from memory (weights, KV) is rotated through ``pool_bytes``; what lies between two
products (norm, rotation, SiLU) is in the CPU's caches in a step too, and stays there.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.models.operations import Operations, TorchOperations
from mini_sglang.backend.models.rope import Rotations
from mini_sglang.backend.step import SequenceStep
from mini_sglang.backend.weights import DenseWeight, QuantizedWeight, Weight, accelerate

FORMATS = tuple(GGML_TYPES[number] for number in (2, 3, 8, 12, 14))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KV_DTYPES = (*DTYPES, torch.int8)
EPS = 1e-5
PAGE_SIZE = 16
CPU = torch.device("cpu")

Call = Callable[[], object]


@dataclass(frozen=True)
class Sizes:
    """Of everything that is timed. The defaults are those of a model of a few hundred million weights.

    Attributes:
        matrix: rows and columns of the products' matrix.
        product_rows: of the steps that are timed, for products; ``decode_rows`` for attention.
        heads: of queries, of keys and values, and their width.
        context: positions that a decode reads; ``chunk``: rows of a prefill from position 0.
        hidden: width of the norm; SiLU has four times as much.
        pool_bytes: more than the CPU's caches hold.
    """

    matrix: tuple[int, int] = (1536, 2048)
    product_rows: tuple[int, ...] = (1, 4, 16, 256)
    decode_rows: tuple[int, ...] = (1, 16)
    between_rows: tuple[int, ...] = (1, 16, 256)
    heads: tuple[int, int, int] = (16, 4, 64)
    context: int = 1024
    chunk: int = 512
    hidden: int = 1024
    pool_bytes: int = 128 << 20


@dataclass(frozen=True)
class Task:
    """One row of the table.

    Attributes:
        kernel: what it does; ``weights``: the type of the matrix, or of the KV.
        rows: of the step; ``context``: positions each of them reads, for attention.
        bytes: that it has to read and write: the matrix, the KV, or what lies between two products.
        flop: multiplications and additions, two a weight and row; None where they are not the point.
        ours: one call of the kernel; ``torchs``: one of its twin, None where there is none.
    """

    kernel: str
    weights: str
    rows: int
    bytes: int
    flop: int | None
    ours: Call
    torchs: Call | None
    context: int | None = None


def all_tasks(kernels: NativeKernels, sizes: Sizes) -> Iterator[Task]:
    """One after the other, so that the data of one is gone when the next is made."""
    generator = torch.Generator().manual_seed(0)
    yield from _products(kernels, sizes, generator)
    for dtype in KV_DTYPES:
        yield from _decodes(kernels, sizes, dtype, generator)
        yield _prefill(kernels, sizes, dtype, generator)
    for rows in sizes.between_rows:
        yield from _between(kernels, sizes, rows, generator)


def _products(kernels: NativeKernels, sizes: Sizes, generator: torch.Generator) -> Iterator[Task]:
    n, k = sizes.matrix
    for name, make in _weights(n, k, generator):
        weight = make()
        copies = max(2, sizes.pool_bytes // weight.nbytes)
        fast = [accelerate(_again(weight), kernels, torch.float32) for _ in range(copies)]
        slow = [_again(weight) for _ in range(copies)]
        for rows in sizes.product_rows:
            x = torch.randn(rows, k, generator=generator)
            work = 2 * rows * n * k
            ours, torchs = _multiply(fast, x), _multiply(slow, x.to(weight.dtype))
            yield Task("product", name, rows, weight.nbytes, work, ours, torchs)


def _weights(
    n: int, k: int, generator: torch.Generator
) -> Iterator[tuple[str, Callable[[], DenseWeight | QuantizedWeight]]]:
    for dtype in DTYPES:
        dense = torch.randn(n, k, generator=generator)
        yield _name(dtype), lambda dense=dense, dtype=dtype: DenseWeight(dense.to(dtype))  # type: ignore[misc]
    for kind in FORMATS:
        blocks = torch.zeros(n, k // kind.block_size * kind.block_bytes, dtype=torch.uint8)
        # Bytes below 60 make no infinite scale in any of the formats.
        blocks.random_(0, 60, generator=generator)
        yield kind.name, lambda blocks=blocks, kind=kind: QuantizedWeight(blocks, kind, torch.float32)  # type: ignore[misc]


def _again(weight: DenseWeight | QuantizedWeight) -> DenseWeight | QuantizedWeight:
    """The same numbers elsewhere in memory."""
    if isinstance(weight, QuantizedWeight):
        return QuantizedWeight(weight.blocks.clone(), weight.type, weight.dtype)
    return DenseWeight(weight.tensor.clone())


def _multiply(weights: Sequence[Weight], x: Tensor) -> Call:
    turn = cycle(weights)
    return lambda: next(turn).linear(x)


def _decodes(
    kernels: NativeKernels, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator
) -> Iterator[Task]:
    for rows in sizes.decode_rows:
        scene = _Scene(kernels, sizes, dtype, [(1, sizes.context - 1)] * rows, generator)
        work = 4 * rows * sizes.context * scene.width
        yield scene.task("attention, decode", work, rows * sizes.context, sizes.context)


def _prefill(kernels: NativeKernels, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator) -> Task:
    rows = sizes.chunk
    scene = _Scene(kernels, sizes, dtype, [(rows, 0)], generator)
    return scene.task("attention, prefill", 4 * scene.width * rows * (rows + 1) // 2, rows, rows)


class _Scene:
    """Sequences of (new tokens, start), with KV in as many layers as fill the pool."""

    def __init__(
        self,
        kernels: NativeKernels,
        sizes: Sizes,
        dtype: torch.dtype,
        sequences: list[tuple[int, int]],
        generator: torch.Generator,
    ) -> None:
        heads, kv_heads, head_dim = sizes.heads
        self.width, self.dtype = heads * head_dim, dtype
        self.rows = sum(count for count, _ in sequences)
        steps, pages = [], 0
        for count, start in sequences:
            needed = -(-(count + start) // PAGE_SIZE)
            steps.append(SequenceStep([0] * count, start, array("i", range(pages, pages + needed))))
            pages += needed
        self.query = torch.randn(self.rows, heads, head_dim, generator=generator)
        self.pools: list[tuple[Attention, KVPool, Tensor]] = []
        native = NativeAttention(kernels)
        slots = torch.arange(pages * PAGE_SIZE)
        new = torch.randn(len(slots), heads + 2 * kv_heads, head_dim, generator=generator)
        self._new = new[: self.rows, heads:].view(self.rows, 2, kv_heads, head_dim)
        pools: list[tuple[Attention, bool]] = [(native, native.tiles(dtype, PAGE_SIZE))]
        if dtype != torch.int8:
            pools.append((PagedAttention(), False))
        for attention, tiled in pools:
            token_bytes = 2 * kv_heads * head_dim * dtype.itemsize
            layers = max(2, -(-sizes.pool_bytes // (len(slots) * token_bytes)))
            kv = KVPool(
                num_layers=layers,
                num_pages=pages,
                page_size=PAGE_SIZE,
                kv_heads=kv_heads,
                head_dim=head_dim,
                dtype=dtype,
                device=CPU,
                tiled=tiled,
            )
            for layer in range(layers):
                NativeOperations(kernels, EPS).rotate_and_store(new, None, None, kv, layer, slots)
            query = self.query if attention is native else self.query.to(dtype)
            self.pools.append((attention, kv, query))
        limits = Limits(PAGE_SIZE, pages, vocab_size=1, context_length=len(slots))
        self._batch = Batch.build(steps, limits, CPU)

    def task(self, kernel: str, work: int, positions: int, context: int) -> Task:
        """``positions``: whose KV is read, of all sequences together."""
        kv = self.pools[0][1]
        size = positions * kv.bytes_per_token // len(kv.data)
        calls = [self._attend(*pool) for pool in self.pools]
        torchs = calls[1] if len(calls) > 1 else None
        return Task(kernel, _name(self.dtype), self.rows, size, work, calls[0], torchs, context)

    def _attend(self, attention: Attention, kv: KVPool, query: Tensor) -> Call:
        step, layers = attention.begin(self._batch, kv), cycle(range(len(kv.data)))
        key, value = self._new.to(query.dtype).unbind(1)
        return lambda: step(next(layers), None, query, key, value)


def _between(kernels: NativeKernels, sizes: Sizes, rows: int, generator: torch.Generator) -> Iterator[Task]:
    """The operations between the products, in float32, which all of them have there."""
    native, twin = NativeOperations(kernels, EPS), TorchOperations(EPS)
    width, (heads, kv_heads, head_dim) = sizes.hidden, sizes.heads
    # Zeros: what is added in place again and again does not grow.
    hidden, delta, weight = torch.ones(rows, width), torch.zeros(rows, width), torch.ones(width)

    def both(call: Callable[[Operations], object]) -> tuple[Call, Call]:
        return lambda: call(native), lambda: call(twin)

    norm = both(lambda way: way.norm(hidden, delta, weight))
    yield Task("norm", "float32", rows, 4 * hidden.nbytes + weight.nbytes, None, *norm)

    qkv = torch.randn(rows, heads + 2 * kv_heads, head_dim, generator=generator)
    kv = KVPool(
        num_layers=1,
        num_pages=rows,
        page_size=1,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=torch.float32,
        device=CPU,
    )
    turns = Rotations(torch.linspace(1, 0.01, head_dim // 2), 1.0, torch.float32).at(torch.arange(rows), rows)
    slots = torch.arange(rows)
    rotate = both(lambda way: way.rotate_and_store(qkv, None, turns, kv, 0, slots))
    turned = qkv[:, : heads + kv_heads].numel() * 4
    yield Task("rotation and KV write", "float32", rows, qkv.nbytes + turned + kv.data.nbytes, None, *rotate)

    gate_up = torch.randn(rows, 8 * width, generator=generator)
    silu = both(lambda way: way.silu_and_mul(gate_up))
    yield Task("SiLU and product", "float32", rows, gate_up.nbytes * 3 // 2, None, *silu)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
