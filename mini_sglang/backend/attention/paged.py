"""Paged attention in plain torch: the reference, and the one that runs everywhere.

Decodes run together on a padded copy of their pages; chunks run one by one. Grouped queries share
their KV head without repeating it: decodes put the group where torch expects queries, chunks expand
the KV head with stride 0.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.batch import Batch, IntArray
from mini_sglang.backend.kv.pool import KVPool

# Rows of a chunk that share one mask; bounds the mask at this times the context.
_QUERY_BLOCK = 512


class PagedAttention:
    """The torch implementation of ``Attention``.

    Args:
        fused: use torch's own attention where it computes the form; without, everything is done step by step.
    """

    def __init__(self, fused: bool = True) -> None:
        self.fused = fused

    def begin(self, batch: Batch, kv: KVPool) -> PagedStep:
        return PagedStep(batch, kv, self.fused)


class PagedStep:
    """One step of ``PagedAttention``; see ``StepAttention``."""

    def __init__(self, batch: Batch, kv: KVPool, fused: bool) -> None:
        self._batch = batch
        self._kv = kv
        self._fused = fused
        self._plans: dict[tuple[int | None, bool], _Plan] = {}

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        which = window, form.fused and self._fused
        plan = self._plans.get(which)
        if plan is None:
            plan = self._plans[which] = _Plan.make(self._batch, self._kv, *which)
        rows, heads, head_dim = query.shape
        kv_heads, width = key.shape[1], heads * value.shape[2]
        query = query.view(rows, kv_heads, heads // kv_heads, head_dim)
        decodes = self._batch.num_decodes
        if decodes == rows:
            assert plan.decode is not None
            return self._decode(plan, plan.decode, layer, query, form).reshape(rows, width)
        out = query.new_empty((*query.shape[:3], value.shape[2]))
        if plan.decode is not None:
            out[:decodes] = self._decode(plan, plan.decode, layer, query[:decodes], form)
        for chunk in plan.chunks:
            first, stop = chunk.first_row, chunk.stop_row
            if chunk.source is None:
                keys, values = key[first:stop], value[first:stop]
            else:
                keys, values = chunk.source.read(self._kv, layer)
            _attend_chunk(chunk, plan, query[first:stop], keys, values, out[first:stop], form)
        return out.view(rows, width)

    def _decode(self, plan: _Plan, decode: _Decode, layer: int, query: Tensor, form: AttentionForm) -> Tensor:
        """``query`` ``[B, kv_heads, group, head_dim]`` to the same shape, of the values' width."""
        sequences = query.shape[0]
        keys, values = (
            part.view(sequences, -1, *part.shape[1:]).transpose(1, 2)
            for part in decode.source.read(self._kv, layer)
        )
        if plan.fused:
            return scaled_dot_product_attention(query, keys, values, attn_mask=decode.mask, scale=form.scale)
        sinks = None if form.sinks is None else form.sinks.view(1, *query.shape[1:3], 1)
        return _weigh(query, keys, values, decode.mask, form, sinks)


