"""From single requests to the figures of a run; times in seconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from mini_sglang.bench.load.generator import Load, Request
from mini_sglang.errors import InvalidValueError

POINTS = 24
"""Windows in which the cache's hits are told over time."""
GOALS = ("ttft", "tpot", "e2e")


def percentile(values: Sequence[float], share: float) -> float:
    """The value that ``share`` of all are not above, between neighbours in proportion; of sorted values."""
    place = share * (len(values) - 1)
    low = math.floor(place)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (place - low)


def spread(values: Iterable[float]) -> dict[str, float] | None:
    """Mean and percentiles; None of nothing."""
    ordered = sorted(values)
    if not ordered:
        return None
    points = {f"p{share}": percentile(ordered, share / 100) for share in (50, 90, 99)}
    return {"mean": math.fsum(ordered) / len(ordered), **points}


def tpot(request: Request) -> float | None:
    """Seconds a token after the first; None of an answer of one token, or whose tokens' times are unknown."""
    if not request.times or request.output_tokens is None or request.output_tokens < 2:
        return None
    return (request.times[-1] - request.times[0]) / (request.output_tokens - 1)


def goals(text: str) -> dict[str, float]:
    """``ttft:500,tpot:50`` as seconds by name.

    Raises:
        InvalidValueError: another name, or no positive number of milliseconds.
    """
    found = {}
    for part in text.split(","):
        name, _, value = part.partition(":")
        try:
            seconds = float(value) / 1000
        except ValueError:
            seconds = math.nan
        if name.strip() not in GOALS or not (0 < seconds < math.inf):
            allowed = f"milliseconds by name, of {', '.join(GOALS)}: ttft:500,tpot:50"
            raise InvalidValueError("--goodput", text, allowed)
        found[name.strip()] = seconds
    return found


def meets(request: Request, limits: Mapping[str, float]) -> bool:
    """Whether a whole answer kept every limit; waiting counts from when it was planned, as for a user."""
    first, each = request.first, tpot(request)
    values = {
        "ttft": math.inf if first is None else first - request.planned,
        "tpot": 0.0 if each is None else each,
        "e2e": request.end - request.planned,
    }
    return all(values[name] <= limit for name, limit in limits.items())


def row(load: Load, limits: Mapping[str, float] | None = None) -> dict[str, Any]:
    """The figures of a run. Latency is that of whole answers; failed ones are in ``errors``.

    ``ttft`` and ``e2e`` are from when a request was sent, ``ttft_planned`` and ``e2e_planned`` from when it
    should have been: they differ where the generator, or a connection, was late (``lag``).
    """
    good = [request for request in load.requests if request.error is None]
    duration = load.duration
    outputs = sum(request.output_tokens or 0 for request in good)
    inputs = sum(request.prompt_tokens or 0 for request in good)
    failed = Counter(request.error for request in load.requests if request.error is not None)
    first = [(r.first, r.sent, r.planned) for r in good if r.first is not None]
    counted = all(request.counted or len(request.times) == request.output_tokens for request in good)

    def per_second(amount: float) -> float:
        return amount / duration if duration > 0 else 0.0

    return {
        "requests": len(load.requests) + load.unfinished,
        "completed": len(good),
        "errors": sum(failed.values()),
        "errors_by_kind": dict(sorted(failed.items())),
        "unfinished": load.unfinished,
        "interrupted": load.interrupted,
        "short": sum((request.output_tokens or 0) < request.asked_tokens for request in good),
        "duration": duration,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "cached_tokens": _sum_known(request.cached_tokens for request in good),
        "request_throughput": per_second(len(good)),
        "output_throughput": per_second(outputs),
        "total_throughput": per_second(inputs + outputs),
        "mean_inflight": per_second(sum(request.end - request.sent for request in good)),
        "goodput": per_second(sum(meets(request, limits) for request in good)) if limits else None,
        "ttft": spread(at - sent for at, sent, _ in first),
        "tpot": spread(value for value in map(tpot, good) if value is not None),
        "itl": spread(late - early for request in good for early, late in pairwise(request.times)),
        "itl_of": "tokens" if counted else "pieces",
        "e2e": spread(request.end - request.sent for request in good),
        "ttft_planned": spread(at - planned for at, _, planned in first),
        "e2e_planned": spread(request.end - request.planned for request in good),
        "lag": spread(request.sent - request.planned for request in load.requests),
        "cache": hit_rates(good, duration),
    }


def hit_rates(requests: Sequence[Request], duration: float) -> list[dict[str, float]]:
    """The share of prompt tokens that came from the server's cache, of the answers that ended in each window.

    Empty where the server does not tell.
    """
    window = duration / POINTS
    hits: Counter[int] = Counter()
    asked: Counter[int] = Counter()
    for request in requests:
        if request.cached_tokens is not None and request.prompt_tokens and window > 0:
            place = min(POINTS - 1, int(request.end / window))
            hits[place] += request.cached_tokens
            asked[place] += request.prompt_tokens
    return [{"t": (place + 1) * window, "hit_rate": hits[place] / asked[place]} for place in sorted(asked)]


def _sum_known(values: Iterable[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None
