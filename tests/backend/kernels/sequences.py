"""Sequences of random keys, values and queries, laid out in a KV pool by hand, and attention over them."""

from __future__ import annotations

from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.kernels.jobs import Attention, SequenceTable
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kv.pool import TILE, KVPool

KV_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.int8)
KEYS = 64
"""Keys of a block, whose weights are rounded together beside int8."""
# A number of positions from first to last of a sequence, its rows in one step.
Part = tuple["Sequence", int, int]


class Sequence:
    """Keys, values and queries of every position of one sequence, for steps of any cut.

    Attributes:
        query: ``[length, heads, head_dim]`` float32.
        stored: the rows as the pool has them, uint8 ``[length, bytes]``.
        exact: the numbers that those bytes are, float64 ``[length, 2, kv_heads, head_dim]``.
    """

    def __init__(
        self, shape: tuple[int, int, int], length: int, seed: int, dtype: torch.dtype = torch.float32
    ) -> None:
        heads, self.kv_heads, self.head_dim = shape
        self.dtype = dtype
        generator = torch.Generator().manual_seed(seed)
        self.query = torch.randn(length, heads, self.head_dim, generator=generator) * 2
        self.keep(torch.randn(length, 2, self.kv_heads, self.head_dim, generator=generator) * 2)

    def keep(self, kv: Tensor) -> None:
        """Round keys and values ``[length, 2, kv_heads, head_dim]`` to the dtype."""
        if self.dtype != torch.int8:
            rounded = kv.to(self.dtype)
            self.stored, self.exact = rounded.flatten(1).view(torch.uint8), rounded.double()
            return
        scales = kv.abs().amax(-1, keepdim=True) / 127
        codes = (kv / scales).round().nan_to_num(0).to(torch.int8)
        parts = [codes.flatten(1), scales.flatten(1)]
        self.stored = torch.cat([part.view(torch.uint8) for part in parts], 1)
        self.exact = codes.double() * scales.double()
        self.scales = scales.double()

    def attended(
        self, rows: list[int], window: int | None = None, rounded: str = ""
    ) -> tuple[Tensor, Tensor]:
        """What ``rows`` get, by a softmax in float64: ``[R, heads * head_dim]``, and how far they may be off.

        Args:
            rounded: to what queries and the softmax's weights are rounded: bfloat16, or whole, to 32767
                steps of each head's and of each block's largest.
        """
        heads = self.query.shape[1]
        owner = torch.arange(heads) // (heads // self.kv_heads)
        query = self.query.double()
        if rounded == "bfloat16":
            query = self.query.bfloat16().double()
        elif rounded == "whole":
            largest = self.query.abs().amax(-1, keepdim=True)
            query = (self.query * (32767 / largest)).round().double() * (largest / 32767).double()
        keys, values = self.exact[:, :, owner].unbind(1)
        outs, slacks = [], []
        for row in rows:
            seen = slice(0 if window is None else max(0, row - window + 1), row + 1)
            scores = torch.einsum("hd,khd->hk", query[row], keys[seen]) * self.head_dim**-0.5
            weights = scores.softmax(-1)
            outs.append(torch.einsum("hk,khd->hd", weights, values[seen]).flatten())
            slack = torch.zeros_like(outs[-1])
            if rounded == "bfloat16":
                slack = 2.0**-8 * torch.einsum("hk,khd->hd", weights, values[seen].abs()).flatten()
            elif rounded == "whole":
                scales = self.scales[seen, 1][:, owner, 0]
                codes = (values[seen] / scales.unsqueeze(-1)).nan_to_num(0).abs()
                cuts = [KEYS - seen.start % KEYS, *[KEYS] * (row // KEYS + 1)]
                first = 0
                for count in cuts:
                    part = slice(first, first := min(first + count, len(codes)))
                    if part.start == part.stop:
                        break
                    steps = (weights[:, part] * scales[part].T).amax(1) / 32767
                    slack += 0.51 * (steps.unsqueeze(-1) * codes[part].sum(0)).flatten()
            slacks.append(slack)
        out = torch.stack(outs)
        return out, torch.stack(slacks) + 2e-5 * (1 + out.abs())


def attend(
    kernels: NativeKernels, parts: list[Part], page_size: int, window: int | None, seed: int
) -> list[Tensor]:
    """One step: of each sequence the rows from first to last, its pages scattered over a pool of NaN.

    Where the kernels read tiles too, those must give the same bits.
    """
    out = _attend(kernels, parts, page_size, window, seed, tiled=False)
    if parts[0][0].dtype in kernels.tiled_dtypes and page_size % TILE == 0:
        again = _attend(kernels, parts, page_size, window, seed, tiled=True)
        assert torch.equal(out.nan_to_num(7.5), again.nan_to_num(7.5))
    return list(out.split([last - first for _, first, last in parts]))


def tiles(kv: KVPool, rows: Tensor) -> Tensor:
    """Rows as ``kv`` would have them without tiles, ``[16 n, bytes]``, in the order of tiles, ``[n, bytes]``.

    Of keys pairs of numbers of each row, of values pairs of rows; of int8 each head after its scales.
    """
    count = 2 * kv.kv_heads * kv.head_dim
    scaled = kv.dtype == torch.int8
    numbers = (rows[:, :count] if scaled else rows).contiguous().view(kv.dtype)
    numbers = numbers.view(-1, TILE, 2, kv.kv_heads, kv.head_dim)
    keys, values = numbers.unbind(2)
    keys = keys.unflatten(-1, (-1, 2)).permute(0, 2, 3, 1, 4)
    values = values.unflatten(1, (-1, 2)).permute(0, 3, 1, 4, 2)
    # [n, 2, kv_heads, bytes]
    heads = torch.stack([part.flatten(2).contiguous().view(torch.uint8) for part in (keys, values)], 1)
    if scaled:
        scales = rows[:, count:].contiguous().view(torch.float32).view(-1, TILE, 2, kv.kv_heads)
        heads = torch.cat([scales.permute(0, 2, 3, 1).contiguous().view(torch.uint8), heads], -1)
    return heads.flatten(1)


def _attend(
    kernels: NativeKernels, parts: list[Part], page_size: int, window: int | None, seed: int, tiled: bool
) -> Tensor:
    counts = [-(-last // page_size) for _, _, last in parts]
    some = parts[0][0]
    kv = KVPool(
        num_layers=1,
        num_pages=sum(counts),
        page_size=page_size,
        kv_heads=some.kv_heads,
        head_dim=some.head_dim,
        dtype=some.dtype,
        device=torch.device("cpu"),
        tiled=tiled,
    )
    # All bits set: NaN as a number of every dtype, and as a scale.
    kv.data.view(torch.uint8).fill_(255)
    order = np.random.default_rng(seed).permutation(sum(counts))
    pages = np.zeros((len(parts), max(counts)), dtype=np.int64)
    taken = 0
    for row, count, (sequence, _, last) in zip(pages, counts, parts, strict=True):
        row[:count] = order[taken : taken + count]
        taken += count
        if tiled:
            # The last page is not full: a step that opens it clears it.
            whole = torch.zeros(count * page_size, sequence.stored.shape[1], dtype=torch.uint8)
            whole[:last] = sequence.stored[:last]
            by_page = kv.rows(0).view(torch.uint8).view(kv.num_pages, -1)
            by_page[torch.from_numpy(row[:count])] = tiles(kv, whole).view(count, -1)
            continue
        slots = (row[:count, None] * page_size + np.arange(page_size)).ravel()[:last]
        kv.rows(0).view(torch.uint8)[torch.from_numpy(slots)] = sequence.stored[:last]
    rows = [last - first for _, first, last in parts]
    table = SequenceTable()
    table.set(pages, [0, *accumulate(rows)], [last for _, _, last in parts])
    # Queries lie among keys and values, as in a fused product.
    heads = some.query.shape[1]
    wide = torch.full((sum(rows), heads + 2 * some.kv_heads, some.head_dim), torch.nan)
    wide[:, :heads] = torch.cat([sequence.query[first:last] for sequence, first, last in parts])
    out = torch.full((sum(rows), heads * some.head_dim), torch.nan)
    kernels.run(Attention.of(table, kv, 0, wide[:, :heads], out, window), len(out))
    return out
