"""Matrices of which each rank has a part; what they multiply to is whole."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.parallel.group import Group
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


class SplitSummedWeight(SummedWeight):
    """The same where every rank has all of ``x``.

    Args:
        first: of the columns.
    """

    def __init__(self, part: Weight, group: Group, first: int) -> None:
        super().__init__(part, group)
        self._first = first

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return super().linear(x[..., self._first : self._first + self.shape[1]].contiguous(), bias)

    def to(self, device: torch.device) -> Weight:
        return SplitSummedWeight(self.part.to(device), self.group, self._first)


class GatheredWeight(_PartialWeight):
    """A run of a matrix's rows, of which every rank but the last has as many.

    ``rows`` gives whole rows to every rank. So does ``linear`` with the products of all rows, or only to
    rank 0: elsewhere they are then this rank's, and padded.

    Args:
        total: rows of the whole.
        everywhere: whether ``linear`` gives them to all.
    """

    def __init__(self, part: Weight, group: Group, total: int, everywhere: bool = False) -> None:
        super().__init__(part, group)
        self._width = -(-total // group.size)
        self._first = group.rank * self._width
        self._total = total
        self._everywhere = everywhere

    def rows(self, ids: Tensor) -> Tensor:
        last = self.shape[0] - 1
        places = ids - self._first
        elsewhere = (places < 0) | (places > last)
        found = self.part.rows(places.clamp_(0, last))
        return self.group.all_reduce(found.masked_fill_(elsewhere.unsqueeze(-1), 0))

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        own = self.part.linear(x, bias)
        padded = F.pad(own, (0, self._width - own.shape[-1]))
        gathered = self.group.all_gather(padded) if self._everywhere else self.group.gather(padded)
        return gathered[..., : self._total]

    def to(self, device: torch.device) -> Weight:
        return GatheredWeight(self.part.to(device), self.group, self._total, self._everywhere)


def join(decoder: Decoder, group: Group) -> None:
    """Have a decoder of this rank's parts compute what the whole model does, together with the others."""
    for layer in decoder.layers:
        layer.o = SummedWeight(layer.o, group)
        layer.down = SummedWeight(layer.down, group)
    total, tied = decoder.config.vocab_size, decoder.lm_head is decoder.embedding
    decoder.embedding = GatheredWeight(decoder.embedding, group, total)
    decoder.lm_head = decoder.embedding if tied else GatheredWeight(decoder.lm_head, group, total)
