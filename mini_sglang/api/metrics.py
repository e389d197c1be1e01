"""What the server counts, and how it is told: Prometheus text or JSON."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mini_sglang.types import Usage

if TYPE_CHECKING:
    from mini_sglang.engine.flights import PoolStats

TTFT_BUCKETS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
ITL_BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
SECONDS_BUCKETS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
PROMETHEUS_TYPE = "text/plain; version=0.0.4; charset=utf-8"

# Of an engine's counters: which grow for ever, and which go up and down. Others are left out.
_TOTALS = {
    "steps": "batches run",
    "overlapped_steps": "batches begun before the one before them was done",
    "overlap_dropped": "sequences of such batches computed for nothing: their requests had ended",
    "prefill_tokens": "prompt tokens computed",
    "decode_tokens": "tokens made by decode, which are all but each answer's first",
    "prefix_hit_tokens": "prompt tokens taken from the prefix cache",
    "prefix_miss_tokens": "prompt tokens that the prefix cache did not have",
    "prefill_cache_hit_tokens": "prompt tokens taken from the exact-prompt cache",
    "prefill_cache_miss_tokens": "prompt tokens that the exact-prompt cache did not have",
    "prefix_evicted_tokens": "tokens dropped from the prefix cache",
    "prefix_loaded_tokens": "tokens that came from a saved prefix cache",
    "prefix_hits": "requests that the prefix cache had a part of",
    "prefix_misses": "requests that it had nothing of",
    "prefill_cache_hits": "requests whose whole prompt the exact-prompt cache had",
    "prefill_cache_misses": "requests whose prompt it had not",
    "prefill_cache_evictions": "prompts dropped from the exact-prompt cache",
    "host_hits": "requests that something came back for from the host tier",
    "host_spilled_tokens": "tokens copied to the host tier",
    "host_restored_tokens": "tokens copied back from the host tier",
    "host_dropped_tokens": "tokens that the host tier had no room for",
    "lora_requests": "requests that ran with an adapter",
    "retractions": "requests set back because the KV pool was full",
    "out_of_memory": "batches that did not fit the device's memory and were split",
    "capped_by_load": "requests given fewer max_new_tokens because many were in flight",
    "capped_by_context": "requests given fewer max_new_tokens because the context window ends",
    "draft_tokens": "tokens guessed ahead",
    "draft_tokens_accepted": "tokens guessed right, each a decode that was saved",
    "draft_steps": "decodes that checked guesses",
    "speculation_switched_off": "requests whose guesses were right too seldom to pay",
}
_GAUGES = {
    "draft_acceptance_rate": "share of the tokens guessed ahead that were right",
    "running": "requests in the batch",
    "waiting": "requests waiting inside the engine",
    "step_tokens_limit": "tokens that a batch may have since the device ran out of memory, 0 for any",
    "prefixes": "prefixes in the cache",
    "prefill_cache_entries": "prompts in the exact-prompt cache",
    "prefill_cache_tokens": "tokens of the prompts in the exact-prompt cache",
    "host_tokens_total": "tokens the host tier holds",
    "host_tokens_used": "tokens in the host tier",
    "warm_prefixes": "prefixes of WARM_PREFIXES and insert_prefix's queue",
    "warm_prefixes_done": "of these, those that are computed",
    "warm_prefixes_failed": "of these, those that could not be computed or kept",
    "prefix_reuse": "whether prompts can start from what others have computed",
    "loras": "LoRA adapters loaded",
    "kv_tokens_total": "tokens the KV pool holds",
    "kv_tokens_free": "tokens of the KV pool that are free",
    "kv_tokens_cached": "tokens of the KV pool kept for later prompts",
    "kv_tokens_private": "tokens of the KV pool that running requests hold alone",
}


class Histogram:
    """Counts of observations up to each bound, their sum and number."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = tuple(bounds)
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float, times: int = 1) -> None:
        self.counts[bisect_left(self.bounds, value)] += times
        self.sum += value * times

    @property
    def count(self) -> int:
        return sum(self.counts)

    def cumulative(self) -> Iterator[tuple[str, int]]:
        """``le`` labels with the number of observations up to each."""
        total = 0
        for bound, count in zip((*self.bounds, float("inf")), self.counts, strict=True):
            total += count
            yield ("+Inf" if bound == float("inf") else f"{bound:g}"), total


