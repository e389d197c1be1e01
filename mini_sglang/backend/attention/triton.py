"""Paged attention by Triton's kernels: decodes split over their positions, chunks over their rows."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.attention.tables import StepTables
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kernels.triton.available import dependent_launches, interpreted, shared_bytes
from mini_sglang.backend.kernels.triton.launch import (
    AttentionLaunch,
    attention_launch,
    chunk_launch,
    power_of_two,
)
from mini_sglang.backend.kv.pool import KVPool

_MAX_HEAD_DIM, _MAX_GROUP = 512, 128
# Chunks of no more queries are split over their positions, as decodes are.
_SHORT, _ANY = 32, 1 << 30


class TritonAttention:
    """``Attention`` on CUDA, over a pool of the queries' dtype, in every form and for heads that ``fit``.

    The page table, starts and lengths of a step, and what split sequences come to, lie in int32 and float32
    tensors that are made once and keep their addresses until a step needs larger ones. ``begin`` fills them
    and is not to be captured in a CUDA graph; what it returns is. Of what is captured only the grid is fixed,
    which may be larger than a step needs; a sequence of no rows is padding and gives nothing.

    Args:
        span: positions of a sequence that a program walks at least before the rest is another's.
        spans: into how many parts a sequence is split at most.
    """

    name = "triton"

    def __init__(self, span: int = 256, spans: int = 64) -> None:
        self.tables = StepTables()
        self.span, self.spans = span, spans
        self._partials: Tensor | None = None

    @staticmethod
    def fit(heads: int, kv_heads: int, head_dim: int) -> bool:
        return head_dim <= _MAX_HEAD_DIM and heads // kv_heads <= _MAX_GROUP

    def begin(self, batch: Batch, kv: KVPool) -> TritonStep:
        self.tables.fill(batch, kv.data.device)
        return TritonStep(self, batch, kv)

    def launch(
        self, rows: int, group: int, head_dim: int, itemsize: int, device: torch.device
    ) -> AttentionLaunch:
        """For sequences of at most ``rows`` queries."""
        return attention_launch(rows, group, head_dim, itemsize, shared_bytes(device), self.span, self.spans)

    def partials(
        self, rows: int, splits: int, value_dim: int, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Sums, peaks and weights of ``rows`` rows times heads, each in ``splits`` parts; layers share it."""
        count = rows * splits
        needed = count * (value_dim + 2)
        if self._partials is None or self._partials.numel() < needed or self._partials.device != device:
            self._partials = torch.empty(needed, dtype=torch.float32, device=device)
        sums, peaks, weights = torch.split_with_sizes(
            self._partials[:needed], (count * value_dim, count, count)
        )
        return sums, peaks, weights


@dataclass(frozen=True, slots=True)
class _Part:
    """A launch for those of ``sequences`` sequences from ``first`` on that have ``fewest`` to ``most`` rows.

    ``rows`` and ``positions`` are the most that one of them has.
    """

    first: int
    sequences: int
    fewest: int
    most: int
    rows: int
    positions: int


