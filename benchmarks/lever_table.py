"""The levers of ``levers.py``: one row for each, and the settings that are none, with the reason.

To add one: a ``Row`` with what is off and on, and a workload of ``lever_worker.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Figure:
    """What a workload's figure is called, and whether more of it is better."""

    title: str
    unit: str
    scale: float = 1.0
    more: bool = False


FIGURES = {
    "tokens_per_s": Figure("new tokens", "/s", more=True),
    "all_tokens_per_s": Figure("tokens, prompts’ too", "/s", more=True),
    "seconds": Figure("all of it", "s"),
    "first": Figure("first token, median", "ms", 1e3),
    "first_mean": Figure("first token, mean", "ms", 1e3),
    "late_first": Figure("its first token", "ms", 1e3),
    "long_first": Figure("the prompt’s first token", "ms", 1e3),
    "gap": Figure("between two tokens, median", "ms", 1e3),
    "worst_gap": Figure("longest pause of an answer", "ms", 1e3),
}


@dataclass(frozen=True)
class Row:
    """A lever off and on under a workload.

    Attributes:
        section: of the contract: 1 model and device, 2 caches, 3 scheduling, 4 decode speed.
        off, on: settings, or with ``request`` arguments of the workload.
        says: the workload, for a reader.
        work, given: a method of ``lever_worker.Lever`` and its arguments.
        base: settings of both sides.
        plain: on plain weights, where the model is a GGUF of blocks.
        pool: engines in a pool, as a server has them, in place of one.
    """

    section: int
    off: Mapping[str, Any]
    on: Mapping[str, Any]
    says: str
    work: str
    given: Mapping[str, Any]
    figures: tuple[str, ...] = ("tokens_per_s",)
    base: Mapping[str, Any] = field(default_factory=dict)
    plain: bool = False
    pool: bool = False
    request: bool = False

    @property
    def names(self) -> set[str]:
        """The settings it is about."""
        return set() if self.request else {*self.off, *self.on}


SECTIONS = {1: "Model and device", 2: "Caches", 3: "Scheduling", 4: "Decode speed"}
ONE = {"requests": 1, "prompt": 64, "new": 64}
LOOPING = {"requests": 1, "prompt": 64, "new": 256}
EIGHT = {"requests": 8, "prompt": 64, "new": 48}
LONG = {"requests": 8, "prompt": 1000, "new": 32}
TWO_ENGINES = {"num_engines": 2, "num_threads": 1}
TWICE = {"prefixes": 8, "length": 320, "question": 16, "new": 4, "order": [*range(8)] * 2}
SAME = {"prefixes": 1, "length": 600, "question": 0, "new": 4, "order": [0] * 8}
HOT = {
    "prefixes": 16, "length": 320, "question": 16, "new": 4,
    "order": [0, 0, 0, *(n for start in range(1, 16, 5) for n in (*range(start, start + 5), 0))],
}  # fmt: skip
MIXED = {
    "prefixes": 6, "length": 400, "question": 16, "new": 4,
    "order": [0, 1, 2, 3, 4, 5, 0, 2, 1, 4, 3, 5, 5, 0, 3, 1, 2, 4],
}  # fmt: skip

