"""From a loaded model of transformers to the backends that keep a cache per request."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.device import dtype_name, free_memory
from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.transformers_models import rotations
from mini_sglang.backend.transformers_models.backend import read_transformers_config
from mini_sglang.backend.transformers_models.caches import CacheKind, why_no_fixed_shape
from mini_sglang.backend.transformers_models.decoder import TransformersConfig
from mini_sglang.backend.transformers_models.generate import GenerateBackend
from mini_sglang.backend.transformers_models.loading import load_model
from mini_sglang.backend.transformers_models.per_request import RequestBackend
from mini_sglang.backend.transformers_models.runner import Abilities, Runner, said, try_out
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError

logger = logging.getLogger(__name__)

# Of the free memory, for caches; forwards and regrouped batches take some more for a while.
_SHARE = 0.4
# Tokens that a cache's memory is counted in, where it grows.
_PORTION = 256
# Most that CONTEXT_LENGTH may say where nothing in the model ends.
_NO_END = 1 << 24
_LENGTH_NAMES = ("max_position_embeddings", "max_seq_len", "max_sequence_length", "context_length")
_DEFAULT_LENGTH = 2048


class _Room(NamedTuple):
    num_pages: int
    page_size: int


def request_backend(
    path: Path, model: Any, checkpoint: Checkpoint, settings: Settings, machine: Machine, why: str
) -> RequestBackend:
    """Serve a loaded model with one cache per request.

    Args:
        why: what keeps it off our pages, a clause.

    Raises:
        ModelLoadError: it cannot be run.
        InvalidValueError: a setting that it cannot honour.
    """
    attention = set_attention(model, settings, why)
    config = prepare(model, checkpoint, settings)
    runner, compiled = _runner(model, config, settings, machine.compiler)
    try:
        abilities = try_out(runner, config.vocab_size, model.dtype)
    except ModelLoadError as error:
        if runner.decode is model or machine.compiler is None:
            raise
        compiled = machine.compiler.give_up(str(error))
        runner = Runner(model, runner.kind, config.vocab_size)
        abilities = try_out(runner, config.vocab_size, model.dtype)
    room = _room(settings, abilities, config.context_length, machine)
    logger.warning("%s is served with one cache per request and no reuse of prefixes: %s", path.name, why)
    backend = RequestBackend(
        runner,
        abilities,
        config,
        room.num_pages,
        room.page_size,
        {
            **about_model(model, config.family),
            "implementation": "transformers per request",
            "why": why,
            "attention": attention,
            "cache": _shape(runner.kind),
            "compile": compiled,
            "cuda_graphs": _graphs(runner, machine),
        },
    )
    logger.info("Loaded %s", backend.describe())
    return backend


def generate_backend(
    path: Path, checkpoint: Checkpoint, settings: Settings, machine: Machine, dtype: torch.dtype
) -> GenerateBackend:
    """Load any model to be answered for by transformers' own ``generate``. Raises as ``request_backend``."""
    if path.is_file():
        allowed = "0 for a GGUF file, whose blocks transformers would make plain weights of"
        raise InvalidValueError("ENGINE_FAST_DECODE", True, allowed)
    model: Any = load_model(
        path, checkpoint.config, dtype, machine.device, "eager", settings.trust_remote_code
    )
    attention = set_attention(model, settings, "ENGINE_FAST_DECODE has transformers' generate run it")
    config = prepare(model, checkpoint, settings)
    runner, compiled = _runner(model, config, settings, machine.compiler)
    kind = runner.kind
    abilities = try_out(Runner(model, kind, config.vocab_size), config.vocab_size, dtype)
    if kind.places:
        why = (
            "this model keeps a sequence's state in its modules, so that generate can run one at a time only"
        )
        raise InvalidValueError("ENGINE_FAST_DECODE", True, f"0 here: {why}")
    whole = replace(abilities, no_replay="whole contexts are counted")
    room = _room(settings, whole, config.context_length, machine)
    backend = GenerateBackend(
        model,
        config,
        room.num_pages,
        fixed_shape=kind.fixed,
        compiler=machine.compiler if runner.decode is not model else None,
        about={
            **about_model(model, config.family),
            "implementation": "transformers generate",
            "attention": attention,
            "cache": _shape(kind),
            "compile": compiled,
            "cuda_graphs": _graphs(runner, machine),
        },
    )
    logger.info("Loaded %s", backend.describe())
    return backend


def set_attention(model: Any, settings: Settings, why_not_paged: str) -> str:
    """Have a model use the attention that ``ATTN_IMPL`` names; its name.

    Raises:
        InvalidValueError: it, or the machine, cannot.
    """
    name = settings.attn_impl
    if name in ("paged", "triton", "flashinfer"):
        raise InvalidValueError("ATTN_IMPL", name, f"another one for this model: {why_not_paged}")
    try:
        if name == "auto":
            name = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
        elif name == "flash_attention_2" and model.device.type != "cuda":
            raise ValueError("flash_attn runs on CUDA alone")
        model.set_attn_implementation(name)
    except Exception as error:
        raise InvalidValueError(
            "ATTN_IMPL", settings.attn_impl, f"another one for this model: {said(error)}"
        ) from error
    return f"transformers {name}"


