"""Large pages of memory, so that a pass over gigabytes does not stop at every 4 KiB for an address."""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

_HUGE_PAGE = 2 << 20
_CACHE_LINE = 64
_CHUNK_BYTES = 32 << 20


def advise_huge_pages(tensor: Tensor) -> None:
    """Ask Linux for huge pages behind a CPU tensor, best before it is written. A wish: nothing fails."""
    if not sys.platform.startswith("linux") or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // _HUGE_PAGE) * _HUGE_PAGE
    length = (tensor.data_ptr() + tensor.nbytes - start) // _HUGE_PAGE * _HUGE_PAGE
    if length > 0:
        madvise = ctypes.CDLL(None).madvise
        madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        madvise(start, length, mmap.MADV_HUGEPAGE)


def empty_in_huge_pages(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A CPU tensor at the start of a huge page, behind which there are huge pages where Linux has them.

    What torch allocates itself begins just before one: the first bytes alone would then take a whole page.

    Raises:
        RuntimeError: there is not that much memory.
    """
    nbytes = prod(shape) * dtype.itemsize
    room = torch.empty(nbytes + _HUGE_PAGE, dtype=torch.uint8)
    start = -room.data_ptr() % _HUGE_PAGE
    tensor = room[start : start + nbytes].view(dtype).view(*shape)
    advise_huge_pages(tensor)
    return tensor


class Arena:
    """Room for what is kept as long as the process needs any of it: a huge page is larger than most matrices.

    Chunks are taken from the system as they are needed, and cost memory only where they are written.
    """

    def __init__(self) -> None:
        self._chunk = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def empty(self, count: int) -> Tensor:
        """``count`` bytes, uint8, at the start of a cache line."""
        if self._used + count > len(self._chunk):
            self._chunk = torch.empty(max(count, _CHUNK_BYTES) + _CACHE_LINE, dtype=torch.uint8)
            self._used = -self._chunk.data_ptr() % _CACHE_LINE
            advise_huge_pages(self._chunk)
        room = self._chunk[self._used : self._used + count]
        self._used += -(-count // _CACHE_LINE) * _CACHE_LINE
        return room