class TritonStep:
    """One step of ``TritonAttention``; see ``StepAttention``."""

    def __init__(self, attention: TritonAttention, batch: Batch, kv: KVPool) -> None:
        self._attention = attention
        self._kv = kv
        counts = [
            stop - start for start, stop in zip(batch.query_starts, batch.query_starts[1:], strict=False)
        ]
        decodes, sequences = batch.num_decodes, len(batch.seq_lens)
        self._parts: list[_Part] = []
        for first, stop, fewest, most in (
            (0, decodes, 1, 1),
            (decodes, sequences, 2, _SHORT),
            (decodes, sequences, _SHORT + 1, _ANY),
        ):
            own = [i for i in range(first, stop) if fewest <= counts[i] <= most]
            if own:
                rows, positions = (max(numbers[i] for i in own) for numbers in (counts, batch.seq_lens))
                first, stop = own[0], own[-1] + 1
                self._parts.append(_Part(first, stop - first, fewest, most, rows, positions))

    def __call__(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        form: AttentionForm = PLAIN,
    ) -> Tensor:
        rows, heads, _ = query.shape
        if query.stride(2) != 1:
            query = query.contiguous()
        out = query.new_empty((rows, heads * value.shape[2]))
        for part in self._parts:
            if part.most > _SHORT:
                self._attend_chunk(layer, window, query, out, form, part)
            else:
                self._attend(layer, window, query, out, form, part)
        return out

    def _attend_chunk(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        out: Tensor,
        form: AttentionForm,
        part: _Part,
    ) -> None:
        from mini_sglang.backend.kernels.triton.chunk_kernels import attend_chunk

        keys, values = self._kv.keys_values(layer, self._kv.rows(layer))
        heads, key_dim = query.shape[1:]
        kv_heads, value_dim = values.shape[1:]
        # A slot's values lie beside its keys.
        assert keys.stride(0) == values.stride(0)
        group = heads // kv_heads
        shared = shared_bytes(query.device)
        chosen = chunk_launch(group, max(key_dim, value_dim), query.element_size(), shared)
        tiles = -(-part.rows // chosen.queries)
        tables = self._attention.tables
        scale = key_dim**-0.5 if form.scale is None else form.scale
        attend_chunk[(kv_heads * part.sequences * tiles,)](
            query,
            keys,
            values,
            out,
            out if form.sinks is None else form.sinks,
            tables.page_table,
            tables.query_starts,
            tables.seq_lens,
            part.first,
            part.sequences,
            kv_heads,
            part.fewest,
            tables.page_table.stride(0),
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(1),
            out.stride(0),
            window or 0,
            scale if form.softcap is not None else scale * math.log2(math.e),
            form.softcap or 1.0,
            GROUP=group,
            KEY_DIM=key_dim,
            VALUE_DIM=value_dim,
            KEY_BLOCK=max(16, power_of_two(key_dim)),
            VALUE_BLOCK=max(16, power_of_two(value_dim)),
            PAGE=self._kv.page_size,
            QUERIES=chosen.queries,
            BLOCK_M=chosen.block_m,
            BLOCK_N=chosen.block_n,
            WINDOWED=window is not None,
            SOFTCAP=form.softcap is not None,
            SINKS=form.sinks is not None,
            WIDE=query.dtype == torch.bfloat16 and interpreted(),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            maxnreg=chosen.registers,
        )

    def _attend(
        self,
        layer: int,
        window: int | None,
        query: Tensor,
        out: Tensor,
        form: AttentionForm,
        part: _Part,
    ) -> None:
        from mini_sglang.backend.kernels.triton.attention_kernels import attend, merge

        keys, values = self._kv.keys_values(layer, self._kv.rows(layer))
        rows, heads, key_dim = query.shape
        kv_heads, value_dim = values.shape[1:]
        group = heads // kv_heads
        attention, tables, device = self._attention, self._attention.tables, query.device
        # By what such sequences have at most, not by what these have: a row's tile is the same in any
        # company.
        chosen = attention.launch(part.most, group, max(key_dim, value_dim), query.element_size(), device)
        tiles = -(-part.rows // chosen.queries)
        seen = part.positions
        if window is not None:
            seen = min(seen, window + chosen.queries + chosen.block_n)
        splits = min(chosen.spans, -(-seen // chosen.span))
        sums = peaks = weights = out
        if splits > 1:
            sums, peaks, weights = attention.partials(rows * heads, splits, value_dim, device)
        scale = key_dim**-0.5 if form.scale is None else form.scale
        sinks = out if form.sinks is None else form.sinks
        tile: dict[str, Any] = {
            "GROUP": group,
            "VALUE_DIM": value_dim,
            "VALUE_BLOCK": max(16, power_of_two(value_dim)),
            "QUERIES": chosen.queries,
            "BLOCK_M": chosen.block_m,
            "BLOCK_N": chosen.block_n,
            "SPAN": chosen.span,
            "SPANS": chosen.spans,
            "WINDOWED": window is not None,
            "SINKS": form.sinks is not None,
            "DEPENDENT": dependent_launches(device),
        }
        if tile["DEPENDENT"]:
            tile["launch_pdl"] = True
        attend[(tiles * splits, kv_heads, part.sequences)](
            query,
            keys,
            values,
            out,
            sums,
            peaks,
            weights,
            sinks,
            tables.page_table,
            tables.query_starts,
            tables.seq_lens,
            part.first,
            part.fewest,
            part.most,
            tables.page_table.stride(0),
            query.stride(0),
            query.stride(1),
            keys.stride(0),
            keys.stride(1),
            values.stride(0),
            values.stride(1),
            out.stride(0),
            heads,
            splits,
            window or 0,
            scale if form.softcap is not None else scale * math.log2(math.e),
            form.softcap or 1.0,
            KEY_DIM=key_dim,
            KEY_BLOCK=max(16, power_of_two(key_dim)),
            PAGE=self._kv.page_size,
            SOFTCAP=form.softcap is not None,
            SPLIT=splits > 1,
            WIDE=query.dtype == torch.bfloat16 and interpreted(),
            num_warps=chosen.warps,
            num_stages=chosen.stages,
            **tile,
        )
        if splits > 1:
            merge[(tiles, kv_heads, part.sequences)](
                sums,
                peaks,
                weights,
                sinks,
                out,
                tables.query_starts,
                tables.seq_lens,
                part.first,
                part.fewest,
                part.most,
                out.stride(0),
                heads,
                splits,
                window or 0,
                num_warps=4,
                **tile,
            )
