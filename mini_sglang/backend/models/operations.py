"""What a layer does between its matrix products and attention, with torch's operators.

Every operation rounds where transformers rounds, so that half precision agrees with it closely.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.rope import rotate_
from mini_sglang.backend.weights import Weight


class Operations(Protocol):
    """The operations of one model. Each row's result depends on that row alone, to the bit."""

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        """Add ``delta`` to ``hidden`` in place; the sum's RMSNorm (Zhang and Sennrich 2019), in float32.

        Args:
            hidden: ``[T, hidden_size]``; ``delta`` alike, ``None`` adds nothing.
            weight: ``[hidden_size]``.
        """

    def rotate_and_store(
        self,
        qkv: Tensor,
        head_norm: Tensor | None,
        rotation: Tensor | None,
        kv: KVPool,
        layer: int,
        slots: Tensor,
    ) -> None:
        """Norm and rotate the heads of q and k in place, then write k and v to the pool.

        Args:
            qkv: ``[T, heads + 2 * kv_heads, head_dim]``, contiguous.
            head_norm: RMSNorm weights ``[heads + kv_heads, head_dim]``; ``None`` norms nothing.
            rotation: ``[2, T, head_dim]`` as ``Rotations.at`` gives it; ``None`` rotates nothing.
            slots: ``[T]`` int64.
        """

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        """``SiLU(gate) * up``: ``[T, 2 * F]`` to ``[T, F]``. May overwrite ``gate_up``."""

    def norm_linear(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, bias: Tensor | None
    ) -> Tensor:
        """``weight.linear`` of ``norm``, which see."""
        return weight.linear(self.norm(hidden, delta, norm), bias)

    def norm_gated(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, bias: Tensor | None
    ) -> Tensor:
        """``silu_and_mul`` of ``norm_linear``."""
        return self.silu_and_mul(self.norm_linear(hidden, delta, norm, weight, bias))

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor) -> Tensor | None:
        """``weight.linear``, to be added to ``hidden`` as the next ``delta``; ``None`` where that is done."""
        return weight.linear(x, bias)


class TorchOperations(Operations):
    """``Operations`` for every device and dtype."""

    def __init__(self, eps: float) -> None:
        self._eps = eps

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        if delta is not None:
            hidden.add_(delta)
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, weight.shape, weight, self._eps)
        # The fused weight would be applied before the rounding to half precision, transformers' after it.
        return F.rms_norm(hidden, weight.shape, None, self._eps).mul_(weight)

    def rotate_and_store(
        self,
        qkv: Tensor,
        head_norm: Tensor | None,
        rotation: Tensor | None,
        kv: KVPool,
        layer: int,
        slots: Tensor,
    ) -> None:
        queries = qkv.shape[1] - 2 * kv.kv_heads
        self.rotate(qkv[:, : queries + kv.kv_heads], head_norm, rotation)
        kv.write(layer, slots, qkv[:, queries:].flatten(1))

    def rotate(self, heads: Tensor, head_norm: Tensor | None, rotation: Tensor | None) -> None:
        """The part of ``rotate_and_store`` before the pool; ``heads`` are those of q and k."""
        if head_norm is not None:
            heads.copy_(F.rms_norm(heads, heads.shape[-1:], None, self._eps).mul_(head_norm))
        if rotation is not None:
            rotate_(heads, *rotation)

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate).mul_(up)
