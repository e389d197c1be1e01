"""The operations between the products as compiled kernels; their torch twin: ``models/operations.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.kernels.jobs import Norm, Rotate, SiluTimes
from mini_sglang.backend.kernels.linear import NativeKernels
from mini_sglang.backend.kv.pool import KVPool


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
        job = Norm(
            x=hidden.data_ptr(),
            delta=None if delta is None else delta.data_ptr(),
            weight=weight.data_ptr(),
            out=out.data_ptr(),
            width=width,
            eps=self._eps,
        )
        self._kernels.run(job, rows)
        return out

    def rotate_and_store(
        self,
        qkv: Tensor,
        head_norm: Tensor | None,
        rotation: Tensor | None,
        kv: KVPool,
        layer: int,
        slots: Tensor,
    ) -> None:
        assert qkv.is_contiguous()
        cos, sin = (None, None) if rotation is None else (turn.data_ptr() for turn in rotation)
        job = Rotate(
            qkv=qkv.data_ptr(),
            head_norm=None if head_norm is None else head_norm.data_ptr(),
            cos=cos,
            sin=sin,
            slots=slots.data_ptr(),
            kv=kv.data[layer].data_ptr(),
            heads=self._heads,
            kv_heads=self._kv_heads,
            head_dim=qkv.shape[2],
            eps=self._eps,
        )
        self._kernels.run(job, len(qkv))

    def silu_times(self, gate_up: Tensor) -> Tensor:
        assert gate_up.is_contiguous()
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._kernels.run(SiluTimes(gate_up.data_ptr(), out.data_ptr(), width // 2), rows)
        return out
