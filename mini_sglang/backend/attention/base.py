"""The interface between the decoder and an attention implementation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kv.pool import KVPool


@dataclass(frozen=True, slots=True, eq=False)
class AttentionForm:
    """What becomes of a layer's scores before and within the softmax.

    Attributes:
        scale: what the product of query and key is multiplied by; ``None`` is ``head_dim ** -0.5``.
        softcap: scores become ``softcap * tanh(score / softcap)``; ``None`` leaves them.
        sinks: ``[heads]``, one more score per head that takes its share and has no value.
    """

    scale: float | None = None
    softcap: float | None = None
    sinks: Tensor | None = None

    @property
    def fused(self) -> bool:
        """Whether torch's own attention computes it."""
        return self.softcap is None and self.sinks is None


PLAIN = AttentionForm()


class StepAttention(Protocol):
    """Attention of one step; indices and masks are made once and serve every layer."""

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        """Attend from every row of the batch to its sequence's positions up to its own.

        Args:
            layer: whose KV to read; the step's own rows are in the pool already.
            window: how many positions a row sees, itself included; ``None`` is all.
            query: ``[T, heads, head_dim]``; head ``h`` reads KV head ``h * kv_heads // heads``.
            key, value: ``[T, kv_heads, head_dim]``, the step's own rows; values may have another width.

        Returns:
            ``[T, heads * value's head_dim]``. A row depends on nothing but its own sequence's positions.
        """


class Attention(Protocol):
    """A way to do attention over the paged pool."""

    def begin(self, batch: Batch, kv: KVPool) -> StepAttention:
        """Plan one step. Reads nothing from the pool."""
