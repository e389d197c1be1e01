"""Paged attention by the compiled kernel: in place, and the same to the bit whatever else is in the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kernels.jobs import Attention, SequenceTable
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kv.pool import TILE, KVPool

# MAX_HEAD_DIM and MAX_PARTIALS of kernels.h.
_MAX_HEAD_DIM, _MAX_GROUP = 256, 48


class NativeAttention:
    """``Attention`` of float32 queries on the CPU, over KV of any dtype, for the sizes that ``fit`` names."""

    name = "compiled"

    def __init__(self, kernels: NativeKernels) -> None:
        self._kernels = kernels

    @staticmethod
    def fit(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> bool:
        return (
            dtype == torch.float32
            and head_dim % 16 == 0
            and head_dim <= _MAX_HEAD_DIM
            and heads // kv_heads <= _MAX_GROUP
        )

    def tiles(self, dtype: torch.dtype, page_size: int) -> bool:
        """Whether a KV pool of ``dtype`` is read faster in tiles, and can be."""
        return dtype in self._kernels.tiled_dtypes and page_size % TILE == 0

    def begin(self, batch: Batch, kv: KVPool) -> NativeStep:
        return NativeStep(self._kernels, batch, kv)


class NativeStep:
    """One step of ``NativeAttention``; see ``StepAttention``."""

    def __init__(self, kernels: NativeKernels, batch: Batch, kv: KVPool) -> None:
        self._kernels = kernels
        self._kv = kv
        self._sequences = SequenceTable()
        self._sequences.set(batch.page_table, batch.query_starts, batch.seq_lens)

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        assert form.fused
        kv = self._kv
        rows, heads, head_dim = query.shape
        out = query.new_empty((rows, heads * head_dim))
        job = Attention.of(self._sequences, kv, layer, query, out, window, form.scale)
        self._kernels.run(job, rows)
        return out
