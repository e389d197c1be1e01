"""Paged attention by the compiled kernel: in place, and the same to the bit whatever else is in the batch."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kernels.jobs import SequenceTable
from mini_sglang.backend.kernels.linear import NativeKernels
from mini_sglang.backend.kv.pool import KVPool


class NativeAttention:
    """``Attention`` for a float32 pool on the CPU; ``NativeKernels.has_attention`` says for which models."""

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    def begin(self, batch: Batch, kv: KVPool) -> NativeStep:
        return NativeStep(self._kernels, batch, kv)


class NativeStep:
    """One step of ``NativeAttention``; see ``StepAttention``."""

    def __init__(self, kernels: NativeKernels, batch: Batch, kv: KVPool) -> None:
        self._kernels = kernels
        self._kv = kv
        self._sequences = SequenceTable()
        self._sequences.set(batch.page_table, np.array(batch.query_starts), np.array(batch.seq_lens))

    def __call__(self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        kv = self._kv
        return self._kernels.attention(
            kv.data[layer], self._sequences, query, kv.kv_heads, kv.page_size, window
        )
