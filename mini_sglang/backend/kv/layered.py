"""A KV pool for layers of different shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from mini_sglang.backend.kv.pool import KVPool, allocate_kv


@dataclass(frozen=True, slots=True)
class LayerShape:
    """What one layer keeps of a token: ``kv_heads`` keys of ``key_dim`` and values of ``value_dim``."""

    kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def width(self) -> int:
        return self.kv_heads * (self.key_dim + self.value_dim)


class LayeredKVPool(KVPool):
    """``KVPool`` whose layers have shapes of their own. ``head_dim`` and ``kv_heads`` are the first layer's.

    Layout: ``data[0, slot]`` is one token's rows of all layers side by side, keys before values in each.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        num_pages: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
        spare_pages: int = 0,
    ) -> None:
        """Allocate. Raises ``InvalidValueError`` as ``KVPool``."""
        self.num_pages = num_pages
        self.page_size = page_size
        self.dtype = dtype
        self.shapes = tuple(shapes)
        # Written and read by torch's operators: tiles are the compiled attention's own.
        self.tiled = False
        self.spare_pages = spare_pages
        self.kv_heads, self.head_dim = shapes[0].kv_heads, shapes[0].key_dim
        ends = [0, *accumulate(shape.width for shape in shapes)]
        total = num_pages + spare_pages
        self.data = allocate_kv((1, total * page_size, ends[-1]), dtype, device)
        parts = [slice(*bounds) for bounds in pairwise(ends)]
        pages = self.data.view(total, page_size, ends[-1])
        self._layers = tuple(self.data[0][:, part] for part in parts)
        self._paged = tuple(pages[:, :, part] for part in parts)
        self._widest = max(shape.width for shape in shapes)

    def layer(self, layer: int) -> Tensor:
        raise TypeError("layers of this pool have no common shape: use keys_values")

    def gather(self, layer: int, pages: Tensor, out: Tensor) -> Tensor:
        width = self.shapes[layer].width
        shape = len(pages), self.page_size, width
        part = out.view(-1)[: shape[0] * shape[1] * width].view(shape)
        torch.index_select(self._paged[layer], 0, pages, out=part)
        return part.view(-1, width)

    def keys_values(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """As ``KVPool``: ``[N, kv_heads, key_dim]`` and ``[N, kv_heads, value_dim]``."""
        shape = self.shapes[layer]
        width = shape.kv_heads * shape.key_dim
        keys, values = rows[:, :width], rows[:, width:]
        return (
            keys.view(-1, shape.kv_heads, shape.key_dim),
            values.view(-1, shape.kv_heads, shape.value_dim),
        )

    def buffer(self, num_pages: int) -> Tensor:
        return self.data.new_empty((num_pages, self.page_size * self._widest))


def kv_pool(
    shapes: Sequence[LayerShape],
    *,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype,
    device: torch.device,
    spare_pages: int = 0,
) -> KVPool:
    """The pool for these layers: a plain one where they are all alike."""
    first = shapes[0]
    if len(set(shapes)) > 1 or first.key_dim != first.value_dim:
        return LayeredKVPool(
            shapes,
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
            device=device,
            spare_pages=spare_pages,
        )
    return KVPool(
        num_layers=len(shapes),
        num_pages=num_pages,
        page_size=page_size,
        kv_heads=first.kv_heads,
        head_dim=first.key_dim,
        dtype=dtype,
        device=device,
        spare_pages=spare_pages,
    )