ROWS = (
    Row(1, {"kernels": "reference"}, {"kernels": "auto"}, "8 answers at once", "burst", EIGHT),
    Row(1, {"gguf_dequantize": "1"}, {"gguf_dequantize": "0"}, "one answer", "burst", ONE),
    Row(1, {"dtype": "fp32"}, {"dtype": "bf16"}, "one answer, plain weights", "burst", ONE, plain=True),
    Row(1, {"quantization": "none"}, {"quantization": "int8"}, "one answer, plain weights before", "burst",
        ONE, plain=True),
    Row(1, {"quantization": "none"}, {"quantization": "int4"}, "one answer, plain weights before", "burst",
        ONE, plain=True),
    Row(1, {"kv_dtype": "fp32"}, {"kv_dtype": "auto"}, "8 answers after 1,000 tokens each", "burst", LONG),
    Row(1, {"kv_dtype": "auto"}, {"kv_dtype": "int8"}, "8 answers after 1,000 tokens each", "burst", LONG),
    Row(1, {"kv_dtype": "auto"}, {"kv_dtype": "int8"}, "one answer after 4,000 tokens", "burst",
        {"requests": 1, "prompt": 4000, "new": 128}, ("gap",)),
    Row(1, {"num_threads": 1}, {"num_threads": 2}, "8 answers at once", "burst", EIGHT),
    Row(1, {"attn_impl": "eager"}, {"attn_impl": "sdpa"},
        "8 answers after 1,000 tokens each, on PyTorch's operators", "burst", LONG,
        base={"kernels": "reference"}, plain=True),
    Row(1, {"compile_model": "0"}, {"compile_model": "1"}, "one answer, on PyTorch's operators", "burst", ONE,
        base={"kernels": "reference"}, plain=True),
    Row(2, {"prefix_cache": False}, {"prefix_cache": True}, "one prefix of 600 tokens, 8 times", "returning",
        {"prefixes": 1, "length": 600, "question": 16, "new": 4, "order": [0] * 8}, ("first",)),
    Row(2, {"prefix_cache_size": 4}, {"prefix_cache_size": 0}, "8 prefixes of 320 tokens, twice in turn",
        "returning", TWICE, ("first_mean",)),
    Row(2, {"prefix_cache_max_tokens": 512}, {"prefix_cache_max_tokens": 4096},
        "one prefix of 800 tokens, 6 times", "returning",
        {"prefixes": 1, "length": 800, "question": 16, "new": 4, "order": [0] * 6}, ("first",)),
    Row(2, {"prefix_cache_token_budget": 1024}, {"prefix_cache_token_budget": 65536},
        "8 prefixes of 320 tokens, twice in turn", "returning", TWICE, ("first_mean",)),
    Row(2, {"prefix_cache_policy": "lru"}, {"prefix_cache_policy": "lfu"},
        "one prefix often, 15 others once each, room for 4", "returning", HOT, ("first_mean",),
        base={"prefix_cache_token_budget": 4 * 352}),
    Row(2, {"page_size_tokens": 1}, {"page_size_tokens": 16}, "8 answers after 1,000 tokens each", "burst",
        LONG),
    Row(2, {"page_size_tokens": 16}, {"page_size_tokens": 64}, "8 answers after 1,000 tokens each", "burst",
        LONG),
    Row(2, {"kv_token_budget": 1024}, {"kv_token_budget": 16384}, "8 answers after 300 tokens each", "burst",
        {"requests": 8, "prompt": 300, "new": 48}),
    Row(2, {"prefill_cache_size": 0}, {"prefill_cache_size": 8}, "one prompt of 600 tokens, 8 times",
        "returning", SAME, ("first",)),
    Row(2, {"prefill_cache_token_budget": 512}, {"prefill_cache_token_budget": 65536},
        "one prompt of 600 tokens, 8 times", "returning", SAME, ("first",)),
    Row(2, {"page_token_budget": 0}, {"page_token_budget": 16384},
        "8 prefixes of 320 tokens, twice in turn, a pool of 1,408", "returning", TWICE, ("first_mean",),
        base={"kv_token_budget": 4 * 352}),
    Row(3, {"chunked_prefill": False}, {"chunked_prefill": True},
        "a prompt of 6,000 tokens beside 4 running answers", "long_beside",
        {"streams": 4, "prompt": 200, "new": 120, "long": 6000},
        ("worst_gap", "long_first", "all_tokens_per_s"), base={"kv_token_budget": 16384}),
    Row(3, {"chunked_prefill": False}, {"chunked_prefill": True}, "16 prompts of 400 tokens at once", "burst",
        {"requests": 16, "prompt": 400, "new": 16}, ("first_mean", "tokens_per_s")),
    Row(3, {"prefill_chunk_size": 2048}, {"prefill_chunk_size": 512},
        "a prompt of 4,000 tokens beside 4 running answers", "long_beside",
        {"streams": 4, "prompt": 200, "new": 80, "long": 4000}, ("worst_gap", "all_tokens_per_s"),
        base={"kv_token_budget": 16384}),
    Row(3, {"max_batch_size": 1}, {"max_batch_size": 64}, "16 answers at once", "burst",
        {"requests": 16, "prompt": 64, "new": 32}),
    Row(3, {"max_prefill_tokens": 512}, {"max_prefill_tokens": 4096},
        "16 prompts of 200 tokens at once, no chunks", "burst",
        {"requests": 16, "prompt": 200, "new": 8}, ("first_mean", "seconds"),
        base={"chunked_prefill": False}),
    Row(3, {"adaptive_max_new_tokens": False},
        {"adaptive_max_new_tokens": True, "adaptive_max_inflight_threshold": 4,
         "adaptive_max_new_tokens_factor": 0.5},
        "16 answers of 64 tokens, 4 at a time; those past the fourth get half", "burst",
        {"requests": 16, "prompt": 64, "new": 64}, ("first_mean", "seconds"), base={"max_batch_size": 4}),
    Row(3, {"priority": 0}, {"priority": 50}, "a request behind 12 others, 2 at a time", "urgent",
        {"waiting": 12, "prompt": 64, "new": 24}, ("late_first",), base={"max_batch_size": 2}, request=True),
    Row(3, {"scheduler_mode": "rr"}, {"scheduler_mode": "fsfs"},
        "12 answers over two engines, one every 0.1 s, every other 8 times as long", "burst",
        {"requests": 12, "prompt": 64, "new": 16, "spread": True, "pause": 0.1}, ("seconds",),
        base=TWO_ENGINES, pool=True),
    Row(3, {"scheduler_mode": "rr"}, {"scheduler_mode": "cache_aware"},
        "6 prefixes of 400 tokens in mixed order, two engines with room for 3 each", "returning", MIXED,
        ("first_mean",), base={**TWO_ENGINES, "kv_token_budget": 3 * 448 + 64}, pool=True),
    Row(3, {"scheduler_mode": "rr"}, {"scheduler_mode": "random"}, "12 answers over two engines", "burst",
        {"requests": 12, "prompt": 64, "new": 32}, ("first_mean", "seconds"), base=TWO_ENGINES, pool=True),
    Row(3, {"num_engines": 1, "num_threads": 2}, {"num_engines": 2, "num_threads": 1}, "16 answers at once",
        "burst", {"requests": 16, "prompt": 64, "new": 32}, pool=True),
    Row(3, {"engine_isolation": "thread"}, {"engine_isolation": "process"}, "8 answers at once", "burst",
        EIGHT, ("tokens_per_s", "first"), pool=True),
    Row(4, {"engine_fast_decode": False}, {"engine_fast_decode": True}, "one answer, plain weights", "burst",
        ONE, ("tokens_per_s", "first"), plain=True),
    Row(4, {"speculation": "off"}, {"speculation": "prompt_lookup"},
        "one answer of 256 tokens to random ids, which comes to repeat itself", "burst", LOOPING),
    Row(4, {"speculative_max_draft_tokens": 3}, {"speculative_max_draft_tokens": 15},
        "one answer of 256 tokens to random ids, guessed by prompt_lookup", "burst", LOOPING,
        base={"speculation": "prompt_lookup"}),
)  # fmt: skip

