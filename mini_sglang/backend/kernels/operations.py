"""The operations between the products as compiled kernels; their torch twin: ``models/operations.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.kernels.jobs import Norm, Rotate, SiluAndMul, Turns
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.operations import Operations


class NativeOperations(Operations):
    """``Operations`` in float32 on the CPU, for the sizes that ``fit`` names."""

    def __init__(self, kernels: NativeKernels, eps: float) -> None:
        self._kernels = kernels
        self._eps = eps

    @staticmethod
    def fit(hidden_size: int, intermediate_size: int, head_dim: int, dtype: torch.dtype) -> bool:
        return (
            dtype == torch.float32
            and hidden_size % 16 == 0
            and intermediate_size % 16 == 0
            and head_dim % 16 == 0
        )

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        out = torch.empty_like(hidden)
        self._kernels.run(Norm.of(hidden, delta, weight, out, self._eps), len(hidden))
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
        turns = None
        if rotation is not None:
            turns = Turns()
            turns.set(rotation, None)
        self._kernels.run(Rotate.of(qkv, head_norm, turns, slots, kv, layer, self._eps), len(qkv))

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        rows, width = gate_up.shape
        out = gate_up.new_empty((rows, width // 2))
        self._kernels.run(SiluAndMul.of(gate_up, out), rows)
        return out
