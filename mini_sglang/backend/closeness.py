"""How far the results of two ways to compute the same are apart, for proofs at load."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

HIDDEN_TOLERANCE: Mapping[torch.dtype, float] = MappingProxyType(
    {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.1}
)
"""Of hidden states computed in a dtype: what rounding and another order of summation explain."""


def relative_error(ours: Tensor, own: Tensor, size: Tensor | None = None) -> float:
    """The root mean square of the difference, over that of ``size``, which is ``own`` by itself.

    Where something is not a number neither is the result, which is then not below a tolerance either.
    """
    scale = own if size is None else size
    return float((ours - own).square().mean().sqrt() / scale.square().mean().sqrt().clamp_min(1e-30))
