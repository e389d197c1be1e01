"""Every setting, declared once: variable, flag, type, default, range, help.

The command line, the README's table and ``Engine(**settings)`` are all made from ``Settings``. A
setting given as a keyword or flag wins over its environment variable, which wins over the default.
"""

from __future__ import annotations

import os
import types
import typing
from collections.abc import Mapping
from dataclasses import Field, dataclass, field, fields
from pathlib import Path
from typing import Any

from mini_sglang.errors import InvalidValueError
from mini_sglang.setting import FALSE, TRUE, default_text, markdown_table, parse_value, setting

__all__ = [
    "DEFAULT_MODEL",
    "VERSION",
    "Scalar",
    "Settings",
    "default_text",
    "plain_settings",
    "setting_fields",
    "settings_table",
    "value_type",
]

VERSION = "0.1.0"
Scalar = str | int | float | bool
DEFAULT_MODEL = "Qwen/Qwen2.5-0.5B-Instruct"

_DTYPE_SPELLINGS = {"float16": "fp16", "half": "fp16", "bfloat16": "bf16", "float32": "fp32", "float": "fp32"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The resolved settings of one engine. Make one with ``resolve``."""

    # Model and device
    model: str = setting(
        "Model and device",
        "MODEL_NAME",
        DEFAULT_MODEL,
        "a Hugging Face repository, a local folder, or a .gguf file",
    )
    model_local_dir: Path | None = setting(
        "Model and device",
        "MODEL_LOCAL_DIR",
        None,
        "a folder or .gguf file already on disk; wins over MODEL_NAME and touches no network",
    )
    modelscope_model_name: str | None = setting(
        "Model and device",
        "MODELSCOPE_MODEL_NAME",
        None,
        "the repository asked of ModelScope when the Hugging Face hub cannot be reached",
        shown="same as `MODEL_NAME`",
    )
    model_revision: str = setting(
        "Model and device",
        "MODEL_REVISION",
        "main",
        "branch, tag or commit of the repository; ModelScope's default branch is used for `main`",
    )
    load_format: str = setting(
        "Model and device",
        "LOAD_FORMAT",
        "auto",
        "dummy makes random weights for the config.json of a folder, to measure speed without the real ones; "
        "where there is no tokenizer either every byte is a token; the answers mean nothing",
        choices=("auto", "dummy"),
    )
    dtype: str = setting(
        "Model and device",
        ("MODEL_DTYPE", "TORCH_DTYPE"),
        "auto",
        "the type of plain weights and of what is computed with them; auto takes bf16 where the device "
        "multiplies it, else fp16 on a GPU and fp32 on a CPU; the compiled CPU kernels add up in fp32",
        choices=("auto", "fp16", "bf16", "fp32"),
        spellings=_DTYPE_SPELLINGS,
    )
    kv_dtype: str = setting(
        "Model and device",
        "KV_DTYPE",
        "auto",
        "the type KV is kept in; beside quantised weights auto takes bf16 or fp16, what the "
        "compiled CPU kernels are faster with, else the model's own; other choices need those kernels",
        choices=("auto", "fp16", "bf16", "fp32", "int8"),
        spellings=_DTYPE_SPELLINGS,
    )
    device: str = setting(
        "Model and device",
        "DEVICE",
        "auto",
        "where the model runs; auto takes CUDA, then MPS, then the CPU",
        choices=("auto", "cpu", "cuda", "mps"),
    )
    kernels: str = setting(
        "Model and device",
        "KERNELS",
        "auto",
        "on a CPU, auto compiles C++ matrix products at first use, where there is a compiler; on CUDA it "
        "takes Triton's kernels, but for what COMPILE_MODEL=1 compiles, which triton does not; "
        "reference runs everything on PyTorch's operators",
        choices=("auto", "reference", "triton"),
    )
    gguf_dequantize: str = setting(
        "Model and device",
        "GGUF_DEQUANTIZE",
        "auto",
        "1 turns a GGUF's quantised blocks into plain weights at load; 0 keeps them as they are in the file; "
        "auto keeps them where every one has a fast kernel, which rounds activations to 8 bits",
        choices=("auto", "0", "1"),
        spellings=dict.fromkeys(TRUE, "1") | dict.fromkeys(FALSE, "0"),
    )
    quantization: str = setting(
        "Model and device",
        "QUANTIZATION",
        "none",
        "makes of dense matrices at load: int8 and int4 ggml's blocks, Q8_0, and Q4_1 (embedding and head "
        "Q8_0), computed with in MODEL_DTYPE; fp8, on CUDA from compute capability 8.9 on, e4m3 with a scale "
        "per row, activations too (embedding and head stay); a GGUF's own blocks are used as they are",
        choices=("none", "int8", "int4", "fp8"),
    )
    attn_impl: str = setting(
        "Model and device",
        ("ATTN_IMPL", "ATTN_IMPLEMENTATION"),
        "auto",
        "attention: paged is this stack's own (triton on CUDA), sdpa torch's fused one and eager an explicit "
        "softmax over its pages; flashinfer and flash_attention_2 are packages for CUDA; for a model with "
        "one cache per request, the way transformers does it; auto takes the fastest that the model allows",
        choices=("auto", "paged", "triton", "sdpa", "eager", "flashinfer", "flash_attention_2"),
    )
    compile_model: str = setting(
        "Model and device",
        "COMPILE_MODEL",
        "auto",
        "torch.compile around a model that runs on PyTorch's operators: KERNELS=reference, or transformers' "
        "own code; 1 also where Triton's kernels are faster, and is refused where the compiled CPU kernels "
        "run it; takes a minute at the start",
        choices=("auto", "0", "1"),
        spellings=dict.fromkeys(TRUE, "1") | dict.fromkeys(FALSE, "0"),
        shown="on for CUDA",
    )
    compile_mode: str = setting(
        "Model and device",
        "COMPILE_MODE",
        "default",
        "how torch.compile goes about it; what it says of CUDA graphs is left to those below, but for a "
        "model with one cache per request",
        choices=("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"),
    )
    trust_remote_code: bool = setting(
        "Model and device",
        "TRUST_REMOTE_CODE",
        False,
        "allow a repository's own Python code to make its tokenizer and model (needs transformers)",
    )
    tensor_parallel_size: int = setting(
        "Model and device",
        "TENSOR_PARALLEL_SIZE",
        0,
        "processes that each hold a part of one model and run every step together, on as many GPUs, or on a "
        "CPU, whose threads they share out",
        low=0,
        high=64,
        shown="1, or as many GPUs as the model needs to fit",
    )
    enable_multi_device: bool = setting(
        "Model and device",
        "ENABLE_MULTI_DEVICE",
        True,
        "an engine of the server on every GPU, or on every group of TENSOR_PARALLEL_SIZE of them; 0 keeps to "
        "the first GPU or group, and to one GPU where TENSOR_PARALLEL_SIZE does not ask for more",
    )
    context_length: int = setting(
        "Model and device",
        "CONTEXT_LENGTH",
        0,
        "longest prompt and answer together, in tokens; 0 is what the model was made for",
        low=0,
        high=1 << 24,
    )
    lora_adapters: str | None = setting(
        "Model and device",
        "LORA_ADAPTERS",
        None,
        "LoRA adapters to load at the start, name=folder or name=repository, with commas between",
    )
    max_loras: int = setting(
        "Model and device",
        "MAX_LORAS",
        8,
        "LoRA adapters that may be loaded at a time",
        low=1,
        high=1024,
    )
    max_lora_rank: int = setting(
        "Model and device",
        "MAX_LORA_RANK",
        64,
        "highest rank of a LoRA adapter",
        low=1,
        high=4096,
    )
    lora_root: Path | None = setting(
        "Model and device",
        "LORA_ROOT",
        None,
        "the folder that clients may load and unload LoRA adapters from, over HTTP; without it they may not",
    )
    num_threads: int = setting(
        "Model and device",
        "NUM_THREADS",
        0,
        "CPU threads for the model; 0 is every core this process may use",
        low=0,
        high=1024,
    )
    cache_dir: Path = setting(
        "Model and device",
        "MINI_SGLANG_CACHE",
        Path("~/.cache/mini-sglang"),
        "where the starter model, converted tokenizers and compiled kernels are kept",
    )
    download_timeout: float = setting(
        "Model and device",
        "DOWNLOAD_TIMEOUT",
        30.0,
        "seconds a download may stand still before it is given up",
        low=1,
        high=3600,
    )
    # Caches
    prefix_cache: bool = setting(
        "Caches", "PREFIX_CACHE", True, "reuse the KV of the longest prefix seen before (radix tree)"
    )
    prefix_cache_size: int = setting(
        "Caches",
        "PREFIX_CACHE_SIZE",
        0,
        "most stored prefixes (leaves of the tree); 0 is no bound but tokens",
        low=0,
        high=1 << 31,
    )
    prefix_cache_max_tokens: int = setting(
        "Caches",
        "PREFIX_CACHE_MAX_TOKENS",
        4096,
        "prompts longer than this are not put in the cache",
        low=1,
        high=1 << 31,
    )
    prefix_cache_token_budget: int = setting(
        "Caches",
        "PREFIX_CACHE_TOKEN_BUDGET",
        65536,
        "most cached tokens that no running request uses",
        low=0,
        high=1 << 31,
    )
    prefix_cache_policy: str = setting(
        "Caches",
        "PREFIX_CACHE_POLICY",
        "lru",
        "what is dropped first: least recently or least frequently used",
        choices=("lru", "lfu"),
    )
    prefill_cache_size: int = setting(
        "Caches",
        "PREFILL_CACHE_SIZE",
        8,
        "most prompts kept whole with their last logits: one seen before is not computed at all; 0 is none",
        low=0,
        high=65536,
    )
    prefill_cache_token_budget: int = setting(
        "Caches",
        "PREFILL_CACHE_TOKEN_BUDGET",
        65536,
        "most tokens of the prompts that PREFILL_CACHE_SIZE counts",
        low=0,
        high=1 << 31,
    )
    page_token_budget: int = setting(
        "Caches",
        "PAGE_TOKEN_BUDGET",
        0,
        "tokens of a second tier in host memory, for prefixes that the KV pool has no room for; 0 is none",
        low=0,
        high=1 << 31,
    )
    warm_prefixes: str | None = setting(
        "Caches",
        "WARM_PREFIXES",
        None,
        "texts to put in the prefix cache at the start, with || between",
    )
    async_prefill_queue: bool = setting(
        "Caches",
        "ASYNC_PREFILL_QUEUE",
        False,
        "compute WARM_PREFIXES while no request is there, instead of before the first one is taken",
    )
    prefix_cache_file: Path | None = setting(
        "Caches",
        "PREFIX_CACHE_FILE",
        None,
        "where the prefix cache is saved at the end and loaded at the next start; each engine but the first "
        "adds its number to the name",
    )
    page_size_tokens: int = setting(
        "Caches",
        "PAGE_SIZE_TOKENS",
        16,
        "tokens per KV page; the prefix cache shares whole pages",
        low=1,
        high=256,
    )
    kv_token_budget: int = setting(
        "Caches",
        "KV_TOKEN_BUDGET",
        0,
        "tokens in the KV pool; 0 sizes it from free memory",
        low=0,
        high=1 << 31,
        shown="from free memory",
    )
    # Scheduling
    chunked_prefill: bool = setting(
        "Scheduling",
        "CHUNKED_PREFILL",
        True,
        "split long prompts, so that running answers go on between the chunks",
    )
    prefill_chunk_size: int = setting(
        "Scheduling",
        "PREFILL_CHUNK_SIZE",
        512,
        "with CHUNKED_PREFILL: prompt tokens per step",
        low=1,
        high=1 << 20,
    )
    overlap_schedule: str = setting(
        "Scheduling",
        "OVERLAP_SCHEDULE",
        "auto",
        "plan the next step, and send what the last one gave, while the device runs one; auto does so on "
        "CUDA, 1 on a CPU too, in a thread",
        choices=("auto", "0", "1"),
    )
    max_batch_size: int = setting(
        "Scheduling", "MAX_BATCH_SIZE", 64, "requests that run together", low=1, high=4096
    )
    max_prefill_tokens: int = setting(
        "Scheduling",
        "MAX_PREFILL_TOKENS",
        4096,
        "without CHUNKED_PREFILL: prompt tokens of several requests per step; one longer prompt runs alone",
        low=1,
        high=1 << 20,
    )
    adaptive_max_new_tokens: bool = setting(
        "Scheduling",
        "ADAPTIVE_MAX_NEW_TOKENS",
        False,
        "give a request fewer max_new_tokens while many are in flight; the answer says so",
    )
    adaptive_max_inflight_threshold: int = setting(
        "Scheduling",
        "ADAPTIVE_MAX_INFLIGHT_THRESHOLD",
        0,
        "with ADAPTIVE_MAX_NEW_TOKENS: requests in flight, waiting ones too, past which a new one gets "
        "fewer; 0 is the number of engines",
        low=0,
        high=1 << 20,
        shown="number of engines",
    )
    adaptive_max_new_tokens_factor: float = setting(
        "Scheduling",
        "ADAPTIVE_MAX_NEW_TOKENS_FACTOR",
        0.8,
        "with ADAPTIVE_MAX_NEW_TOKENS: the part it gets of what it asked for",
        low=0.01,
        high=1,
    )
    priority_aging_seconds: float = setting(
        "Scheduling",
        "PRIORITY_AGING_SECONDS",
        5.0,
        "seconds of waiting that count as one step of a request's priority; 0 is strict priority, under "
        "which a low one may wait for ever",
        low=0,
        high=86400,
    )
    aggressive_max_new_tokens: bool = setting(
        "Scheduling",
        "AGGRESSIVE_MAX_NEW_TOKENS",
        True,
        "lower max_new_tokens to what the context window leaves; 0 refuses such a request",
    )
    max_context_margin: int = setting(
        "Scheduling",
        "MAX_CONTEXT_MARGIN",
        16,
        "tokens of the context window that AGGRESSIVE_MAX_NEW_TOKENS leaves free",
        low=0,
        high=1 << 20,
    )
    scheduler_mode: str = setting(
        "Scheduling",
        "SCHEDULER_MODE",
        "rr",
        "which engine serves a request: each in turn, the one with the lowest load, any, or the one that "
        "has most of the prompt cached",
        choices=("rr", "fsfs", "random", "cache_aware"),
    )
    num_engines: int = setting(
        "Scheduling",
        "NUM_ENGINES",
        0,
        "engines of the server, each with the whole model; 0 is one, or what ENABLE_MULTI_DEVICE says",
        low=0,
        high=64,
    )
    engine_isolation: str = setting(
        "Scheduling",
        "ENGINE_ISOLATION",
        "process",
        "whether an engine of the server has a process of its own, whose death the server survives",
        choices=("process", "thread"),
    )
    step_timeout: float = setting(
        "Scheduling",
        "STEP_TIMEOUT",
        600.0,
        "seconds after which an engine's process that gives no sign of life is ended; 0 is never",
        low=0,
        high=86400,
    )
    max_inflight_total: int = setting(
        "Scheduling",
        "MAX_INFLIGHT_TOTAL",
        0,
        "requests that all engines of the server may have at a time; 0 is what the engines take",
        low=0,
        high=1 << 20,
    )
    max_inflight_per_engine: int = setting(
        "Scheduling",
        "MAX_INFLIGHT_PER_ENGINE",
        0,
        "requests that one engine of the server may have at a time; 0 is a quarter more than MAX_BATCH_SIZE",
        low=0,
        high=1 << 20,
    )
    max_queue: int = setting(
        "Scheduling",
        "MAX_QUEUE",
        256,
        "requests that may wait in the server for an engine; more are refused",
        low=0,
        high=1 << 20,
    )
    queue_timeout: float = setting(
        "Scheduling",
        "QUEUE_TIMEOUT",
        60.0,
        "seconds a request may wait in the server for an engine",
        low=0.001,
        high=86400,
    )
    # Decode speed
    speculation: str = setting(
        "Decode speed",
        "SPECULATIVE",
        "off",
        "guess tokens ahead and check several in one step, with the same answer: from what the text repeats, "
        "or by DRAFT_MODEL_NAME where it does not; a request may choose for itself",
        choices=("off", "prompt_lookup", "draft_model"),
    )
    speculative_max_draft_tokens: int = setting(
        "Decode speed",
        "SPECULATIVE_MAX_DRAFT_TOKENS",
        15,
        "most tokens guessed ahead for a request in one step",
        low=1,
        high=127,
    )
    draft_model_name: str | None = setting(
        "Decode speed",
        "DRAFT_MODEL_NAME",
        None,
        "a small model of the same vocabulary that guesses tokens for the large one: a repository, a local "
        "folder, or a .gguf file",
    )
    enable_decode_cuda_graph: bool = setting(
        "Decode speed",
        "ENABLE_DECODE_CUDA_GRAPH",
        True,
        "on CUDA, record the step of so many decodes once, for numbers up to MAX_BATCH_SIZE, and replay it; "
        "needs Triton's attention, without which it turns itself off and says so",
        shown="on for CUDA",
    )
    enable_cuda_graph: bool = setting(
        "Decode speed",
        "ENABLE_CUDA_GRAPH",
        True,
        "the same for the step of a prompt, or of a chunk of one, that runs alone",
        shown="on for CUDA",
    )
    cuda_graph_max_seq_len: int = setting(
        "Decode speed",
        "CUDA_GRAPH_MAX_SEQ_LEN",
        512,
        "with ENABLE_CUDA_GRAPH: most tokens of such a step",
        low=2,
        high=65536,
    )
    force_legacy_cache: bool = setting(
        "Decode speed",
        "FORCE_LEGACY_CACHE",
        False,
        "for a model with one cache per request: ask for caches of a fixed shape, a whole context each, so "
        "that COMPILE_MODEL can capture its decode; a cache that grows turns that off",
    )
    engine_fast_decode: bool = setting(
        "Decode speed",
        "ENGINE_FAST_DECODE",
        False,
        "answer through transformers' own generate, one request after another in a step, not by this "
        "stack's loop; for any model in a folder, not for a GGUF file",
    )
    # Server
    host: str = setting(
        "Server", "HOST", "127.0.0.1", "the address the server listens at; 0.0.0.0 is every one"
    )
    port: int = setting("Server", "PORT", 8000, "the server's port; 0 takes a free one", low=0, high=65535)
    api_key: str | None = setting(
        "Server",
        "API_KEY",
        None,
        "what a client must show, or several with commas between, whose prefix caches are then kept apart",
        secret=True,
    )
    cors_origins: str | None = setting(
        "Server",
        "CORS_ORIGINS",
        None,
        "origins whose pages may call the server, with commas between; * is any",
    )
    allowed_hosts: str | None = setting(
        "Server",
        "ALLOWED_HOSTS",
        None,
        "names a client may call the server by (its Host header), with commas between; * is any",
        shown="any, but on a loopback address only its own names",
    )
    max_body_bytes: int = setting(
        "Server", "MAX_BODY_BYTES", 8 << 20, "longest request body", low=1, high=1 << 30
    )
    max_prompts_per_request: int = setting(
        "Server", "MAX_PROMPTS_PER_REQUEST", 128, "prompts, or answers to one, per request", low=1, high=4096
    )
    request_timeout: float = setting(
        "Server",
        "REQUEST_TIMEOUT",
        600.0,
        "seconds a request may take from its arrival to its last token",
        low=0.1,
        high=86400,
    )
    read_timeout: float = setting(
        "Server", "READ_TIMEOUT", 30.0, "seconds a client may take to send its request", low=0.1, high=3600
    )
    write_timeout: float = setting(
        "Server",
        "WRITE_TIMEOUT",
        60.0,
        "seconds a client may go without reading before its request is given up",
        low=0.1,
        high=3600,
    )
    drain_timeout: float = setting(
        "Server",
        "DRAIN_TIMEOUT",
        30.0,
        "seconds that running requests get to finish once the server is told to end",
        low=0,
        high=3600,
    )
    responses_store_size: int = setting(
        "Server",
        "RESPONSES_STORE_SIZE",
        256,
        "answers of /v1/responses kept for previous_response_id, the oldest dropped first; 0 keeps none",
        low=0,
        high=1 << 20,
    )
    # Logs
    log_level: str = setting(
        "Logs",
        "LOG_LEVEL",
        "warning",
        "info follows each request through the stack, token by token",
        choices=("debug", "info", "warning", "error"),
    )
    chosen: frozenset[str] = field(default=frozenset(), repr=False)
    """Names of the settings that somebody set, by keyword, flag or variable."""

    @classmethod
    def resolve(
        cls, overrides: Mapping[str, object] | None = None, env: Mapping[str, str] | None = None
    ) -> Settings:
        """Merge keywords over environment variables over defaults, and check every value.

        Args:
            overrides: by field name or lower-case variable name (``dtype``, ``model_dtype``); ``None``
                counts as not given.
            env: the environment; the process's own by default.

        Raises:
            InvalidValueError: an unknown name, a wrong type, or a value out of range.
        """
        env = os.environ if env is None else env
        values: dict[str, Any] = {}
        for spec in setting_fields():
            for variable in spec.metadata["env"]:
                if env.get(variable, "") != "" and spec.name not in values:
                    values[spec.name] = parse_value(spec, value_type(spec), variable, env[variable])
        names = _keyword_names()
        given: set[str] = set()
        for keyword, value in (overrides or {}).items():
            if keyword not in names:
                raise InvalidValueError("setting", keyword, "one of " + ", ".join(sorted(names)))
            if value is None:
                continue
            spec = names[keyword]
            if spec.name in given:
                raise InvalidValueError(keyword, value, f"given once, under one of its names ({spec.name})")
            given.add(spec.name)
            values[spec.name] = parse_value(spec, value_type(spec), keyword, value)
        # MODEL_LOCAL_DIR wins over MODEL_NAME, but not over a model named by keyword or flag.
        if "model" in given and "model_local_dir" not in given:
            values.pop("model_local_dir", None)
        return cls(**values, chosen=frozenset(values))

    @property
    def cache_path(self) -> Path:
        return self.cache_dir.expanduser()


def setting_fields() -> tuple[Field[Any], ...]:
    """The declared settings, in order; ``metadata`` has section, env, help, low, high, choices, shown."""
    return tuple(f for f in fields(Settings) if f.name != "chosen")


def plain_settings(settings: Settings) -> dict[str, Scalar]:
    """What ``Settings.resolve`` needs to make these settings again in another process; secrets stay here."""
    plain: dict[str, Scalar] = {}
    for spec in setting_fields():
        value = getattr(settings, spec.name)
        secret = spec.name.startswith("api_key")
        if value is not None and not secret and (spec.name in settings.chosen or value != spec.default):
            plain[spec.name] = str(value) if isinstance(value, Path) else value
    return plain


def value_type(spec: Field[Any]) -> type:
    """The plain type of a setting's value: bool, int, float, str or Path."""
    hint = typing.get_type_hints(Settings)[spec.name]
    if isinstance(hint, types.UnionType):
        hint = next(arg for arg in typing.get_args(hint) if arg is not type(None))
    assert isinstance(hint, type)
    return hint


def settings_table() -> str:
    """The README's table of settings, in Markdown."""
    return markdown_table(setting_fields())


def _keyword_names() -> dict[str, Field[Any]]:
    names: dict[str, Field[Any]] = {}
    for spec in setting_fields():
        names[spec.name] = spec
        for variable in spec.metadata["env"]:
            names[variable.lower()] = spec
    return names
