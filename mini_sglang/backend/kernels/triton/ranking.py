"""Draws under top_k and top_p by Triton's kernels; the twin in torch is ``DeviceSampler``'s own."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.distribution import weight_unit
from mini_sglang.backend.kernels.triton.launch import power_of_two

NUMBER, ROOM = 128, 1024
_BLOCK, _PEAKS = 4096, 1024


class TritonRanking:
    """Ranks a row's largest logits and draws from them.

    Four launches whose grids depend on shapes alone: they can be captured in a CUDA graph.

    Args:
        number: of a row's largest logits as many are ranked at least, and ``room``, a power of two, at most.
        peaks: into how many parts a row is divided at most: their largest are sorted in one program.
    """

    def __init__(
        self, vocab_size: int, *, number: int = NUMBER, room: int = ROOM, peaks: int = _PEAKS
    ) -> None:
        self.vocab_size = vocab_size
        self._unit = weight_unit(vocab_size)
        self._room = room
        self._part = max(4, power_of_two(-(-vocab_size // peaks)))
        self._parts = -(-vocab_size // self._part)
        self._number = min(number, self._parts)

    def draw(self, logits: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a token per row.

        Args:
            logits: ``[R, at least vocab_size]`` in any floating type of up to 32 bits; a row in one piece.
            columns: ``[6, R]`` float64: the row's largest logit, 1 over the temperature, the random number in
                ``[0, 1)``, top_k or 0, top_p, the weight below which min_p drops a token.

        Returns:
            ids ``[R]`` int64, an index of the vocabulary also where the row is not finite, and int32 ``[R]``,
            whether the logits that were ranked are all that the filters leave; else the id is no draw.
        """
        from mini_sglang.backend.kernels.triton import ranking_kernels as kernels

        rows, vocab_size, device = len(logits), self.vocab_size, logits.device
        ids = torch.empty(rows, dtype=torch.int64, device=device)
        peaks = torch.empty((rows, self._parts), dtype=torch.int32, device=device)
        thresholds, counts, enough = (torch.empty(rows, dtype=torch.int32, device=device) for _ in range(3))
        gathered = torch.empty((rows, self._room), dtype=torch.int64, device=device)
        if not rows:
            return ids, enough
        assert logits.stride(1) == 1 and columns.is_contiguous()
        here = max(1, _BLOCK // self._part)
        kernels.find_peaks[(rows, -(-self._parts // here))](
            logits, peaks, logits.stride(0),
            VOCAB=vocab_size, PART=self._part, PARTS=self._parts, HERE=here, num_warps=4,
        )  # fmt: skip
        kernels.find_thresholds[(rows,)](
            peaks, thresholds, counts,
            PARTS=self._parts, PARTS_BLOCK=power_of_two(self._parts), NUMBER=self._number,
            num_warps=4,
        )  # fmt: skip
        block = min(_BLOCK, power_of_two(vocab_size))
        blocks = -(-vocab_size // block)
        sums = torch.zeros((rows, blocks), dtype=torch.float64, device=device)
        kernels.gather_largest[(rows, blocks)](
            logits, thresholds, counts, gathered, columns, sums, logits.stride(0), columns.stride(0),
            VOCAB=vocab_size, UNIT=self._unit, BLOCK=block, BLOCKS=blocks, ROOM=self._room, num_warps=8,
        )  # fmt: skip
        kernels.pick_ranked[(rows,)](
            gathered, counts, columns, sums, ids, enough, columns.stride(0),
            VOCAB=vocab_size, UNIT=self._unit, BLOCKS=blocks, SUMS=power_of_two(blocks), ROOM=self._room,
            num_warps=4,
        )  # fmt: skip
        return ids, enough
