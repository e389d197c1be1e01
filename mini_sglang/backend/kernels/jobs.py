"""The structs of linear.h, field for field: what the kernels are told to do."""

from __future__ import annotations

import ctypes
from typing import ClassVar

import numpy as np

from mini_sglang.backend.batch import IntArray

_POINTER, _SIZE, _FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class Job(ctypes.Structure):
    """One thing to do. Pointers are addresses; whoever runs the job keeps what they point to alive."""

    KIND: ClassVar[int]


class Product(Job):
    """``y = x @ W.T + bias``; ``packed`` says whether ``format`` is of blocks or of numbers."""

    KIND = 0
    _fields_ = (
        *((name, _POINTER) for name in ("weight", "x", "bias", "y")),
        *((name, _SIZE) for name in ("n", "k", "stride", "packed", "format")),
    )


class Attention(Job):
    """Causal attention over one layer's pages; ``sequences`` is the address of a ``SequenceTable``."""

    KIND = 1
    _fields_ = (
        *((name, _POINTER) for name in ("sequences", "kv", "query", "out")),
        *((name, _SIZE) for name in ("heads", "kv_heads", "head_dim", "page_size", "window", "query_stride")),
        ("scale", _FLOAT),
    )


class Norm(Job):
    """RMSNorm of ``x`` after ``delta`` was added to it in place."""

    KIND = 2
    _fields_ = (
        *((name, _POINTER) for name in ("x", "delta", "weight", "out")),
        ("width", _SIZE),
        ("eps", _FLOAT),
    )


class Rotate(Job):
    """Norm and rotation of the heads of q and k, and the KV write."""

    KIND = 3
    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "head_norm", "cos", "sin", "slots", "kv")),
        *((name, _SIZE) for name in ("heads", "kv_heads", "head_dim")),
        ("eps", _FLOAT),
    )


class SiluTimes(Job):
    """``SiLU(gate) * up``."""

    KIND = 4
    _fields_ = (*((name, _POINTER) for name in ("gate_up", "out")), ("width", _SIZE))


class Listed(ctypes.Structure):
    """``Job`` of linear.h: an entry of a program."""

    _fields_ = (("kind", _SIZE), ("fields", _POINTER))


class _Sequences(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("pages", "starts", "lengths")),
        *((name, _SIZE) for name in ("count", "stride")),
    )


class SequenceTable:
    """Which rows, positions and pages the sequences of a step have, at an address that does not change."""

    def __init__(self) -> None:
        self._fields = _Sequences()
        self.address = ctypes.addressof(self._fields)

    def set(self, pages: IntArray, starts: IntArray, lengths: IntArray) -> None:
        """Take ``pages`` ``[S, P]``, ``starts`` ``[S + 1]`` and ``lengths`` ``[S]``; see ``Batch``."""
        self._arrays = [np.ascontiguousarray(array, dtype=np.int64) for array in (pages, starts, lengths)]
        fields = self._fields
        fields.pages, fields.starts, fields.lengths = (array.ctypes.data for array in self._arrays)
        fields.count, fields.stride = pages.shape
