"""From a checkpoint to a backend that runs our own decoder over pages, alone or as one rank of several."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.choice import Heads, choose_attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Limits
from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.device import dtype_name, free_memory
from mini_sglang.backend.device_sampling import make_sampler
from mini_sglang.backend.dtypes import Dtypes, choose_dtypes
from mini_sglang.backend.graphs.setup import Graphs, why_not_recorded
from mini_sglang.backend.kernels.adapters import NativeAdapters
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.kernels.program import StepProgram
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.kv.pool import KVPool, kv_bytes_per_token, kv_pages_for
from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.loading.progress import progress_bar
from mini_sglang.backend.lora.store import AdapterMath, Adapters, TorchAdapters
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.compiled import CompiledDecoder, prove
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.models.dummy import RANDOM
from mini_sglang.backend.models.loader import check_tensors, expected_tensors, load_decoder
from mini_sglang.backend.models.quantization import block_formats
from mini_sglang.backend.parallel.choice import choose_size, weight_bytes, without_compiler
from mini_sglang.backend.parallel.rank import Member, Rank, place_of, rank_at
from mini_sglang.backend.parallel.shards import Division
from mini_sglang.backend.pieces import SHORT
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

logger = logging.getLogger(__name__)

# Of a recorded step: its buffers take tens of KB a row.
_PROGRAM_ROWS = 512
# Of a pool to try a model out over.
_TRIAL_TOKENS = 64


def load_native_backend(
    path: Path,
    checkpoint: Checkpoint,
    settings: Settings,
    machine: Machine,
    notify: Callable[[str], None] | None,
    member: Member | None,
) -> ModelBackend:
    """Load a model of our own decoder; see ``load_backend``. Closes the checkpoint before KV is allocated."""
    config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
    machine = _without_idle_compiler(settings, machine, config.head_dim)
    context_length = _context_length(settings, config)
    num_parameters = check_tensors(checkpoint, config)
    formats = block_formats(checkpoint, expected_tensors(config), settings.quantization)
    in_blocks = checkpoint.quantized or bool(formats)
    dtypes = choose_dtypes(settings, config, machine.device, machine.kernels, in_blocks)
    dummy = settings.load_format == "dummy"
    if notify is not None:
        kind = "quantised blocks" if in_blocks else dtype_name(dtypes.weights)
        if formats:
            kind = "fp8" if settings.quantization == "fp8" else f"{settings.quantization} blocks"
        notify(f"Loading {num_parameters / 1e6:,.0f} M parameters as {kind} on {machine.device}")
        if dummy:
            notify("LOAD_FORMAT=dummy: the weights are random, and the answers mean nothing")
    division = Division.of(config, checkpoint, formats)
    stored = weight_bytes(checkpoint, num_parameters, dtypes.weights, bool(formats))
    size = choose_size(settings, machine.device, division, stored)
    machine, compiled = without_compiler(machine, size)
    with place_of(path, settings, machine, size, member) as place:
        rank = rank_at(place, checkpoint, division)
        attention = _attention(settings, rank.config, dtypes.compute, machine)
        decoder = _load(rank, dtypes, machine, formats)
        checkpoint.close()
        rank.join(decoder)
        pages = partial(_pages, settings, rank, dtypes, machine.device, attention)
        # For what runs before the pool takes its part of the memory.
        trial = partial(pages, -(-_TRIAL_TOKENS // settings.page_size_tokens))
        if machine.compiler is not None:
            decoder, compiled = _compile(decoder, trial(), attention, context_length, machine.compiler)
        obstacle = why_not_recorded(decoder, size)
        graphs = Graphs(settings, machine.recorder, attention, context_length, obstacle, machine.triton)
        taken = graphs.measure(decoder, trial(graphs.spare_pages)) if graphs.on else 0
        num_pages = _num_pages(settings, rank, dtypes, machine.device, context_length, taken)
        kv = pages(num_pages, graphs.spare_pages)
        recorded = graphs.record(decoder, kv)
        program = _program(settings, decoder, kv, attention, machine.kernels)
        adapters = _adapters(settings, decoder, machine, program) if size == 1 else None
        backend = rank.backend(
            decoder,
            kv,
            attention,
            make_sampler(config.vocab_size, machine.device, machine.triton),
            context_length,
            num_parameters,
            machine.kernels_used,
            dtypes.weights,
            program or recorded,
            settings.quantization,
            adapters,
            compiled=compiled,
            # A file that lies there is not what is loaded.
            path=None if dummy else path,
            about={"weights": RANDOM} if dummy else None,
            graphs=graphs.describe(),
        )
    logger.info("Loaded %s", backend.describe())
    return backend


def _without_idle_compiler(settings: Settings, machine: Machine, head_dim: int) -> Machine:
    """The machine, without a compiler that is on by default and is not needed, since there are kernels.

    Raises:
        InvalidValueError: a setting that does nothing for a model of our own decoder.
    """
    if settings.force_legacy_cache:
        allowed = "0 for this model: it runs over this stack's pages, whose shape is fixed"
        raise InvalidValueError("FORCE_LEGACY_CACHE", True, allowed)
    compiler = machine.compiler
    if compiler is None:
        return machine
    if machine.kernels is not None:
        raise compiler.refusal(
            "the compiled CPU kernels run this model; KERNELS=reference has PyTorch's operators run it"
        )
    moded = "compile_mode" in settings.chosen
    if settings.kernels == "triton":
        if compiler.demanded:
            raise compiler.refusal("KERNELS=triton runs what it would compile")
        if moded:
            allowed = "unset while KERNELS=triton runs what it would compile"
            raise InvalidValueError("COMPILE_MODE", compiler.mode, allowed)
        return replace(machine, compiler=None)
    if machine.triton and TritonOperations.fit(head_dim) and not (compiler.demanded or moded):
        return replace(machine, compiler=None)
    return machine


def _attention(settings: Settings, config: ModelConfig, dtype: torch.dtype, machine: Machine) -> Attention:
    heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim, config.head_dim)
    chosen = choose_attention(
        settings.attn_impl, [heads], dtype, machine.device, settings.page_size_tokens, machine.triton
    )
    if chosen is not None:
        return chosen
    kernels = machine.kernels
    if kernels and kernels.fast and NativeAttention.fit(heads.heads, heads.kv_heads, heads.key_dim, dtype):
        return NativeAttention(kernels)
    return PagedAttention()


def _num_pages(
    settings: Settings,
    rank: Rank,
    dtypes: Dtypes,
    device: torch.device,
    context_length: int,
    taken: int,
) -> int:
    """Pages of the pool; ``taken`` bytes of the device's memory are for something else."""
    config = rank.config
    num_pages = kv_pages_for(
        token_budget=settings.kv_token_budget,
        page_size=settings.page_size_tokens,
        bytes_per_token=kv_bytes_per_token(
            config.num_layers, config.num_kv_heads, config.head_dim, dtypes.kv
        ),
        free_bytes=max(0, free_memory(device) - taken) // rank.sharing,
        context_length=context_length,
        max_batch_size=settings.max_batch_size,
        device=device,
    )
    return rank.group.least(num_pages)


