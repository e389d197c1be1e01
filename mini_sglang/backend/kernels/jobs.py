"""The structs of kernels.h, field for field: what the kernels are told to do."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.batch import IntArray
from mini_sglang.backend.kv.pool import KVPool

# The enum Format of kernels.h: ggml's numbers.
FORMATS: Mapping[str, int] = MappingProxyType(
    {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "Q4_K": 12, "Q6_K": 14, "BF16": 30}
)
KV_FORMATS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30, torch.int8: 24}
)
TILES: Mapping[torch.dtype, int] = MappingProxyType({torch.bfloat16: 100, torch.int8: 101})

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Job(ctypes.Structure):
    """One thing to do. Pointers are addresses; whoever runs the job keeps what they point to alive."""

    KIND: ClassVar[int]


def _address(tensor: Tensor | None) -> int | None:
    """Where a tensor begins, which the kernels take to be contiguous."""
    assert tensor is None or tensor.is_contiguous()
    return None if tensor is None else tensor.data_ptr()


class _Pool(ctypes.Structure):
    """One layer of the KV pool."""

    _fields_ = (("data", _POINTER), *((name, _SIZE) for name in ("format", "kv_heads", "head_dim")))

    @classmethod
    def of(cls, kv: KVPool, layer: int) -> _Pool:
        kept_as = (TILES if kv.tiled else KV_FORMATS)[kv.dtype]
        return cls(_address(kv.rows(layer)), kept_as, kv.kv_heads, kv.head_dim)


class Product(Job):
    """``y = x @ W.T + bias`` for a packed W of ``format``."""

    KIND = 0
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "bias", "y")),
        *((name, _SIZE) for name in ("n", "k", "stride", "format")),
    )


class Attention(Job):
    """Causal attention of one step over one layer's pages, which the step's own rows are in.

    Keys are added up in blocks that begin at fixed positions, so that a row's result depends on its
    position and its sequence's KV alone, bit for bit.
    """

    KIND = 1
    _fields_ = (
        ("sequences", _POINTER),
        ("pool", _Pool),
        ("query", _POINTER),
        ("out", _POINTER),
        *((name, _SIZE) for name in ("heads", "page_size", "window", "query_stride")),
        ("scale", _FLOAT),
    )

    @classmethod
    def of(
        cls,
        sequences: SequenceTable,
        kv: KVPool,
        layer: int,
        query: Tensor,
        out: Tensor,
        window: int | None,
        scale: float | None = None,
    ) -> Attention:
        """Attend from ``query`` to a layer of ``kv``.

        Args:
            query: ``[T, heads, head_dim]`` float32; rows may lie apart, heads lie side by side.
            out: ``[T, heads * head_dim]``.
            window: how many positions a row sees, itself included; ``None`` is all.
            scale: of the scores; ``None`` is ``head_dim ** -0.5``.
        """
        _, heads, head_dim = query.shape
        assert query.stride()[1:] == (head_dim, 1)
        return cls(
            sequences=sequences.address,
            pool=_Pool.of(kv, layer),
            query=query.data_ptr(),
            out=_address(out),
            heads=heads,
            page_size=kv.page_size,
            window=window or 0,
            query_stride=query.stride(0),
            scale=head_dim**-0.5 if scale is None else scale,
        )


class Norm(Job):
    """RMSNorm of ``x`` after ``delta`` was added to it in place."""

    KIND = 2
    _fields_ = (
        *((name, _POINTER) for name in ("x", "delta", "weight", "out")),
        ("width", _SIZE),
        ("eps", _FLOAT),
    )

    @classmethod
    def of(cls, x: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, eps: float) -> Norm:
        """As ``Operations.norm``, into ``out``."""
        return cls(_address(x), _address(delta), _address(weight), _address(out), len(weight), eps)


class Rotate(Job):
    """Norm and rotation of the heads of q and k, and the KV write."""

    KIND = 3
    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "head_norm", "turns", "slots")),
        ("pool", _Pool),
        ("heads", _SIZE),
        ("eps", _FLOAT),
    )

    @classmethod
    def of(
        cls,
        qkv: Tensor,
        head_norm: Tensor | None,
        turns: Turns | None,
        slots: Tensor,
        kv: KVPool,
        layer: int,
        eps: float,
    ) -> Rotate:
        """As ``Operations.rotate_and_store``; whoever runs the job keeps ``turns`` too."""
        heads = qkv.shape[1] - 2 * kv.kv_heads
        pool = _Pool.of(kv, layer)
        return cls(
            _address(qkv), _address(head_norm), turns and turns.address, _address(slots), pool, heads, eps
        )


class SiluAndMul(Job):
    """``SiLU(gate) * up``."""

    KIND = 4
    _fields_ = (*((name, _POINTER) for name in ("gate_up", "out")), ("width", _SIZE))

    @classmethod
    def of(cls, gate_up: Tensor, out: Tensor) -> SiluAndMul:
        """As ``Operations.silu_and_mul``, into ``out`` ``[T, F]``."""
        return cls(_address(gate_up), _address(out), out.shape[1])


class Embed(Job):
    """Rows of a packed matrix as float32."""

    KIND = 5
    _fields_ = (*((name, _POINTER) for name in ("weight", "ids", "out")), ("k", _SIZE), ("format", _SIZE))


class Adapt(Job):
    """What the adapters of a step's rows add to a product: ``y += (x @ down.T) @ up.T``."""

    KIND = 6
    _fields_ = (
        *((name, _POINTER) for name in ("runs", "slots", "x", "y")),
        ("k", _SIZE),
        ("stride", _SIZE),
    )