_WHICH_MODEL = "says which model, not how fast"
_BOUND = "a bound that refuses or ends requests; how many may wait is a choice, not a speed"
NOT_LEVERS: Mapping[str, str] = {
    "model": _WHICH_MODEL,
    "model_local_dir": _WHICH_MODEL,
    "modelscope_model_name": _WHICH_MODEL,
    "model_revision": _WHICH_MODEL,
    "load_format": "makes weights up, changes no step",
    "device": "there is one device here",
    "tensor_parallel_size": "lends one model the memory of several devices, and there is one here; what it "
    "costs on a CPU is in docs/parallel.md",
    "enable_multi_device": "there is one device here",
    "trust_remote_code": "permits code, changes no step",
    "draft_model_name": _WHICH_MODEL + "; there is no smaller one of the same vocabulary here",
    "lora_adapters": "says which adapters; benchmarks/lora_bench.py times them",
    "max_loras": "a bound of what is loaded",
    "max_lora_rank": "a bound of what is loaded",
    "lora_root": "permits loading over HTTP, changes no step",
    "context_length": "a limit of what may be asked",
    "compile_mode": "how COMPILE_MODEL goes about it; the row on that runs the default",
    "enable_decode_cuda_graph": "there is no CUDA here",
    "enable_cuda_graph": "there is no CUDA here",
    "cuda_graph_max_seq_len": "there is no CUDA here",
    "force_legacy_cache": "only for models with one cache per request, which these rows do not run",
    "warm_prefixes": "computes at the start what the row on PREFIX_CACHE shows cold and warm",
    "async_prefill_queue": "decides when WARM_PREFIXES are computed, not whether",
    "prefix_cache_file": "keeps over a restart what the row on PREFIX_CACHE shows cold and warm",
    "cache_dir": "says where files are",
    "download_timeout": "no download is part of a step",
    "priority_aging_seconds": "decides who is first; the row on priority shows what being first is worth",
    "overlap_schedule": "hides work of the host behind a GPU's, and there is none here",
    "aggressive_max_new_tokens": "decides whether what does not fit is cut or refused",
    "max_context_margin": "how much of the window is left free",
    "step_timeout": _BOUND,
    "max_inflight_total": _BOUND,
    "max_inflight_per_engine": _BOUND,
    "max_queue": _BOUND,
    "queue_timeout": _BOUND,
}