class Metrics:
    """Counted on the event loop, by the streams and the middleware."""

    def __init__(self) -> None:
        self.ttft = Histogram(TTFT_BUCKETS)
        self.itl = Histogram(ITL_BUCKETS)
        self.seconds = Histogram(SECONDS_BUCKETS)
        self.outcomes: Counter[str] = Counter()
        self.loras: Counter[str] = Counter()
        self.responses: Counter[tuple[str, int]] = Counter()
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.cached_tokens = 0

    def request(self, outcome: str, seconds: float, usage: Usage, lora: str = "") -> None:
        """One request ended: ``outcome`` is its finish reason, or ``timeout``; ``lora`` its adapter."""
        if lora:
            self.loras[lora] += 1
        self.outcomes[outcome] += 1
        self.seconds.observe(seconds)
        self.prompt_tokens += usage.prompt_tokens
        self.completion_tokens += usage.completion_tokens
        self.cached_tokens += usage.cached_tokens

    def response(self, route: str, status: int) -> None:
        """One HTTP response ended. ``route`` is one of the app's own, never a client's text."""
        self.responses[route, status] += 1


def as_json(metrics: Metrics, pool: PoolStats, extra: Mapping[str, Any]) -> dict[str, Any]:
    """The same figures as ``as_prometheus``, as JSON data."""
    return {
        **extra,
        "scheduler_mode": pool.mode,
        "state": pool.state,
        "inflight": pool.inflight,
        "queued": pool.queued,
        "longest_wait_seconds": pool.longest_wait,
        "reserved": pool.reserved,
        "refused": pool.refused,
        "queue_timeouts": pool.timed_out,
        "resubmitted": pool.resubmitted,
        "restarts": pool.restarts,
        "engines": [
            {
                "engine": engine.index,
                "state": engine.state,
                "inflight": engine.inflight,
                "restarts": engine.restarts,
                **{name: value for name, value in _counters(engine.counters) if name in _TOTALS | _GAUGES},
            }
            for engine in pool.engines
        ],
        "requests": dict(metrics.outcomes),
        "lora_requests": dict(metrics.loras),
        "responses": [
            {"route": route, "status": status, "count": count}
            for (route, status), count in sorted(metrics.responses.items())
        ],
        "prompt_tokens": metrics.prompt_tokens,
        "completion_tokens": metrics.completion_tokens,
        "cached_tokens": metrics.cached_tokens,
        "ttft_seconds": _histogram_json(metrics.ttft),
        "itl_seconds": _histogram_json(metrics.itl),
        "request_seconds": _histogram_json(metrics.seconds),
    }


