"""The operations between the products as Triton kernels; their torch twin: ``models/operations.py``."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.kernels.triton import few_rows
from mini_sglang.backend.kernels.triton.available import dependent_launches
from mini_sglang.backend.kernels.triton.launch import power_of_two, row_warps
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.models.operations import Operations
from mini_sglang.backend.weights import DenseWeight, Weight

_BLOCK = 1024
# Numbers of a tile of heads.
_TILE = 2048


def round_rows(x: Tensor, smallest: float) -> tuple[Tensor, Tensor]:
    """``fp8.round_rows`` in one launch, for rows ``[R, K]`` that lie in one piece each."""
    from mini_sglang.backend.kernels.triton.elementwise_kernels import round_row

    rows, width = x.shape
    codes = torch.empty((rows, width), dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    block = power_of_two(width)
    round_row[(rows,)](
        x, codes, scales, x.stride(0), smallest, WIDTH=width, BLOCK=block, num_warps=row_warps(block)
    )
    return codes, scales


class TritonOperations(Operations):
    """``Operations`` on CUDA, in any floating dtype, for even head sizes.

    Products of few rows with dense weights take the norm, the activation and the sum beside them into their
    launch. A launch's grid depends on shapes alone and a call allocates its result alone: all of it can be
    captured in a CUDA graph. A row whose slot is negative, padding, writes nothing to the pool.
    """

    def __init__(self, eps: float) -> None:
        self._eps = eps

    @staticmethod
    def fit(head_dim: int) -> bool:
        return head_dim % 2 == 0

    def norm(self, hidden: Tensor, delta: Tensor | None, weight: Tensor) -> Tensor:
        from mini_sglang.backend.kernels.triton.elementwise_kernels import add_and_norm

        rows, width = hidden.shape
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        if rows:
            block = power_of_two(width)
            add_and_norm[(rows,)](
                hidden,
                hidden if delta is None else delta,
                weight,
                out,
                hidden.stride(0),
                hidden.stride(0) if delta is None else delta.stride(0),
                self._eps,
                WIDTH=width,
                BLOCK=block,
                ADD=delta is not None,
                num_warps=row_warps(block),
            )
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
        from mini_sglang.backend.kernels.triton.elementwise_kernels import rotate_and_store

        rows, total, head_dim = qkv.shape
        if not rows:
            return
        keys, values = kv.keys_values(layer, kv.rows(layer))
        dependent = dependent_launches(qkv.device)
        block_heads = min(power_of_two(total), max(1, _TILE // power_of_two(head_dim)))
        rotate_and_store[(rows, -(-total // block_heads))](
            qkv,
            qkv if head_norm is None else head_norm,
            qkv if rotation is None else rotation,
            keys,
            values,
            slots,
            qkv.stride(0),
            0 if rotation is None else rotation.stride(0),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            self._eps,
            HEADS=total - 2 * kv.kv_heads,
            KV_HEADS=kv.kv_heads,
            HEAD_DIM=head_dim,
            HALF_BLOCK=power_of_two(head_dim // 2),
            BLOCK_HEADS=block_heads,
            NORM=head_norm is not None,
            ROTATE=rotation is not None,
            DEPENDENT=dependent,
            num_warps=4,
            **({"launch_pdl": True} if dependent else {}),
        )

    def silu_and_mul(self, gate_up: Tensor) -> Tensor:
        from mini_sglang.backend.kernels.triton.elementwise_kernels import silu_and_mul

        rows, width = gate_up.shape[0], gate_up.shape[1] // 2
        out = gate_up.new_empty((rows, width))
        if rows:
            block = min(_BLOCK, power_of_two(width))
            silu_and_mul[(rows, -(-width // block))](
                gate_up, out, gate_up.stride(0), WIDTH=width, BLOCK=block, num_warps=4
            )
        return out

    def norm_linear(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, bias: Tensor | None
    ) -> Tensor:
        # What other programs of the launch read, none may write: a delta is added by ``norm``.
        if delta is not None or not few_rows.fits(weight, len(hidden)):
            return super().norm_linear(hidden, delta, norm, weight, bias)
        assert isinstance(weight, DenseWeight)
        return few_rows.product(hidden, weight, bias, norm, self._eps)

    def norm_gated(
        self, hidden: Tensor, delta: Tensor | None, norm: Tensor, weight: Weight, bias: Tensor | None
    ) -> Tensor:
        if delta is not None or not few_rows.fits(weight, len(hidden)):
            return super().norm_gated(hidden, delta, norm, weight, bias)
        assert isinstance(weight, DenseWeight)
        return few_rows.product(hidden, weight, bias, norm, self._eps, gated=True)

    def linear_add(self, x: Tensor, weight: Weight, bias: Tensor | None, hidden: Tensor) -> Tensor | None:
        if not few_rows.fits(weight, len(x)):
            return super().linear_add(x, weight, bias, hidden)
        assert isinstance(weight, DenseWeight)
        few_rows.product(x, weight, bias, residual=hidden)
        return None
