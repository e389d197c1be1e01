"""When requests are sent: fixed before the first one goes."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from itertools import takewhile

from mini_sglang.errors import InvalidValueError


def poisson(rate: float, seed: int) -> Iterator[float]:
    """Endless arrival times in seconds from the start, ``rate`` of them a second on average.

    Gaps are exponential: who comes does not know of the others. An infinite rate sends all at once.
    """
    draw = random.Random(f"arrivals {seed}")
    at = 0.0
    while True:
        yield at
        at += draw.expovariate(rate) if math.isfinite(rate) else 0.0


def planned(rate: float, seed: int, count: int | None, duration: float | None) -> list[float]:
    """The arrival times of ``count`` requests, or of those of the first ``duration`` seconds.

    Raises:
        InvalidValueError: that would be endless.
    """
    times = poisson(rate, seed)
    if duration is not None:
        if count is None and not math.isfinite(rate):
            raise InvalidValueError(
                "--request-rate", "inf", "finite with --duration, or come with --requests"
            )
        times = takewhile(lambda at: at < duration, times)
    return [at for at, _ in zip(times, range(count), strict=False)] if count is not None else list(times)
