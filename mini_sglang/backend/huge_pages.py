"""Large pages of memory, so that a pass over gigabytes does not stop at every 4 KiB for an address."""

from __future__ import annotations

import ctypes
import mmap
import sys

from torch import Tensor

_HUGE_PAGE = 2 << 20


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
