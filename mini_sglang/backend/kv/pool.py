"""The paged KV pool and its size."""

from __future__ import annotations

import torch
from torch import Tensor

from mini_sglang.backend.huge_pages import empty_in_huge_pages
from mini_sglang.errors import InvalidValueError

# Of what is free. A GPU's memory is nobody else's; what a step needs beside the pool must fit in the rest.
_HOST_SHARE, _GPU_SHARE = 0.4, 0.8
_USEFUL_TOKENS = 65_536
_USEFUL_TOKENS_PER_SEQUENCE = 1_024
TILE = 16
"""Rows of a tile."""


class KVPool:
    """Keys and values of every layer, in pages that the engine hands out.

    Args:
        dtype: int8 keeps each head's key and value with a float32 scale of its own behind the row's numbers:
            the compiled kernels alone read it.
        tiled: keeps 16 rows of bfloat16 or int8 together as the compiled attention reads them, and only it
            does; see kernels.h. Pages are then whole tiles.
        spare_pages: more of them, after the others, which no sequence has: padding is written there.

    Layout otherwise: ``data[layer, slot]`` is one token's ``2 * kv_heads * head_dim`` numbers, keys before
    values, so that the rows a fused qkv projection gives are written, and a page is read, in one piece.
    Slot ``page * page_size + offset``. On a CPU a page costs no memory until it is written.

    A free page may hold anything, NaN too, and a masked score does not stop a NaN value: attention
    multiplies it by a weight of 0. ``open_pages`` therefore clears a page that a step fills only in part.
    """

    def __init__(
        self,
        *,
        num_layers: int,
        num_pages: int,
        page_size: int,
        kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        tiled: bool = False,
        spare_pages: int = 0,
    ) -> None:
        """Allocate.

        Raises:
            InvalidValueError: the device has not that much memory.
        """
        self.num_pages = num_pages
        self.page_size = page_size
        self.kv_heads = kv_heads
        self.head_dim = head_dim
        self.dtype = dtype
        self.tiled = tiled
        self.spare_pages = spare_pages
        assert not tiled or page_size % TILE == 0
        self._row = (2, kv_heads, head_dim)
        width = kv_bytes_per_token(1, kv_heads, head_dim, dtype) // dtype.itemsize
        pages = num_pages + spare_pages
        self.data = allocate_kv((num_layers, pages * page_size, width), dtype, device)
        self._layers: tuple[Tensor, ...] = tuple(self.data)
        self._paged = tuple(self.data.view(num_layers, pages, page_size * width))

    def open_pages(self, pages: Tensor) -> None:
        """Clear ``pages`` ``[N]`` int64 in every layer, before a step writes their first slots."""
        self.data.view(self.data.shape[0], self.num_pages + self.spare_pages, -1).index_fill_(1, pages, 0)

    def rows(self, layer: int) -> Tensor:
        """All slots of a layer as they are stored, ``[slots, numbers of a row]``."""
        return self._layers[layer]

    def layer(self, layer: int) -> Tensor:
        """All slots of a layer as a view, ``[slots, 2, kv_heads, head_dim]``."""
        return self._layers[layer].view(-1, *self._row)

    def write(self, layer: int, slots: Tensor, rows: Tensor) -> None:
        """Store ``rows`` ``[T, 2 * kv_heads * head_dim]`` at ``slots`` ``[T]`` int64."""
        self._layers[layer].index_copy_(0, slots, rows)

    def run(self, layer: int, first: int, stop: int) -> Tensor:
        """Slots ``first`` to ``stop`` as a view, ``[stop - first, numbers of a row]``."""
        return self._layers[layer][first:stop]

    def gather(self, layer: int, pages: Tensor, out: Tensor) -> Tensor:
        """Copy ``pages`` ``[N]`` int64 into ``out``, which ``buffer`` made.

        Returns:
            a view of ``out``, ``[N * page_size, numbers of a row]``.
        """
        torch.index_select(self._paged[layer], 0, pages, out=out)
        return out.view(len(pages) * self.page_size, -1)

    def keys_values(self, layer: int, rows: Tensor) -> tuple[Tensor, Tensor]:
        """``rows`` ``[N, numbers of a row]`` of a layer as views ``[N, kv_heads, head_dim]`` each."""
        keys, values = rows.view(-1, *self._row).unbind(1)
        return keys, values

    def buffer(self, num_pages: int) -> Tensor:
        """Room for ``gather`` of so many pages, to be reused from layer to layer."""
        return self.data.new_empty((num_pages, self._paged[0].shape[1]))

    @property
    def bytes_per_token(self) -> int:
        """Of all layers together."""
        return self.data.shape[0] * self.data.shape[2] * self.dtype.itemsize


def allocate_kv(shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Room for ``[layers, slots, numbers of a row]``.

    Raises:
        InvalidValueError: the device has not that much memory.
    """
    try:
        if device.type == "cpu":
            return empty_in_huge_pages(shape, dtype)
        return torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, MemoryError):
        layers, tokens, width = shape
        gib = layers * tokens * width * dtype.itemsize / 2**30
        raise InvalidValueError(
            "KV_TOKEN_BUDGET", tokens, f"smaller: the device cannot give {gib:.1f} GiB for the KV pool"
        ) from None


def kv_bytes_per_token(num_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Of int8 too, whose scales count."""
    scales = 2 * kv_heads * torch.float32.itemsize if dtype == torch.int8 else 0
    return num_layers * (2 * kv_heads * head_dim * dtype.itemsize + scales)


def kv_pages_for(
    *,
    token_budget: int,
    page_size: int,
    bytes_per_token: int,
    free_bytes: int,
    context_length: int,
    max_batch_size: int,
    device: torch.device,
) -> int:
    """How many pages the pool gets.

    ``token_budget`` above 0 decides alone, rounded down to whole pages. At 0 it is 40 % of the free
    memory, on CUDA 80 %, but no more than is of use: one whole context, or 64 Ki tokens of prefixes and
    1 Ki for each sequence that may run.

    Raises:
        InvalidValueError: a budget, or free memory, that cannot hold one page and two tokens; a budget
            above the free memory.
    """
    least = max(page_size, 2)
    if token_budget:
        if token_budget < least:
            raise InvalidValueError("KV_TOKEN_BUDGET", token_budget, f"at least {least}, one page")
        if token_budget * bytes_per_token > free_bytes:
            raise InvalidValueError(
                "KV_TOKEN_BUDGET",
                token_budget,
                f"at most {free_bytes // bytes_per_token}: a token takes {bytes_per_token} bytes and "
                f"{free_bytes / 2**30:.1f} GiB are free",
            )
        return token_budget // page_size
    useful = max(context_length, _USEFUL_TOKENS + max_batch_size * _USEFUL_TOKENS_PER_SEQUENCE)
    share = _GPU_SHARE if device.type == "cuda" else _HOST_SHARE
    tokens = min(useful, int(free_bytes * share) // bytes_per_token)
    if tokens < least:
        raise InvalidValueError(
            "free memory",
            f"{free_bytes / 2**20:.0f} MiB",
            f"enough for {least} tokens of KV at {share * 100:.0f} %",
        )
    return -(-tokens // page_size) if tokens == useful else tokens // page_size
