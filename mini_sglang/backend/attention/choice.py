"""``ATTN_IMPL`` over our pages: which of the implementations runs, or why the one asked for cannot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mini_sglang.backend.attention.base import PLAIN, Attention, AttentionForm
from mini_sglang.backend.attention.flash import FlashAttention
from mini_sglang.backend.attention.flashinfer import FlashInferAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.kernels.triton.available import why_no_triton
from mini_sglang.errors import InvalidValueError

OWN = ("auto", "paged")
"""The names that leave the choice among this stack's own to the machine."""


@dataclass(frozen=True, slots=True)
class Heads:
    """What one layer asks of its attention."""

    heads: int
    kv_heads: int
    key_dim: int
    value_dim: int
    form: AttentionForm = PLAIN


def choose_attention(
    setting: str,
    layers: Sequence[Heads],
    dtype: torch.dtype,
    device: torch.device,
    page_size: int,
    triton: bool,
) -> Attention | None:
    """The attention that ``ATTN_IMPL`` names, or Triton's where that is the best; None leaves it to the CPU's
    own.

    Args:
        dtype: of queries and KV.
        triton: whether ``KERNELS`` lets Triton's kernels run on this device.

    Raises:
        InvalidValueError: the machine, the model or the pages do not allow the one that is named.
    """
    if setting in ("sdpa", "eager"):
        return PagedAttention(fused=setting == "sdpa")
    if setting in OWN:
        return TritonAttention() if triton and _why_not_triton(layers, device) is None else None
    if setting == "triton":
        why = _why_not_triton(layers, device)
        attention: Attention = TritonAttention()
    elif setting == "flashinfer":
        why = FlashInferAttention.why_not(layers, dtype, device)
        attention = FlashInferAttention()
    else:
        why = FlashAttention.why_not(layers, dtype, device, page_size)
        attention = FlashAttention()
    if why is not None:
        raise InvalidValueError("ATTN_IMPL", setting, f"another one, such as auto, here: {why}")
    return attention


def _why_not_triton(layers: Sequence[Heads], device: torch.device) -> str | None:
    for layer in layers:
        if not TritonAttention.fit(layer.heads, layer.kv_heads, max(layer.key_dim, layer.value_dim)):
            return "Triton's kernel has heads of at most 512 numbers, and 128 of them to a KV head"
    return why_no_triton(device)
