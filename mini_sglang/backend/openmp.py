"""How the threads that torch shares its operators out to wait for one another. Imports no torch."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_POLICY = "OMP_WAIT_POLICY"
# By these too the user tells an OpenMP library how long to spin.
_OTHERS = ("GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@contextmanager
def sleeping_openmp() -> Iterator[None]:
    """Have OpenMP's threads sleep where they wait, if torch is imported in here for the first time.

    Left to themselves they spin for some milliseconds first. Where other programs want the cores too, that
    keeps the very thread which is waited for off its core, at each operator: a step of a small model was seen
    to take twenty times as long. What the environment says already stays.
    """
    if "torch" in sys.modules or any(name in os.environ for name in (_POLICY, *_OTHERS)):
        yield
        return
    os.environ[_POLICY] = "passive"
    try:
        yield
    finally:
        # The library has read it; it is not for the programs that this one starts.
        os.environ.pop(_POLICY, None)
