"""``flash_attn`` and ``flashinfer`` as their documentation describes them, slowly, in float64."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, scale: float | None, left: int, softcap: float, causal: bool
) -> Tensor:
    """One sequence: ``[t, heads, d]`` over ``[L, kv_heads, d]``, aligned at the last of both."""
    group = query.shape[1] // keys.shape[1]
    keys, values = (part.double().repeat_interleave(group, 1) for part in (keys, values))
    scores = torch.einsum("thd,lhd->htl", query.double(), keys) * (scale or query.shape[2] ** -0.5)
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    at = torch.arange(len(query))[:, None] + len(keys) - len(query)
    where = torch.arange(len(keys))
    seen = (where <= at) if causal else torch.ones(len(query), len(keys), dtype=torch.bool)
    if left >= 0:
        seen = seen & (where >= at - left)
    scores = scores.masked_fill(~seen, -torch.inf)
    return torch.einsum("htl,lhd->thd", scores.softmax(-1), values).to(query.dtype)


def _pages(cache: Tensor, pages: Tensor, length: int) -> Tensor:
    assert pages.dtype == torch.int32 and cache.stride(-1) == 1
    return cache[pages.long()].flatten(0, 1)[:length]


def flash_attn() -> ModuleType:
    module = ModuleType("flash_attn")

    def flash_attn_with_kvcache(
        q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, block_table: Tensor,
        softmax_scale: float | None, causal: bool, window_size: tuple[int, int], softcap: float,
    ) -> Tensor:  # fmt: skip
        assert q.shape[1] == 1 and len(q) == len(cache_seqlens) == len(block_table)
        assert cache_seqlens.dtype == torch.int32 and k_cache.shape[1] % 256 == 0
        outs = []
        for row, length, table in zip(q, cache_seqlens.tolist(), block_table, strict=True):
            count = -(-length // k_cache.shape[1])
            keys, values = (_pages(cache, table[:count], length) for cache in (k_cache, v_cache))
            outs.append(_attend(row, keys, values, softmax_scale, window_size[0], softcap, causal))
        return torch.stack(outs)

    def flash_attn_varlen_func(
        q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int,
        max_seqlen_k: int, *, softmax_scale: float | None, causal: bool, window_size: tuple[int, int],
        softcap: float, block_table: Tensor,
    ) -> Tensor:  # fmt: skip
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        assert int(cu_seqlens_q[0]) == 0 and int(cu_seqlens_q[-1]) == len(q)
        assert len(cu_seqlens_q) == len(cu_seqlens_k) == len(block_table) + 1
        rows, lengths = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
        assert (max(rows), max(lengths)) == (max_seqlen_q, max_seqlen_k)
        outs = []
        for part, length, table in zip(q.split(rows), lengths, block_table, strict=True):
            count = -(-length // k.shape[1])
            keys, values = (_pages(cache, table[:count], length) for cache in (k, v))
            outs.append(_attend(part, keys, values, softmax_scale, window_size[0], softcap, causal))
        return torch.cat(outs)

    module.flash_attn_with_kvcache = flash_attn_with_kvcache  # type: ignore[attr-defined]
    module.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    return module


class _Wrapper:
    def __init__(self, float_workspace_buffer: Tensor, kv_layout: str = "NHD", **given: Any) -> None:
        assert float_workspace_buffer.dtype == torch.uint8 and kv_layout == "NHD"
        self.tensor_cores = given.pop("use_tensor_cores", None)
        assert not given
        self.plans = 0

    def _keep(
        self, rows: Tensor, indptr: Tensor, indices: Tensor, last: Tensor, heads: tuple[int, int, int],
        page_size: int, causal: bool, how: dict[str, Any],
    ) -> None:  # fmt: skip
        assert indptr.dtype == indices.dtype == last.dtype == torch.int32
        assert len(indptr) == len(last) + 1 == len(rows) and int(indptr[0]) == 0
        assert int(indptr[-1]) == len(indices)
        assert bool((last >= 1).all()) and bool((last <= page_size).all())
        self.plans += 1
        self.rows, self.indptr, self.indices, self.last = rows, indptr, indices, last
        self.heads, self.page_size, self.causal, self.how = heads, page_size, causal, how

    def run(self, q: Tensor, paged_kv_cache: tuple[Tensor, Tensor]) -> Tensor:
        keys, values = paged_kv_cache
        assert keys.shape[1:] == (self.page_size, *self.heads[1:]) and q.shape[1] == self.heads[0]
        assert q.dtype == self.how["q_data_type"] and keys.dtype == self.how["kv_data_type"]
        outs = []
        ends = self.indptr.tolist()
        for i, part in enumerate(q.split(self.rows.diff().tolist())):
            pages = self.indices[ends[i] : ends[i + 1]]
            length = (len(pages) - 1) * self.page_size + int(self.last[i])
            own = (_pages(cache, pages, length) for cache in (keys, values))
            how = self.how["sm_scale"], self.how["window_left"], self.how["logits_soft_cap"] or 0.0
            outs.append(_attend(part, *own, *how, self.causal))
        return torch.cat(outs)


class _Decode(_Wrapper):
    def plan(
        self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int,
        head_dim: int, page_size: int, **how: Any,
    ) -> None:  # fmt: skip
        # The kernels without tensor cores are made for few sizes of a group.
        assert self.tensor_cores or num_qo_heads == num_kv_heads
        heads = num_qo_heads, num_kv_heads, head_dim
        rows = torch.arange(len(indptr))
        self._keep(rows, indptr, indices, last_page_len, heads, page_size, True, how)


class _Prefill(_Wrapper):
    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, *, causal: bool, **how: Any,
    ) -> None:  # fmt: skip
        assert qo_indptr.dtype == torch.int32
        heads = num_qo_heads, num_kv_heads, head_dim_qk
        table = paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len
        self._keep(qo_indptr, *table, heads, page_size, causal, how)


def flashinfer() -> ModuleType:
    module = ModuleType("flashinfer")
    module.BatchDecodeWithPagedKVCacheWrapper = _Decode  # type: ignore[attr-defined]
    module.BatchPrefillWithPagedKVCacheWrapper = _Prefill  # type: ignore[attr-defined]
    return module
