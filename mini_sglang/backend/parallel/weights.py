"""Matrices of which each rank has a part; what they multiply to is whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.shards import Shard
from mini_sglang.backend.weights import Weight


class _PartialWeight(Weight):
    """What is not overridden is of this rank's part."""

    def __init__(self, part: Weight, group: Group) -> None:
        self.part = part
        self.group = group
        self.shape = part.shape
        self.dtype = part.dtype

    @property
    def nbytes(self) -> int:
        return self.part.nbytes

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.part.linear(x, bias)

    def rows(self, ids: Tensor) -> Tensor:
        return self.part.rows(ids)

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        return self.part.dequantize(dtype)

    def to(self, device: torch.device) -> Weight:
        return type(self)(self.part.to(device), self.group)


class SummedWeight(_PartialWeight):
    """Some columns of a matrix: ``linear`` takes those of ``x`` and adds up all ranks' products."""

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return self.group.all_reduce(self.part.linear(x, bias))


class VocabularyWeight(_PartialWeight):
    """Rows of an embedding or head, as ``Shard.vocabulary`` gives them to this rank.

    ``rows`` gives whole rows to every rank, ``linear`` the products of all rows to rank 0 alone: elsewhere
    they are this rank's, and padded.
    """

    def __init__(self, part: Weight, group: Group, shard: Shard) -> None:
        super().__init__(part, group)
        self._shard = shard
        self._first = shard.vocabulary[0]
        self._width = -(-shard.config.vocab_size // shard.size)

    def rows(self, ids: Tensor) -> Tensor:
        last = self.shape[0] - 1
        places = ids - self._first
        elsewhere = (places < 0) | (places > last)
        found = self.part.rows(places.clamp_(0, last))
        return self.group.all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        own = self.part.linear(x, bias)
        padded = F.pad(own, (0, self._width - own.shape[-1]))
        return self.group.gather(padded)[..., : self._shard.config.vocab_size]

    def to(self, device: torch.device) -> Weight:
        return VocabularyWeight(self.part.to(device), self.group, self._shard)


def join(decoder: Decoder, shard: Shard, group: Group) -> None:
    """Have a decoder of this rank's parts compute what the whole model does, together with the others."""
    for layer in decoder.layers:
        layer.o = SummedWeight(layer.o, group)
        layer.down = SummedWeight(layer.down, group)
    tied = decoder.lm_head is decoder.embedding
    decoder.embedding = VocabularyWeight(decoder.embedding, group, shard)
    decoder.lm_head = decoder.embedding if tied else VocabularyWeight(decoder.lm_head, group, shard)
