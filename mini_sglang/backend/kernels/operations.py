"""The operations between the products as compiled kernels; their torch twin: ``models/operations.py``."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mini_sglang.backend.kernels.linear import NativeKernels
from mini_sglang.backend.kv.pool import KVPool

_POINTER, _SIZE = ctypes.c_void_p, ctypes.c_int64


class _Norm(ctypes.Structure):
    """``Norm`` of linear.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("x", "delta", "weight", "out")),
        *((name, _SIZE) for name in ("rows", "width")),
        ("eps", ctypes.c_float),
    )


class _Rotate(ctypes.Structure):
    """``Rotate`` of linear.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("qkv", "cos", "sin", "slots", "kv")),
        *((name, _SIZE) for name in ("rows", "heads", "kv_heads", "head_dim")),
    )


class _SiluTimes(ctypes.Structure):
    """``SiluTimes`` of linear.h."""

    _fields_ = (
        *((name, _POINTER) for name in ("gate_up", "out")),
        *((name, _SIZE) for name in ("rows", "width")),
    )


class NativeOperations:
    """``Operations`` in float32 on the CPU, for the sizes that ``fit`` names."""

    def __init__(self, kernels: NativeKernels, heads: int, kv_heads: int, eps: float) -> None:
        self._kernels = kernels
        self._heads = heads
        self._kv_heads = kv_heads
        self._eps = eps

    @staticmethod
    def fit(hidden_size: int, intermediate_size: int, head_dim: int, dtype: torch.dtype) -> bool:
        return (
            dtype == torch.float32
            and hidden_size % 8 == 0
            and intermediate_size % 8 == 0
            and head_dim % 16 == 0
        )

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        assert hidden.is_contiguous() and (delta is None or delta.is_contiguous())
        rows, width = hidden.shape
        out = torch.empty_like(hidden)
        job = _Norm(
            hidden.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            out.data_ptr(),
            rows,
            width,
            self._eps,
        )
        self._kernels.call("norm", job)
        return out

    def rotate_and_store(
        self, qkv: Tensor, rotation: tuple[Tensor, Tensor] | None, kv: KVPool, layer: int, slots: Tensor
    ) -> None:
        assert qkv.is_contiguous()
        cos, sin = (None, None) if rotation is None else (turn.data_ptr() for turn in rotation)
        job = _Rotate(
            qkv.data_ptr(),
            cos,
            sin,
            slots.data_ptr(),
            kv.data[layer].data_ptr(),
            len(qkv),
            self._heads,
            self._kv_heads,
            qkv.shape[2],
        )
        self._kernels.call("rotate", job)

    def silu_times(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._kernels.call("silu_times", _SiluTimes(gate_up.data_ptr(), out.data_ptr(), rows, width // 2))
        return out
