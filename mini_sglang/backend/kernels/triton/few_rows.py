"""Products of few rows with a dense matrix, with the norm before and what comes after them in one launch.

Their twins in torch: ``DenseWeight.linear`` and ``models/operations.py``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.kernels.triton.available import dependent_launches
from mini_sglang.backend.kernels.triton.launch import few_rows_launch, power_of_two
from mini_sglang.backend.weights import DenseWeight, Weight

# Rows of a step that are multiplied so: one constant for all matrices, so that within it a row's bits do not
# depend on how many rows there are. Without tensor cores each row costs arithmetic of its own, which the
# loads of the weights no longer hide at four: an H100 is slower than with cuBLAS then.
FEW_ROWS = 2
# Numbers in 16 bytes, the widest load.
_LANES = 8
# A row that is normed lies in the registers of one program.
_MAX_COLUMNS = 1 << 15


def fits(weight: Weight, rows: int) -> bool:
    """Whether ``product`` takes ``weight``, at that number of rows."""
    return (
        isinstance(weight, DenseWeight)
        and 0 < rows <= FEW_ROWS
        and weight.dtype in (torch.bfloat16, torch.float16)
        and weight.tensor.is_contiguous()
        and weight.shape[1] % _LANES == 0
        and weight.shape[1] <= _MAX_COLUMNS
    )


def product(
    x: Tensor,
    weight: DenseWeight,
    bias: Tensor | None,
    norm: Tensor | None = None,
    eps: float = 0.0,
    gated: bool = False,
    residual: Tensor | None = None,
) -> Tensor:
    """``x @ W.T + bias`` in one launch, for what ``fits`` says.

    Args:
        x: ``[R, in_features]``, a row in one piece.
        norm: weights ``[in_features]`` of an RMSNorm of ``x``, which is left as it is.
        gated: the matrix is gate and up on top of each other; the result is SiLU of the one times the other.
        residual: ``[R, out_features]``, to which the products are added in place; it is what is returned.

    Returns:
        ``[R, out_features]``, half as wide where ``gated``.
    """
    from mini_sglang.backend.kernels.triton.few_rows_kernels import few_rows

    rows, columns = x.shape
    features = weight.shape[0] // 2 if gated else weight.shape[0]
    out = x.new_empty((rows, features)) if residual is None else residual
    launch = few_rows_launch(features, columns, gated)
    dependent = dependent_launches(x.device)
    options: dict[str, Any] = {"launch_pdl": True} if dependent else {}
    few_rows[(-(-features // launch.block_n),)](
        x,
        x if norm is None else norm,
        weight.tensor,
        x if bias is None else bias,
        out,
        out,
        rows,
        x.stride(0),
        out.stride(0),
        out.stride(0),
        eps,
        FEATURES=features,
        COLUMNS=columns,
        WIDTH=power_of_two(columns),
        NORM=norm is not None,
        BIAS=bias is not None,
        GATED=gated,
        ADD=residual is not None,
        ROWS=power_of_two(rows),
        BLOCK_N=launch.block_n,
        BLOCK_K=launch.block_k,
        LANES=_LANES,
        DEPENDENT=dependent,
        num_warps=launch.warps,
        **options,
    )
    return out
