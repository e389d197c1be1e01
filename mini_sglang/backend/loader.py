"""From a model's files and the settings to a backend: what runs it, in which types, over how many pages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import torch

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.choice import OWN, Heads, choose_attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Limits
from mini_sglang.backend.compiling import Compiler, choose_compiler
from mini_sglang.backend.device import (
    KV_DTYPES,
    choose_device,
    choose_dtype,
    choose_threads,
    dtype_name,
    free_memory,
)
from mini_sglang.backend.device_sampling import make_sampler
from mini_sglang.backend.kernels.adapters import NativeAdapters
from mini_sglang.backend.kernels.library import NativeKernels, open_kernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.kernels.program import StepProgram
from mini_sglang.backend.kernels.triton.available import triton_wanted
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.kv.pool import KVPool, kv_bytes_per_token, kv_pages_for
from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.loading.progress import progress_bar
from mini_sglang.backend.lora.store import AdapterMath, Adapters, TorchAdapters
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.compiled import CompiledDecoder, prove
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.models.loader import check_tensors, expected_tensors, load_decoder
from mini_sglang.backend.models.quantization import block_formats
from mini_sglang.backend.pieces import SHORT
from mini_sglang.backend.step import LoadedBackend
from mini_sglang.backend.transformers_models.kinds import choose_kind
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

logger = logging.getLogger(__name__)

# Of a recorded step: its buffers take tens of KB a row.
_PROGRAM_ROWS = 512
_DEQUANTIZE = MappingProxyType({"auto": None, "0": False, "1": True})


def load_backend(
    path: Path, settings: Settings, notify: Callable[[str], None] | None = None, *, sharing: int = 1
) -> LoadedBackend:
    """Load the model at ``path``, a folder or a ``.gguf`` file, and allocate its KV pool.

    Sets the number of torch's CPU threads, which belongs to the whole process.

    Args:
        notify: called with a line for the user when something slow begins.
        sharing: backends that are loaded side by side and share the device's free memory.

    Raises:
        ModelLoadError: the model is damaged, incomplete or unsupported.
        InvalidValueError: a setting that this model or machine cannot honour.
    """
    device = choose_device(settings.device)
    compiler = choose_compiler(settings, device)
    threads = choose_threads(settings.num_threads)
    torch.set_num_threads(threads)
    kernels, kernels_used = open_kernels(
        settings.kernels, device, settings.cache_path / "kernels", threads, notify
    )
    triton = triton_wanted(settings.kernels, device)
    checkpoint = open_checkpoint(
        path,
        dequantize=_DEQUANTIZE[settings.gguf_dequantize],
        fast_types=kernels.fast_formats if kernels else frozenset(),
    )
    try:
        served = choose_kind(path, checkpoint.config, settings.trust_remote_code)
        if served != "native" or settings.engine_fast_decode:
            # Imported here, since most models do without.
            from mini_sglang.backend.transformers_models.backend import Machine, load_transformers_backend

            machine = Machine(device, kernels, kernels_used, sharing, compiler, triton)
            return load_transformers_backend(path, checkpoint, served, settings, machine, notify)
        if settings.kernels == "triton" and compiler is not None and not compiler.demanded:
            # On by default; its pieces would be of torch's operators.
            compiler = None
        _refuse_levers(settings, compiler, kernels)
        config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
        context_length = _context_length(settings, config)
        num_parameters = check_tensors(checkpoint, config)
        formats = block_formats(checkpoint, expected_tensors(config), settings.quantization)
        in_blocks = checkpoint.quantized or bool(formats)
        dtypes = _dtypes(settings, config, device, kernels, in_blocks)
        if notify is not None:
            kind = "quantised blocks" if in_blocks else dtype_name(dtypes.weights)
            if formats:
                kind = f"{settings.quantization} blocks"
            notify(f"Loading {num_parameters / 1e6:,.0f} M parameters as {kind} on {device}")
        chosen = choose_attention(
            settings.attn_impl,
            [Heads(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim)],
            dtypes.compute,
            device,
            settings.page_size_tokens,
            triton,
        )
        decoder = _load(checkpoint, config, dtypes, device, kernels, formats)
        if triton and compiler is None and TritonOperations.fit(config.head_dim):
            decoder.operations = TritonOperations(config.norm_eps)
    finally:
        checkpoint.close()
    per_token = kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, dtypes.kv)
    num_pages = kv_pages_for(
        token_budget=settings.kv_token_budget,
        page_size=settings.page_size_tokens,
        bytes_per_token=per_token,
        free_bytes=free_memory(device) // sharing,
        context_length=context_length,
        max_batch_size=settings.max_batch_size,
    )
    attention = chosen or _attention(config, dtypes.compute, kernels)
    kv = KVPool(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=settings.page_size_tokens,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtypes.kv,
        device=device,
        tiled=isinstance(attention, NativeAttention)
        and attention.tiles(dtypes.kv, settings.page_size_tokens),
    )
    program = None
    if (
        kernels
        and isinstance(attention, NativeAttention)
        and isinstance(decoder.operations, NativeOperations)
    ):
        rows = max(settings.max_batch_size, min(settings.max_prefill_tokens, _PROGRAM_ROWS), SHORT)
        program = StepProgram.build(kernels, decoder, kv, rows)
    compiled = "off"
    if compiler is not None:
        limits = Limits(kv.page_size, num_pages, config.vocab_size, context_length)
        decoder, compiled = _compile(decoder, kv, attention, limits, compiler)
    backend = ModelBackend(
        decoder,
        kv,
        attention,
        make_sampler(config.vocab_size, device),
        context_length,
        num_parameters,
        kernels_used,
        dtypes.weights,
        program,
        settings.quantization,
        _adapters(settings, decoder, device, kernels, program),
        compiled=compiled,
        path=path,
    )
    logger.info("Loaded %s", backend.describe())
    return backend


class _Dtypes(NamedTuple):
    weights: torch.dtype  # of the plain ones
    compute: torch.dtype  # of what is between the products
    kv: torch.dtype


def _dtypes(
    settings: Settings,
    config: ModelConfig,
    device: torch.device,
    kernels: NativeKernels | None,
    quantized: bool,
) -> _Dtypes:
    """What the settings come to for this model.

    Raises:
        InvalidValueError: a dtype that the device or the operators in use cannot honour.
    """
    weights = choose_dtype(settings.dtype, device)
    if quantized and settings.dtype == "auto" and device.type == "cpu":
        weights = torch.float32
    sizes = config.hidden_size, config.intermediate_size, config.head_dim
    if (
        kernels is not None
        and kernels.fast
        and NativeOperations.fit(*sizes, torch.float32)
        and NativeAttention.fit(config.num_heads, config.num_kv_heads, config.head_dim, torch.float32)
    ):
        if settings.attn_impl not in OWN:
            if settings.kv_dtype not in ("auto", "fp32"):
                raise InvalidValueError(
                    "KV_DTYPE", settings.kv_dtype, f"auto or fp32 with ATTN_IMPL={settings.attn_impl}"
                )
            return _Dtypes(weights, torch.float32, torch.float32)
        kv = KV_DTYPES.get(settings.kv_dtype, kernels.half if quantized else weights)
        return _Dtypes(weights, torch.float32, kv)
    if settings.kv_dtype != "auto" and KV_DTYPES[settings.kv_dtype] != weights:
        raise InvalidValueError(
            "KV_DTYPE",
            settings.kv_dtype,
            f"auto: KV is kept as {dtype_name(weights)} where the compiled CPU kernels do not run the model",
        )
    return _Dtypes(weights, weights, weights)


def _refuse_levers(settings: Settings, compiler: Compiler | None, kernels: NativeKernels | None) -> None:
    """Refuse what would do nothing for a model that our own decoder runs."""
    if settings.force_legacy_cache:
        allowed = "0 for this model: it runs over this stack's pages, whose shape is fixed"
        raise InvalidValueError("FORCE_LEGACY_CACHE", True, allowed)
    if compiler is not None and kernels is not None:
        raise compiler.refusal(
            "the compiled CPU kernels run this model; KERNELS=reference has PyTorch's operators run it"
        )
    if compiler is not None and settings.kernels == "triton":
        raise compiler.refusal("KERNELS=triton runs what it would compile")


def _compile(
    decoder: Decoder, kv: KVPool, attention: Attention, limits: Limits, compiler: Compiler
) -> tuple[Decoder, str]:
    """The decoder to use, and what became of ``COMPILE_MODEL``."""
    compiled = CompiledDecoder(decoder, compiler)
    try:
        prove(compiled, decoder, kv, attention, limits)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return decoder, compiler.give_up(f"the compiled model failed: {said}")
    return compiled, compiler.mode


def _attention(config: ModelConfig, dtype: torch.dtype, kernels: NativeKernels | None) -> Attention:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if kernels and kernels.fast and NativeAttention.fit(heads, kv_heads, config.head_dim, dtype):
        return NativeAttention(kernels)
    return PagedAttention()


def _adapters(
    settings: Settings,
    decoder: Decoder,
    device: torch.device,
    kernels: NativeKernels | None,
    program: StepProgram | None,
) -> Adapters:
    config, room = decoder.config, settings.max_loras
    math: AdapterMath = TorchAdapters(device, room)
    if kernels is not None and kernels.fast and decoder.dtype == torch.float32:
        math = NativeAdapters(kernels, config.num_layers, room)
        if program is not None:
            program.adapt(math)
    return Adapters(config, math, room, settings.max_lora_rank)


def _context_length(settings: Settings, config: ModelConfig) -> int:
    if settings.context_length > config.context_length:
        raise InvalidValueError(
            "CONTEXT_LENGTH", settings.context_length, f"at most {config.context_length}, the model's own"
        )
    return settings.context_length or config.context_length


def _load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtypes: _Dtypes,
    device: torch.device,
    kernels: NativeKernels | None,
    formats: Mapping[str, GGMLType],
) -> Decoder:
    counts = {name: math.prod(shape) for name, shape in expected_tensors(config).items()}
    total = sum(counts.values())
    # The bar counts the file's bytes, shared out by the numbers in each tensor.
    with progress_bar(checkpoint.nbytes, "Loading weights") as bar:
        done = shown = 0

        def loaded(name: str) -> None:
            nonlocal done, shown
            done += counts[name]
            now = checkpoint.nbytes * done // total
            bar.update(now - shown)
            shown = now

        with torch.inference_mode():
            return load_decoder(
                checkpoint, config, dtypes.weights, device, loaded, kernels, dtypes.compute, formats
            )