@dataclass(slots=True)
class _Source:
    """Where positions lie in the pool: one run of slots, or pages to gather and cut to ``stop - first``."""

    first: int
    stop: int
    pages: Tensor | None = None
    buffer: Tensor | None = None

    @classmethod
    def of(cls, pages: IntArray, first: int, stop: int, kv: KVPool) -> _Source:
        """Slots ``first`` to ``stop``, counted from the start of ``pages``."""
        if np.all(pages[1:] - pages[:-1] == 1):
            offset = int(pages[0]) * kv.page_size
            return cls(offset + first, offset + stop)
        return cls(first, stop, torch.from_numpy(pages.copy()).to(kv.data.device), kv.buffer(len(pages)))

    def read(self, kv: KVPool, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values, ``[stop - first, kv_heads, …]``; what a later layer reads may overwrite them."""
        if self.pages is None or self.buffer is None:
            return kv.keys_values(layer, kv.run(layer, self.first, self.stop))
        return kv.keys_values(layer, kv.gather(layer, self.pages, self.buffer)[self.first : self.stop])


@dataclass(slots=True)
class _Decode:
    source: _Source
    mask: Tensor | None


@dataclass(slots=True)
class _Chunk:
    """Rows ``first_row`` to ``stop_row`` at position ``start`` on; its keys begin at ``first_key``."""

    first_row: int
    stop_row: int
    start: int
    first_key: int
    source: _Source | None
    causal: bool


@dataclass(slots=True)
class _Plan:
    """What the layers with one window share. ``band`` is the mask that blocks of chunks are cut from.

    ``fused`` is whether torch's own attention computes it.
    """

    window: int | None
    fused: bool
    decode: _Decode | None
    chunks: list[_Chunk]
    band: Tensor | None
    band_past: int

    @classmethod
    def make(cls, batch: Batch, kv: KVPool, window: int | None, fused: bool) -> _Plan:
        decode = _plan_decode(batch, kv, window) if batch.num_decodes else None
        chunks = [
            _plan_chunk(batch, kv, window, fused, i) for i in range(batch.num_decodes, len(batch.seq_lens))
        ]
        masked = [chunk for chunk in chunks if not chunk.causal]
        if not masked:
            return cls(window, fused, decode, chunks, None, 0)
        past = max(chunk.start + chunk.stop_row - chunk.first_row for chunk in masked)
        past = min(past, window) if window else past
        rows = min(_QUERY_BLOCK, max(chunk.stop_row - chunk.first_row for chunk in masked))
        return cls(window, fused, decode, chunks, _band(rows, past, window, kv.data), past)


def _plan_decode(batch: Batch, kv: KVPool, window: int | None) -> _Decode:
    count, size = batch.num_decodes, batch.page_size
    lengths = np.array(batch.seq_lens[:count], dtype=np.int64)
    lowest = np.zeros_like(lengths) if window is None else np.maximum(lengths - window, 0)
    first, stop = lowest // size, -(-lengths // size)
    if count == 1:
        begin, end = int(first[0]), int(stop[0])
        pages, skip = batch.page_table[0, begin:end], begin * size
        return _Decode(_Source.of(pages, int(lowest[0]) - skip, int(lengths[0]) - skip, kv), None)
    width = int((stop - first).max())
    index = first[:, None] + np.arange(width)
    # Padding repeats a page of the same sequence: finite where the sequence itself is.
    index = np.where(index < stop[:, None], index, first[:, None])
    pages = np.take_along_axis(batch.page_table[:count], index, axis=1).ravel()
    position = (first * size)[:, None] + np.arange(width * size)
    seen = (position < lengths[:, None]) & (position >= lowest[:, None])
    source = _Source.of(pages, 0, len(pages) * size, kv)
    if seen.all():
        return _Decode(source, None)
    mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32(-np.inf)))
    return _Decode(source, mask.to(kv.data.device, kv.data.dtype)[:, None, None])


def _plan_chunk(batch: Batch, kv: KVPool, window: int | None, fused: bool, i: int) -> _Chunk:
    first_row, stop_row = batch.query_starts[i], batch.query_starts[i + 1]
    length = batch.seq_lens[i]
    start = length - (stop_row - first_row)
    if start == 0:
        # Unfused, a mask bounds the scores to a block of rows at a time.
        causal = fused and (window is None or length <= window)
        return _Chunk(first_row, stop_row, 0, 0, None, causal)
    first_key = 0 if window is None else max(0, start - window + 1)
    begin = first_key // batch.page_size
    pages = batch.page_table[i, begin : -(-length // batch.page_size)]
    skip = begin * batch.page_size
    source = _Source.of(pages, first_key - skip, length - skip, kv)
    return _Chunk(first_row, stop_row, start, first_key, source, False)


def _band(rows: int, past: int, window: int | None, like: Tensor) -> Tensor:
    """A mask ``[rows, past + rows]``: row r sees column c where c - past is in (r - window, r]."""
    distance = torch.arange(rows)[:, None] - torch.arange(-past, rows)
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    band = torch.zeros(hidden.shape, dtype=like.dtype).masked_fill_(hidden, float("-inf"))
    return band.to(like.device)


def _attend_chunk(
    chunk: _Chunk,
    plan: _Plan,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    form: AttentionForm,
) -> None:
    """One chunk, in blocks of rows.

    Args:
        query, out: ``[t, kv_heads, group, head_dim]``, ``out`` of the values' width, for the result.
        keys, values: ``[L, kv_heads, head_dim]``, from ``chunk.first_key`` on.
    """
    if chunk.causal:
        _attend(query, keys, values, out, None, form, plan.fused)
        return
    assert plan.band is not None
    for first in range(0, len(query), _QUERY_BLOCK):
        stop = min(first + _QUERY_BLOCK, len(query))
        position = chunk.start + first
        lowest = 0 if plan.window is None else max(0, position - plan.window + 1)
        past = position - lowest
        mask = plan.band[: stop - first, plan.band_past - past : plan.band_past + stop - first]
        # CUDA's fused attention reads each row in vectors, from where it begins.
        mask = mask.clone(memory_format=torch.contiguous_format)
        seen = slice(lowest - chunk.first_key, chunk.start + stop - chunk.first_key)
        _attend(query[first:stop], keys[seen], values[seen], out[first:stop], mask, form, plan.fused)


def _attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    out: Tensor,
    mask: Tensor | None,
    form: AttentionForm,
    fused: bool,
) -> None:
    group = query.shape[2]
    heads = query.permute(1, 2, 0, 3)
    keys = keys.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    values = values.transpose(0, 1).unsqueeze(1).expand(-1, group, -1, -1)
    if fused:
        result = scaled_dot_product_attention(
            heads, keys, values, attn_mask=mask, is_causal=mask is None, scale=form.scale
        )
    else:
        sinks = None if form.sinks is None else form.sinks.view(*heads.shape[:2], 1, 1)
        result = _weigh(heads, keys, values, mask, form, sinks)
    out.copy_(result.permute(2, 0, 1, 3))


def _weigh(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    form: AttentionForm,
    sinks: Tensor | None,
) -> Tensor:
    """Attention step by step, for what torch's own does not do; ``sinks`` are like a column of scores."""
    scale = query.shape[-1] ** -0.5 if form.scale is None else form.scale
    scores = (query @ keys.transpose(-1, -2)).float() * scale
    if form.softcap is not None:
        scores = torch.tanh(scores / form.softcap) * form.softcap
    if mask is not None:
        scores += mask
    if sinks is not None:
        scores = torch.cat((scores, sinks.float().expand(*scores.shape[:-1], 1)), -1)
    weights = scores.softmax(-1)[..., : keys.shape[-2]]
    return weights.to(values.dtype) @ values