def as_prometheus(metrics: Metrics, pool: PoolStats, model: str, implementation: str = "") -> str:
    """Prometheus' text format, version 0.0.4.

    Args:
        implementation: how the model is run, as ``ModelBackend.describe`` says.
    """
    out = _Text()
    labels = {"model": model, "implementation": implementation, "scheduler_mode": pool.mode}
    out.family("info", "gauge", "what is served", [(labels, 1)])
    out.family("pool_inflight", "gauge", "requests that are with an engine", [({}, pool.inflight)])
    out.family("pool_queued", "gauge", "requests waiting for an engine", [({}, pool.queued)])
    out.family(
        "pool_longest_wait_seconds",
        "gauge",
        "how long the request that waits longest for an engine has waited",
        [({}, pool.longest_wait)],
    )
    out.family("pool_refused_total", "counter", "requests refused for want of room", [({}, pool.refused)])
    out.family(
        "pool_timed_out_total",
        "counter",
        "requests that waited too long for an engine",
        [({}, pool.timed_out)],
    )
    out.family(
        "pool_resubmitted_total", "counter", "requests moved off a dead engine", [({}, pool.resubmitted)]
    )
    engines = [({"engine": str(engine.index)}, engine) for engine in pool.engines]
    out.family(
        "engine_up", "gauge", "whether the engine takes requests",
        [(labels, int(engine.state == "ready")) for labels, engine in engines],
    )  # fmt: skip
    out.family(
        "engine_inflight", "gauge", "requests the engine has", [(labels, e.inflight) for labels, e in engines]
    )
    out.family(
        "engine_restarts_total", "counter", "times the engine was started again",
        [(labels, engine.restarts) for labels, engine in engines],
    )  # fmt: skip
    counters = [(labels, dict(_counters(engine.counters))) for labels, engine in engines]
    for table, kind, suffix in ((_TOTALS, "counter", "_total"), (_GAUGES, "gauge", "")):
        for name, help in table.items():
            samples = [(labels, values[name]) for labels, values in counters if name in values]
            if samples:
                out.family(f"engine_{name}{suffix}", kind, help, samples)
    out.family(
        "requests_total", "counter", "requests that ended, by how",
        [({"outcome": outcome}, count) for outcome, count in sorted(metrics.outcomes.items())],
    )  # fmt: skip
    if metrics.loras:
        out.family(
            "lora_requests_total", "counter", "requests that ended, by their LoRA adapter",
            [({"lora": name}, count) for name, count in sorted(metrics.loras.items())],
        )  # fmt: skip
    out.family(
        "http_responses_total", "counter", "HTTP responses by route and status",
        [
            ({"route": route, "status": str(status)}, count)
            for (route, status), count in sorted(metrics.responses.items())
        ],
    )  # fmt: skip
    out.family("prompt_tokens_total", "counter", "prompt tokens served", [({}, metrics.prompt_tokens)])
    out.family("completion_tokens_total", "counter", "tokens served", [({}, metrics.completion_tokens)])
    out.family(
        "cached_tokens_total",
        "counter",
        "prompt tokens that were not computed",
        [({}, metrics.cached_tokens)],
    )
    out.histogram("ttft_seconds", "arrival to first token", metrics.ttft)
    out.histogram("itl_seconds", "from one token to the next", metrics.itl)
    out.histogram("request_seconds", "arrival to the end", metrics.seconds)
    return out.text()


def _counters(counters: Mapping[str, int]) -> Iterator[tuple[str, float]]:
    yield from counters.items()
    if counters.get("draft_tokens"):
        yield "draft_acceptance_rate", counters["draft_tokens_accepted"] / counters["draft_tokens"]


def _histogram_json(histogram: Histogram) -> dict[str, Any]:
    return {"count": histogram.count, "sum": histogram.sum, "buckets": dict(histogram.cumulative())}


class _Text:
    def __init__(self) -> None:
        self._lines: list[str] = []

    def family(
        self, name: str, kind: str, help: str, samples: Sequence[tuple[Mapping[str, str], float]]
    ) -> None:
        self._head(name, kind, help)
        for labels, value in samples:
            self._sample(name, labels, value)

    def histogram(self, name: str, help: str, histogram: Histogram) -> None:
        self._head(name, "histogram", help)
        for bound, count in histogram.cumulative():
            self._sample(f"{name}_bucket", {"le": bound}, count)
        self._sample(f"{name}_sum", {}, histogram.sum)
        self._sample(f"{name}_count", {}, histogram.count)

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"

    def _head(self, name: str, kind: str, help: str) -> None:
        self._lines += [f"# HELP mini_sglang_{name} {help}", f"# TYPE mini_sglang_{name} {kind}"]

    def _sample(self, name: str, labels: Mapping[str, str], value: float) -> None:
        inner = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        self._lines.append(f"mini_sglang_{name}{'{' + inner + '}' if inner else ''} {value}")


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