def prepare(model: Any, checkpoint: Checkpoint, settings: Settings) -> TransformersConfig:
    """What the backends must know of a model; its rotary frequencies stand still from now on.

    Raises:
        InvalidValueError: ``CONTEXT_LENGTH`` is above what the model was made for.
    """
    text = model.config.get_text_config(decoder=True)
    config = read_transformers_config(model, checkpoint, replace(settings, context_length=0))
    stated = [int(value) for name in _LENGTH_NAMES if isinstance(value := getattr(text, name, None), int)]
    if getattr(text, "max_position_embeddings", None) is not None:
        config = read_transformers_config(model, checkpoint, settings)
    else:
        length = settings.context_length or next(iter(stated), _DEFAULT_LENGTH)
        config = replace(config, context_length=min(length, _NO_END))
    rotations.freeze(model, text, config.context_length)
    return config


def about_model(model: Any, family: str) -> dict[str, str | int]:
    """What every backend that runs a model of transformers says of it."""
    return {
        "model_type": family,
        "parameters": sum(part.numel() for part in model.parameters()),
        "dtype": dtype_name(model.dtype),
        "quantization": "none",
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "weight_bytes": sum(part.nbytes for part in model.parameters()),
    }


def _runner(
    model: Any, config: TransformersConfig, settings: Settings, compiler: Compiler | None
) -> tuple[Runner, str]:
    """What runs the model, and what became of ``COMPILE_MODEL``.

    Capture needs shapes that stay: where a cache grows with every token it turns itself off.
    """
    kind = CacheKind(model)
    runner = Runner(model, kind, config.vocab_size)
    growing = runner.grows
    if settings.force_legacy_cache and growing:
        if why := why_no_fixed_shape(model):
            raise InvalidValueError("FORCE_LEGACY_CACHE", True, f"0 for this model: {why}")
        kind = CacheKind(model, config.context_length)
        growing = False
        runner = Runner(model, kind, config.vocab_size)
    if compiler is None:
        return runner, "off"
    if growing:
        reason = _growth(model)
        logger.warning("torch.compile is off: %s", reason)
        return runner, f"off: {reason}"
    compiler.refuse_lost_graphs(model.device)
    compiled = compiler.compile(model.forward, record=True)
    return Runner(model, kind, config.vocab_size, compiled), compiler.mode


def _growth(model: Any) -> str:
    hint = "" if why_no_fixed_shape(model) else "; FORCE_LEGACY_CACHE=1 gives it a fixed shape"
    return f"the model's cache grows with every token{hint}"


def _graphs(runner: Runner, machine: Machine) -> str:
    """What became of the CUDA graphs. Not of torch.compile's own, which a cache of fixed shape allows."""
    if machine.recorder is None:
        return "off"
    if not runner.kind.fixed and runner.grows:
        reason = _growth(runner.model)
    else:
        reason = "each request has a cache elsewhere; COMPILE_MODE=reduce-overhead copies it to where it was"
    logger.warning("CUDA graphs are off: %s", reason)
    return f"off: {reason}"


def _shape(kind: CacheKind) -> str:
    return "fixed shape" if kind.fixed else "as the model makes it"


def _room(settings: Settings, abilities: Abilities, context_length: int, machine: Machine) -> _Room:
    """How many sequences, or portions of them, may live at once.

    A portion of a growing cache is counted with the whole of its fixed part, and twice where decodes are
    batched, since rows are padded to up to twice their length.

    Raises:
        InvalidValueError: a budget, or free memory, without room for one.
    """
    size = context_length
    if abilities.token_bytes and not abilities.no_replay:
        even = -(-abilities.fixed_bytes // (abilities.token_bytes * _PORTION)) * _PORTION
        size = max(_PORTION, even)
        if "page_size_tokens" in settings.chosen:
            size = settings.page_size_tokens
        size = min(size, context_length)
    padding = 1 if abilities.no_stacks else 2
    nbytes = max(1, abilities.fixed_bytes + size * abilities.token_bytes * padding)
    free = free_memory(machine.device) // machine.sharing
    if settings.kv_token_budget:
        count = settings.kv_token_budget // size
        if not count:
            raise InvalidValueError("KV_TOKEN_BUDGET", settings.kv_token_budget, f"at least {size} here")
        if count * nbytes > free:
            allowed = f"at most {free // nbytes * size}: {size} tokens take {nbytes} bytes"
            raise InvalidValueError("KV_TOKEN_BUDGET", settings.kv_token_budget, allowed)
        return _Room(count, size)
    count = min(settings.max_batch_size * -(-context_length // size), int(free * _SHARE) // nbytes)
    if not count:
        raise InvalidValueError(
            "free memory", f"{free / 2**20:.0f} MiB", f"enough for {nbytes} bytes of one cache at 40 %"
        )
    return _Room(count, size)
