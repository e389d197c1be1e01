"""Tokens chosen by Triton's kernels; the twin in torch is ``Sampler``, for rows that need no more."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mini_sglang.backend.distribution import weight_unit
from mini_sglang.backend.kernels.triton.launch import power_of_two

COLUMNS = 4
"""Numbers of a row's table: scale, random number, floor, place."""


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a row is divided.

    Attributes:
        part: logits of a program; a power of two.
        block: of which it takes so many at once.
        warps: of ``find_best`` and ``weigh_parts``; ``pick_warps`` of ``pick_tokens``.
    """

    part: int
    block: int
    warps: int
    pick_warps: int


# By rows: up to so many. The best of some dozens on an H100.
TILES = (
    (8, Tiles(1024, 1024, 8, 4)),
    (32, Tiles(1024, 1024, 4, 4)),
    (1 << 30, Tiles(2048, 2048, 4, 8)),
)


def tiles_for(rows: int, vocab_size: int) -> Tiles:
    tiles = next(tiles for most, tiles in TILES if rows <= most)
    part = min(tiles.part, max(16, power_of_two(vocab_size)))
    return Tiles(part, min(tiles.block, part), tiles.warps, tiles.pick_warps)


class TritonChooser:
    """Greedy tokens and draws under temperature and min_p.

    They are those of ``Sampler`` bit for bit where the device's exponential is the one that torch calls:
    on CUDA both are libdevice's, under the interpreter it is numpy's. Were they to differ in the last bit, a
    weight, of up to 2**35 for 151,936 tokens, would change by 1 at most, and one only that lies between two
    whole numbers.

    Each call is three launches whose grids depend on shapes alone: all of it can be captured in a CUDA graph.
    """

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size
        self._unit = weight_unit(vocab_size)

    def choose(
        self, logits: Tensor, table: Tensor, ids: Tensor, numbers: Tensor, tiles: Tiles | None = None
    ) -> None:
        """Choose a token per row.

        Args:
            logits: ``[R, V]`` in any floating type of up to 32 bits, ``V >= vocab_size``; a row in one piece.
            table: ``[4, R]`` float64, in one piece: 1 over the temperature, or 0 for the largest logit;
                the random number in ``[0, 1)``; the weight below which a token is dropped; where in ``ids``
                the rows begin.
            ids: ``[N]`` int64, where row r's token goes to ``place + r``. It is an index of the vocabulary
                also where the row's largest logit is not finite.
            numbers: ``[R, 2]`` float64, for token and largest logit, NaN where one is.
        """
        from mini_sglang.backend.kernels.triton.choosing_kernels import find_best, pick_tokens, weigh_parts

        rows, vocab_size = len(logits), self.vocab_size
        if not rows:
            return
        assert logits.stride(1) == 1 and table.is_contiguous() and numbers.is_contiguous()
        tiles = tiles or tiles_for(rows, vocab_size)
        parts = -(-vocab_size // tiles.part)
        best = torch.empty((rows, parts), dtype=torch.int64, device=logits.device)
        sums = torch.empty((rows, parts), dtype=torch.float64, device=logits.device)
        row_stride, table_stride = logits.stride(0), table.stride(0)
        block, parts_block = min(tiles.block, tiles.part), power_of_two(parts)
        find_best[(rows, parts)](
            logits,
            best,
            row_stride,
            VOCAB=vocab_size,
            PART=tiles.part,
            PARTS=parts,
            BLOCK=block,
            num_warps=tiles.warps,
        )
        weigh_parts[(rows, parts)](
            logits,
            best,
            table,
            sums,
            row_stride,
            table_stride,
            VOCAB=vocab_size,
            UNIT=self._unit,
            PART=tiles.part,
            PARTS=parts,
            PARTS_BLOCK=parts_block,
            BLOCK=block,
            num_warps=tiles.warps,
        )
        pick_tokens[(rows,)](
            logits,
            best,
            sums,
            table,
            ids,
            numbers,
            row_stride,
            table_stride,
            VOCAB=vocab_size,
            UNIT=self._unit,
            PART=tiles.part,
            PARTS=parts,
            PARTS_BLOCK=parts_block,
            num_warps=tiles.pick_warps,
        )


def take_chosen(token_ids: Tensor, ids: Tensor) -> None:
    """Put ``ids[i]`` in the place of each of ``token_ids`` that is ``-1 - i``; both int64."""
    from mini_sglang.backend.kernels.triton.choosing_kernels import take_chosen

    rows = len(token_ids)
    take_chosen[(1,)](token_ids, ids, rows, BLOCK=power_of_two(rows), num_warps=4)