def _pages(
    settings: Settings,
    rank: Rank,
    dtypes: Dtypes,
    device: torch.device,
    attention: Attention,
    num_pages: int,
    spare_pages: int = 0,
) -> KVPool:
    config, page_size = rank.config, settings.page_size_tokens
    return KVPool(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=page_size,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtypes.kv,
        device=device,
        tiled=isinstance(attention, NativeAttention) and attention.tiles(dtypes.kv, page_size),
        spare_pages=spare_pages,
    )


def _program(
    settings: Settings, decoder: Decoder, kv: KVPool, attention: Attention, kernels: NativeKernels | None
) -> StepProgram | None:
    if (
        kernels is None
        or not isinstance(attention, NativeAttention)
        or not isinstance(decoder.operations, NativeOperations)
    ):
        return None
    rows = max(settings.max_batch_size, min(settings.max_prefill_tokens, _PROGRAM_ROWS), SHORT)
    return StepProgram.build(kernels, decoder, kv, rows)


def _compile(
    decoder: Decoder, kv: KVPool, attention: Attention, context_length: int, compiler: Compiler
) -> tuple[Decoder, str]:
    """The decoder to use, and what became of ``COMPILE_MODEL``; it is proved over ``kv``."""
    limits = Limits(kv.page_size, kv.num_pages, decoder.config.vocab_size, context_length)
    compiled = CompiledDecoder(decoder, compiler)
    try:
        prove(compiled, decoder, kv, attention, limits)
    except Exception as error:
        said = " ".join(str(error).split())[:200]
        return decoder, compiler.give_up(f"the compiled model failed: {said}")
    return compiled, compiler.mode


def _adapters(
    settings: Settings, decoder: Decoder, machine: Machine, program: StepProgram | None
) -> Adapters:
    config, room, kernels = decoder.config, settings.max_loras, machine.kernels
    math: AdapterMath = TorchAdapters(machine.device, room)
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


def _load(rank: Rank, dtypes: Dtypes, machine: Machine, formats: Mapping[str, GGMLType]) -> Decoder:
    checkpoint, config = rank.checkpoint, rank.config
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
            decoder = load_decoder(
                checkpoint,
                config,
                dtypes.weights,
                machine.device,
                loaded,
                machine.kernels,
                dtypes.compute,
                formats,
                machine.triton,
            )
    if machine.triton and machine.compiler is None and TritonOperations.fit(config.head_dim):
        decoder.operations = TritonOperations(config.norm_eps)
    return decoder
