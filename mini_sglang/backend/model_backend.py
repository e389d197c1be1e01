"""The facade of the backend floor: a model, its KV pool and its sampler behind ``run``."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.device import choose_device, choose_dtype, choose_threads, free_memory
from mini_sglang.backend.kernels.library import NativeKernels, open_kernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.kernels.program import StepProgram
from mini_sglang.backend.kv.pool import KVPool, kv_bytes_per_token, kv_pages_for
from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint
from mini_sglang.backend.loading.progress import progress_bar
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.models.loader import check_tensors, expected_tensors, load_decoder
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SequenceResult, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import TokenLogprob

logger = logging.getLogger(__name__)

# Rows of prompt logprobs at a time: a row of float32 logits is up to a megabyte.
_LOGPROB_ROWS = 128
_DEQUANTIZE = MappingProxyType({"auto": None, "0": False, "1": True})


class ModelBackend:
    """A loaded model; implements ``Backend``. Make one with ``load_backend``.

    Not thread-safe: one thread calls ``run``.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv: KVPool,
        attention: Attention,
        sampler: Sampler,
        context_length: int,
        num_parameters: int,
        kernels: str,
        program: StepProgram | None = None,
    ) -> None:
        self.decoder = decoder
        self.kv = kv
        self._attention = attention
        self._sampler = sampler
        self._num_parameters = num_parameters
        self._kernels = kernels
        self._program = program
        self._limits = Limits(kv.page_size, kv.num_pages, decoder.config.vocab_size, context_length)

    @property
    def page_size(self) -> int:
        return self.kv.page_size

    @property
    def num_pages(self) -> int:
        return self.kv.num_pages

    @property
    def vocab_size(self) -> int:
        return self.decoder.config.vocab_size

    @property
    def context_length(self) -> int:
        return self._limits.context_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self.decoder.config.eos_ids

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        """See ``Backend.run``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``; nothing has run.
        """
        if not steps:
            return []
        with torch.inference_mode():
            device = self.kv.data.device
            batch = Batch.build(steps, self._limits, device)
            if self._program is not None and self._program.takes(batch):
                hidden = self._program.forward(batch)
            else:
                hidden = self.decoder.forward(batch, self.kv, self._attention)
            sampled: dict[int, SequenceResult] = {}
            if batch.samples:
                places, rows = zip(*batch.samples, strict=True)
                # Without prompts, tokens are chosen after all the output rows, in their order.
                picked = hidden[torch.tensor(rows, device=device)] if batch.prompts else hidden
                chosen = self._sampler.sample(self.decoder.logits(picked), batch.specs)
                sampled = dict(zip(places, chosen, strict=True))
            results = [sampled.get(place) or SequenceResult() for place in range(len(steps))]
            for place, first, stop in batch.prompts:
                step = steps[place]
                results[place].prompt_logprobs = self._prompt_logprobs(
                    hidden[first:stop], step.prompt_targets, step.prompt_top
                )
            return results

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
        config = self.decoder.config
        per_token = kv_bytes_per_token(
            config.num_layers, config.num_kv_heads, config.head_dim, self.kv.data.dtype
        )
        return {
            "model_type": config.family,
            "parameters": self._num_parameters,
            "dtype": str(self.decoder.dtype).removeprefix("torch."),
            "device": str(self.kv.data.device),
            "threads": torch.get_num_threads(),
            "kernels": self._kernels,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "page_size": self.page_size,
            "kv_tokens": self.num_pages * self.page_size,
            "kv_bytes_per_token": per_token,
            "weight_bytes": self.decoder.nbytes,
        }

    def _prompt_logprobs(self, hidden: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
        logprobs: list[TokenLogprob] = []
        for first in range(0, len(hidden), _LOGPROB_ROWS):
            rows = slice(first, first + _LOGPROB_ROWS)
            logprobs += self._sampler.prompt_logprobs(self.decoder.logits(hidden[rows]), targets[rows], top)
        return logprobs


def load_backend(
    path: Path, settings: Settings, notify: Callable[[str], None] | None = None, *, sharing: int = 1
) -> ModelBackend:
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
    dtype = choose_dtype(settings.dtype, device)
    threads = choose_threads(settings.num_threads)
    torch.set_num_threads(threads)
    kernels, kernels_used = open_kernels(
        settings.kernels, device, settings.cache_path / "kernels", threads, notify
    )
    checkpoint = open_checkpoint(
        path,
        dequantize=_DEQUANTIZE[settings.gguf_dequantize],
        fast_types=kernels.fast_formats if kernels else frozenset(),
    )
    try:
        config = ModelConfig.from_hf(checkpoint.config, checkpoint.generation_config)
        context_length = _context_length(settings, config)
        num_parameters = check_tensors(checkpoint, config)
        if notify is not None:
            name = str(dtype).removeprefix("torch.")
            notify(f"Loading {num_parameters / 1e6:,.0f} M parameters as {name} on {device}")
        decoder = _load(checkpoint, config, dtype, device, kernels)
    finally:
        checkpoint.close()
    per_token = kv_bytes_per_token(config.num_layers, config.num_kv_heads, config.head_dim, dtype)
    num_pages = kv_pages_for(
        token_budget=settings.kv_token_budget,
        page_size=settings.page_size_tokens,
        bytes_per_token=per_token,
        free_bytes=free_memory(device) // sharing,
        context_length=context_length,
        max_batch_size=settings.max_batch_size,
    )
    kv = KVPool(
        num_layers=config.num_layers,
        num_pages=num_pages,
        page_size=settings.page_size_tokens,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        device=device,
    )
    attention = _attention(config, dtype, kernels)
    program = None
    if (
        kernels
        and isinstance(attention, NativeAttention)
        and isinstance(decoder.operations, NativeOperations)
    ):
        program = StepProgram.build(kernels, decoder, kv, settings.max_batch_size)
    backend = ModelBackend(
        decoder,
        kv,
        attention,
        Sampler(config.vocab_size),
        context_length,
        num_parameters,
        kernels_used,
        program,
    )
    logger.info("Loaded %s", backend.describe())
    return backend


def _attention(config: ModelConfig, dtype: torch.dtype, kernels: NativeKernels | None) -> Attention:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if kernels and kernels.fast and NativeAttention.fit(heads, kv_heads, config.head_dim, dtype):
        return NativeAttention(kernels)
    return PagedAttention()


def _context_length(settings: Settings, config: ModelConfig) -> int:
    if settings.context_length > config.context_length:
        raise InvalidValueError(
            "CONTEXT_LENGTH", settings.context_length, f"at most {config.context_length}, the model's own"
        )
    return settings.context_length or config.context_length


def _load(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    kernels: NativeKernels | None,
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
            return load_decoder(checkpoint, config, dtype, device, loaded, kernels)
