"""Stands in for ``sgl_kernel`` in sglang's environment: its CPU build is not on PyPI.

Copied there as ``sgl_kernel.py``. Without matrix units sglang's CPU path calls one function of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

import torch

STAND_IN = True


def assign_req_to_token_pool_cpu(
    req_pool_indices: torch.Tensor,
    req_to_token: torch.Tensor,
    start_offset: torch.Tensor,
    end_offset: torch.Tensor,
    out_cache_loc: torch.Tensor,
    stride: int,
) -> None:
    """Write each request's slice of ``out_cache_loc`` into its row of ``req_to_token``, in place.

    Args:
        req_pool_indices: (requests,), the row of each.
        req_to_token: (rows, stride).
        start_offset: (requests,), where in its row a request's slice starts; ``end_offset``: where it ends.
        out_cache_loc: the slices, one after the other.
        stride: columns of ``req_to_token``.
    """
    at = 0
    bounds = zip(req_pool_indices.tolist(), start_offset.tolist(), end_offset.tolist(), strict=True)
    for row, start, end in bounds:
        count = end - start
        req_to_token[row, start:end] = out_cache_loc[at : at + count].to(req_to_token.dtype)
        at += count


def __getattr__(name: str) -> Callable[..., NoReturn]:
    """Any other CPU kernel: it can be imported, as sglang does at once, and refuses to be called."""
    if not name.endswith("_cpu"):
        raise AttributeError(f"module 'sgl_kernel' has no attribute {name!r}")

    def refuse(*args: object, **keywords: object) -> NoReturn:
        raise NotImplementedError(f"sgl_kernel.{name} is not in the stand-in for sglang's CPU kernels")

    return refuse