class AdapterPart(ctypes.Structure):
    _fields_ = (("up", _POINTER), *((name, _SIZE) for name in ("rank", "first", "n")))


class AdapterSlot(ctypes.Structure):
    """One adapter at one place of the model; all zeros where it changes nothing there."""

    MAX_PARTS: ClassVar[int] = 3
    _fields_ = (("down", _POINTER), ("rank", _SIZE), ("parts", _SIZE), ("part", AdapterPart * 3))


class _AdapterRuns(ctypes.Structure):
    _fields_ = (("runs", _POINTER), ("count", _SIZE))


class AdapterRuns:
    """Which rows of a step have which adapter, at an address that does not change."""

    def __init__(self) -> None:
        self._fields = _AdapterRuns()
        self.address = ctypes.addressof(self._fields)

    def set(self, runs: Sequence[tuple[int, int, int]]) -> None:
        """Take (first row, last + 1, slot) of each run of rows with one adapter, in order."""
        self._runs = array("q", [number for run in runs for number in run])
        self._fields.runs, self._fields.count = self._runs.buffer_info()[0], len(runs)


class Entry(ctypes.Structure):
    """A job in a list of jobs."""

    _fields_ = (("kind", _SIZE), ("job", _POINTER))

    @classmethod
    def of(cls, job: Job) -> Entry:
        return cls(job.KIND, ctypes.addressof(job))


class _Sequences(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("pages", "starts", "lengths")),
        *((name, _SIZE) for name in ("count", "stride")),
    )


class _Turns(ctypes.Structure):
    _fields_ = tuple((name, _POINTER) for name in ("cos", "sin", "positions"))


class Turns:
    """By which angles each row of a step is rotated, at an address that does not change."""

    def __init__(self) -> None:
        self._fields = _Turns()
        self.address = ctypes.addressof(self._fields)

    def set(self, table: Tensor, positions: Tensor | None) -> None:
        """Take the rows ``positions`` ``[T]`` int64, or all, of ``table`` ``[2, P, head_dim]`` float32."""
        self._tensors = table, positions
        self._fields.cos = _address(table)
        self._fields.sin = table.data_ptr() + table.nbytes // 2
        self._fields.positions = _address(positions)


class SequenceTable:
    """Which rows, positions and pages the sequences of a step have, at an address that does not change."""

    def __init__(self) -> None:
        self._fields = _Sequences()
        self.address = ctypes.addressof(self._fields)

    def set(self, pages: IntArray, starts: Sequence[int], lengths: Sequence[int]) -> None:
        """Take a ``Batch``'s ``page_table``, ``query_starts`` and ``seq_lens``."""
        self._arrays = [np.ascontiguousarray(array, dtype=np.int64) for array in (pages, starts, lengths)]
        fields = self._fields
        fields.pages, fields.starts, fields.lengths = (array.ctypes.data for array in self._arrays)
        fields.count, fields.stride = pages.shape
