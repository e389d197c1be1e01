"""Paged attention by the ``flash_attn`` package (FlashAttention 2; Dao 2023)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.attention.packages import pages_of, why_no_package
from mini_sglang.backend.attention.tables import StepTables
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.device import to_device
from mini_sglang.backend.kv.pool import KVPool

if TYPE_CHECKING:
    from mini_sglang.backend.attention.choice import Heads

# Tokens that a page's are a multiple of.
_PAGE = 256


class FlashAttention:
    """``Attention`` on CUDA in fp16 and bf16, over pages of whole 256 tokens.

    Which kernel the package launches depends on a step's longest sequence: not for CUDA graphs.
    """

    name = "flash_attention_2"
    page_multiple = _PAGE

    def __init__(self) -> None:
        self.tables = StepTables()

    @staticmethod
    def why_not(
        layers: Sequence[Heads], dtype: torch.dtype, device: torch.device, page_size: int
    ) -> str | None:
        """What keeps it from this model; None if nothing does."""
        why = why_no_package("flash_attn", layers, dtype, device)
        if why is not None:
            return why
        if any(layer.key_dim % 8 or layer.key_dim > 256 for layer in layers):
            return "flash_attn takes head sizes that are multiples of 8, up to 256"
        if page_size % _PAGE:
            return f"flash_attn reads pages of {_PAGE} tokens, and PAGE_SIZE_TOKENS is {page_size}"
        return None

    def begin(self, batch: Batch, kv: KVPool) -> FlashStep:
        self.tables.fill(batch, kv.data.device)
        return FlashStep(self.tables, batch, kv)


class FlashStep:
    """One step of ``FlashAttention``; see ``StepAttention``."""

    def __init__(self, tables: StepTables, batch: Batch, kv: KVPool) -> None:
        self._kv = kv
        self._decodes = decodes = batch.num_decodes
        self._sequences = len(batch.seq_lens)
        pages = batch.page_table.shape[1]
        self._table = tables.page_table[: self._sequences, :pages]
        self._lens = tables.seq_lens[: self._sequences]
        if decodes == self._sequences:
            return
        lengths = batch.seq_lens[decodes:]
        starts = [start - decodes for start in batch.query_starts[decodes:]]
        ends = [0, *accumulate(lengths)]
        sent = to_device(torch.tensor(starts + ends, dtype=torch.int32), kv.data.device)
        self._starts, self._ends = sent.view(2, -1).unbind()
        self._most_rows = max(stop - start for start, stop in pairwise(starts))
        self._most_positions = max(lengths)

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache

        kv, decodes = self._kv, self._decodes
        keys, values = pages_of(kv, layer)
        how = {
            "softmax_scale": form.scale,
            "causal": True,
            "window_size": (-1, -1) if window is None else (window - 1, 0),
            "softcap": form.softcap or 0.0,
        }
        parts: list[Tensor] = []
        if decodes:
            parts.append(
                flash_attn_with_kvcache(
                    query[:decodes].unsqueeze(1),
                    keys,
                    values,
                    cache_seqlens=self._lens[:decodes],
                    block_table=self._table[:decodes],
                    **how,
                ).squeeze(1)
            )
        if decodes < self._sequences:
            parts.append(
                flash_attn_varlen_func(
                    query[decodes:],
                    keys,
                    values,
                    self._starts,
                    self._ends,
                    self._most_rows,
                    self._most_positions,
                    block_table=self._table[decodes:],
                    **how,
                )
            )
        return (parts[0] if len(parts) == 1 else torch.cat(parts)).flatten(1)
