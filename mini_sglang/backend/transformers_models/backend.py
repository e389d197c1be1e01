"""From a folder to a backend that runs transformers' own modelling code over our pages."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.choice import Heads, choose_attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.compiling import Compiler, warm_up
from mini_sglang.backend.device import KV_DTYPES, choose_dtype, dtype_name, free_memory
from mini_sglang.backend.device_sampling import make_sampler
from mini_sglang.backend.graphs.setup import Graphs, why_not_recorded
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kv.layered import kv_pool
from mini_sglang.backend.kv.pool import kv_pages_for
from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.config import read_eos_ids
from mini_sglang.backend.parallel.choice import choose_size, weight_bytes, without_compiler
from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.rank import Member, Place, place_of
from mini_sglang.backend.step import LoadedBackend
from mini_sglang.backend.transformers_models import rotations
from mini_sglang.backend.transformers_models.attention import stay_eager
from mini_sglang.backend.transformers_models.check import self_check
from mini_sglang.backend.transformers_models.decoder import TransformersConfig, TransformersDecoder, probe
from mini_sglang.backend.transformers_models.division import TransformersDivision, take_over
from mini_sglang.backend.transformers_models.division_check import DivisionCheck, NotDividedError
from mini_sglang.backend.transformers_models.kinds import Kind, why_per_request
from mini_sglang.backend.transformers_models.linears import pack_linears
from mini_sglang.backend.transformers_models.loading import load_model
from mini_sglang.backend.transformers_models.masks import NotPagedError
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

logger = logging.getLogger(__name__)


def load_transformers_backend(
    path: Path,
    checkpoint: Checkpoint,
    kind: Kind,
    settings: Settings,
    machine: Machine,
    notify: Callable[[str], None] | None,
    member: Member | None = None,
) -> LoadedBackend:
    """Load a model through transformers; see ``load_backend``.

    Args:
        checkpoint: the open folder; its files have been checked.
        kind: what ``choose_kind`` says.
    """
    dtype = choose_dtype(settings.dtype, machine.device)
    _refuse_settings(settings, dtype, kind)
    count = sum(math.prod(checkpoint.shape(name)) for name in checkpoint.names())
    if notify is not None:
        name = dtype_name(dtype)
        notify(f"Loading {count / 1e6:,.0f} M parameters as {name} on {machine.device} through transformers")
    # Imported here: it imports this module.
    from mini_sglang.backend.transformers_models.request_loading import generate_backend, request_backend

    division = TransformersDivision.of(path, checkpoint.config, settings, machine.device)
    stored = weight_bytes(checkpoint, count, dtype, settings.quantization != "none")
    size = choose_size(settings, machine.device, division, stored)
    if settings.engine_fast_decode:
        return generate_backend(path, checkpoint, settings, machine, dtype)
    machine, compiled = without_compiler(machine, size)
    with place_of(path, settings, machine, size, member) as place, place.group.as_default():
        model: Any = load_model(
            path, checkpoint.config, dtype, machine.device, "eager", settings.trust_remote_code, size
        )
        reason = why_per_request(model.config)
        if kind == "paged":
            try:
                if settings.force_legacy_cache:
                    allowed = "0 for this model: it runs over this stack's pages, whose shape is fixed"
                    raise InvalidValueError("FORCE_LEGACY_CACHE", True, allowed)
                return _paged(path, model, checkpoint, settings, machine, dtype, place, compiled)
            except NotDividedError as error:
                raise InvalidValueError("TENSOR_PARALLEL_SIZE", size, f"1 for this model: {error}") from error
            except NotPagedError as error:
                reason = str(error)
        if size > 1:
            allowed = f"1 for this model: each request of it has a cache of its own: {reason}"
            raise InvalidValueError("TENSOR_PARALLEL_SIZE", size, allowed)
    return request_backend(path, model, checkpoint, settings, machine, reason)


def _paged(
    path: Path,
    model: Any,
    checkpoint: Checkpoint,
    settings: Settings,
    machine: Machine,
    dtype: torch.dtype,
    place: Place,
    compiled: str,
) -> ModelBackend:
    config = read_transformers_config(model, checkpoint, settings)
    length = config.context_length
    rotations.freeze(model, model.config.get_text_config(decoder=True), length)
    count = sum(parameter.numel() for parameter in model.parameters())
    # torch.compile cannot look into the kernels.
    kernels = None if machine.compiler else machine.kernels
    if place.group.size == 1:
        pack_linears(model, kernels, settings.quantization, machine.triton)
    else:
        _divide(model, config.vocab_size, settings, machine, dtype, place.group)
    decoder = probe(model, config)
    attention = _chosen_attention(settings, decoder, dtype, machine)
    self_check(decoder, attention, dtype)
    if machine.compiler:
        compiled = _compile(decoder, attention, dtype, machine.compiler)
    page_size = settings.page_size_tokens
    pages = partial(kv_pool, decoder.shapes, page_size=page_size, dtype=dtype, device=machine.device)
    obstacle = why_not_recorded(decoder, place.group.size)
    graphs = Graphs(settings, machine.recorder, attention, length, obstacle, machine.triton)
    # Before the pool takes its part of the memory.
    taken = graphs.measure(decoder, pages(num_pages=1, spare_pages=graphs.spare_pages)) if graphs.on else 0
    num_pages = kv_pages_for(
        token_budget=settings.kv_token_budget,
        page_size=page_size,
        bytes_per_token=sum(shape.width for shape in decoder.shapes) * dtype.itemsize,
        free_bytes=max(0, free_memory(machine.device) - taken) // place.sharing,
        context_length=length,
        max_batch_size=settings.max_batch_size,
        device=machine.device,
    )
    kv = pages(num_pages=place.group.least(num_pages), spare_pages=graphs.spare_pages)
    program = graphs.record(decoder, kv)
    backend = place.backend(
        decoder,
        kv,
        attention,
        make_sampler(config.vocab_size, machine.device, machine.triton),
        length,
        count,
        machine.kernels_used,
        dtype,
        program,
        settings.quantization,
        implementation="transformers paged",
        compiled=compiled,
        path=path,
        graphs=graphs.describe(),
    )
    if machine.compiler and compiled == machine.compiler.mode:
        warm_up(backend)
    logger.info("Loaded %s", backend.describe())
    return backend


def _divide(
    model: Any, vocab_size: int, settings: Settings, machine: Machine, dtype: torch.dtype, group: Group
) -> None:
    """Have our matrices and sums take the place of those of transformers in a divided model.

    Raises:
        NotDividedError: it then is not what it is whole.
    """
    check = DivisionCheck(model, vocab_size, dtype)
    check()
    pack_linears(model, machine.kernels, settings.quantization, machine.triton, take_over(model, group))
    if settings.quantization == "none":
        check()


def read_transformers_config(model: Any, checkpoint: Checkpoint, settings: Settings) -> TransformersConfig:
    """What the backend must know of a loaded model, under these settings.

    Raises:
        InvalidValueError: ``CONTEXT_LENGTH`` is above what the model was made for.
    """
    text = model.config.get_text_config(decoder=True)
    made_for, longest = rotations.context_length(text)
    if settings.context_length > longest:
        raise InvalidValueError(
            "CONTEXT_LENGTH", settings.context_length, f"at most {longest}, the model's own"
        )
    if made_for < longest and not settings.context_length:
        logger.info(
            "the context is the model's original %d tokens; CONTEXT_LENGTH of up to %d takes the "
            "frequencies for long contexts, for short prompts too",
            made_for,
            longest,
        )
    ends = getattr(text, "eos_token_id", None)
    return TransformersConfig(
        family=str(model.config.model_type),
        vocab_size=_vocab_size(model, text),
        context_length=settings.context_length or made_for,
        eos_ids=read_eos_ids({"eos_token_id": ends, **checkpoint.config}, checkpoint.generation_config),
    )


def _vocab_size(model: Any, text: Any) -> int:
    """Ids that have a row in both the embedding and the head, where they can be seen."""
    tables = (model.get_output_embeddings(), model.get_input_embeddings())
    return min((int(table.weight.shape[0]) for table in tables if table is not None), default=text.vocab_size)


def _compile(
    decoder: TransformersDecoder, attention: Attention, dtype: torch.dtype, compiler: Compiler
) -> str:
    """Compile what is between the attention calls, and prove it again; what became of it, in words.

    Raises:
        InvalidValueError: it was asked for, and torch.compile cannot, or not rightly.
    """
    stay_eager()
    own = decoder.model.forward
    decoder.model.forward = compiler.compile(own)
    try:
        self_check(decoder, attention, dtype)
    except Exception as error:
        decoder.model.forward = own
        return compiler.give_up(f"the compiled model failed: {' '.join(str(error).split())[:200]}")
    return compiler.mode


def _chosen_attention(
    settings: Settings, decoder: TransformersDecoder, dtype: torch.dtype, machine: Machine
) -> Attention:
    if settings.attn_impl == "sdpa" and not all(call.form.fused for call in decoder.calls):
        allowed = "auto, paged or eager for this model: torch's fused attention has no soft caps and no sinks"
        raise InvalidValueError("ATTN_IMPL", settings.attn_impl, allowed)
    layers = [
        Heads(call.heads, shape.kv_heads, shape.key_dim, shape.value_dim, call.form)
        for call in decoder.calls
        for shape in [decoder.shapes[call.layer]]
    ]
    chosen = choose_attention(
        settings.attn_impl, layers, dtype, machine.device, settings.page_size_tokens, machine.triton
    )
    return chosen or _attention(decoder, machine.kernels)


def _attention(decoder: TransformersDecoder, kernels: NativeKernels | None) -> Attention:
    """The compiled kernel where every layer is of its kind; its queries are made float32."""
    fits = len(set(decoder.shapes)) == 1 and all(
        call.form.fused
        and decoder.shapes[0].key_dim == decoder.shapes[0].value_dim
        and NativeAttention.fit(
            call.heads, decoder.shapes[0].kv_heads, decoder.shapes[0].key_dim, torch.float32
        )
        for call in decoder.calls
    )
    return NativeAttention(kernels) if fits and kernels and kernels.fast else PagedAttention()


def _refuse_settings(settings: Settings, dtype: torch.dtype, kind: Kind) -> None:
    if settings.quantization != "none" and kind != "paged":
        raise InvalidValueError(
            "QUANTIZATION",
            settings.quantization,
            "none: a model that runs through transformers keeps its weights",
        )
    if settings.kv_dtype != "auto" and KV_DTYPES[settings.kv_dtype] != dtype:
        raise InvalidValueError(
            "KV_DTYPE",
            settings.kv_dtype,
            "auto: beside transformers' modelling code KV is kept as the weights are",
        )
