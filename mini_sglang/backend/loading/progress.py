"""Progress bars with size and speed on stderr, shown only when stderr is a terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

_MAX_COLUMNS = 100
_UNKNOWN_COLUMNS = 80
_ROWS = 2


class Progress(Protocol):
    """What counts the bytes of a download or of a load, or other things."""

    def update(self, n: int, /) -> object:
        """Count ``n`` more; a negative ``n`` takes back what must come again."""


class _NoProgress:
    def update(self, n: int, /) -> None:
        """Count nothing: nobody is looking."""


@contextmanager
def progress_bar(total: int, description: str, unit: str = "B") -> Iterator[Progress]:
    """A bar that counts bytes, or things of another ``unit``, up to ``total`` and is wiped away at the end.

    Where stderr is no terminal nothing is printed and tqdm is not imported.
    """
    if not sys.stderr.isatty():
        yield _NoProgress()
        return
    from tqdm import tqdm

    with tqdm(
        total=total,
        desc=description,
        file=sys.stderr,
        unit=unit,
        unit_scale=unit == "B",
        ncols=_columns(),
        nrows=_ROWS,
        leave=False,
    ) as bar:
        yield bar


def _columns() -> int:
    # A terminal that does not tell its size says 0, for which tqdm would draw nothing.
    try:
        return min(os.get_terminal_size(sys.stderr.fileno()).columns, _MAX_COLUMNS) or _UNKNOWN_COLUMNS
    except (OSError, ValueError):
        return _UNKNOWN_COLUMNS


def size_text(num_bytes: int) -> str:
    """A byte count as a person reads it, in decimal units: ``98.4 MB``."""
    size = float(num_bytes)
    for unit in ("bytes", "kB", "MB"):
        if size < 999.5:
            return f"{size:.0f} bytes" if unit == "bytes" else f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
