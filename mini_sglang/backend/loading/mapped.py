"""Files in memory as the system maps them. Needs neither torch nor numpy."""

from __future__ import annotations

import mmap
from pathlib import Path

from mini_sglang.errors import ModelLoadError


def map_file(path: Path) -> mmap.mmap:
    """Map a whole file privately.

    The map counts as writable, because torch warns about tensors over memory that is not, but a write would
    reach only this process's copy of the page.

    Raises:
        ModelLoadError: the file is missing, unreadable, empty or not a file.
    """
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    except ValueError:
        raise ModelLoadError(f"The file {path} is empty.") from None
    except OSError as error:
        raise ModelLoadError(f"The file {path} cannot be read: {error.strerror or error}.") from None


def release_read(buffer: mmap.mmap) -> None:
    """Give back the memory that a map's bytes took when they were read; read again, they come from the file.

    A write to the map would be lost by this, which is one more reason not to write to it.
    """
    if hasattr(mmap, "MADV_DONTNEED"):
        buffer.madvise(mmap.MADV_DONTNEED)
