"""The interface between the decoder and an attention implementation."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kv.pool import KVPool


class StepAttention(Protocol):
    """Attention of one step; indices and masks are made once and serve every layer."""

    def __call__(self, layer: int, window: int | None, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attend from every row of the batch to its sequence's positions up to its own.

        Args:
            layer: whose KV to read; the step's own rows are in the pool already.
            window: how many positions a row sees, itself included; ``None`` is all.
            query: ``[T, heads, head_dim]``; head ``h`` reads KV head ``h * kv_heads // heads``.
            key, value: ``[T, kv_heads, head_dim]``, the step's own rows.

        Returns:
            ``[T, heads * head_dim]``. A row depends on nothing but its own sequence's positions.
        """


class Attention(Protocol):
    """A way to do attention over the paged pool."""

    def begin(self, batch: Batch, kv: KVPool) -> StepAttention:
        """Plan one step. Reads nothing from the pool."""
