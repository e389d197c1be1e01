"""A checkpoint of which one rank reads its part."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor

from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.parallel.shards import Shard
from mini_sglang.backend.weights import Weight


class ShardedCheckpoint:
    """A ``Checkpoint`` whose parameters are the rows and columns of ``shard``, read straight from the file.

    A bias that another rank adds is zeros here.
    """

    def __init__(self, whole: Checkpoint, shard: Shard) -> None:
        self._whole = whole
        self._shard = shard
        self.config = whole.config
        self.generation_config = whole.generation_config
        self.nbytes = whole.nbytes // shard.size
        self.quantized = whole.quantized

    def names(self) -> Collection[str]:
        return self._whole.names()

    def shape(self, name: str) -> tuple[int, ...]:
        part, whole = self._shard.part(name), self._whole.shape(name)
        return whole if part is None else part.shape(whole)

    def weight(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        assert part is None
        return self._whole.weight(name, dtype, self._shard.part(name))

    def tensor(self, name: str, dtype: torch.dtype | None, part: Part | None = None) -> Tensor:
        assert part is None
        tensor = self._whole.tensor(name, dtype, self._shard.part(name))
        return tensor if self._shard.adds_bias(name) else torch.zeros_like(tensor)

    def in_blocks(self, name: str) -> bool:
        return self._whole.in_blocks(name)

    def block_size(self, name: str) -> int:
        return self._whole.block_size(name)

    def release(self) -> None:
        self._whole.release()

    def close(self) -> None:
        self._whole.close()
