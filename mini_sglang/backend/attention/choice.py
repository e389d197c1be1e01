"""``ATTN_IMPL`` over our pages: which of the implementations runs, or why the one asked for cannot."""

from __future__ import annotations

from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.errors import InvalidValueError


def torch_attention(setting: str) -> PagedAttention | None:
    """The attention that ``ATTN_IMPL`` names among torch's; ``None`` where the fastest may be taken.

    Raises:
        InvalidValueError: one that does not read our pages.
    """
    if setting == "flash_attention_2":
        raise InvalidValueError(
            "ATTN_IMPL",
            setting,
            "auto, paged, sdpa or eager for this model: flash_attn does not read this stack's pages",
        )
    return PagedAttention(fused=setting == "sdpa") if setting in ("sdpa", "eager") else None
