"""The facade of the backend floor: a model, its KV pool and its sampler behind ``run``."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Followed, Limits
from mini_sglang.backend.device import dtype_name, to_device
from mini_sglang.backend.device_sampling import Chosen, DeviceSampler, Draw
from mini_sglang.backend.graphs.program import GraphProgram
from mini_sglang.backend.kept_logits import KeptLogits
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.kv.store import PoolStore
from mini_sglang.backend.loading.fingerprint import weights_fingerprint
from mini_sglang.backend.lora.store import Adapters
from mini_sglang.backend.memory import give_back, says_out_of_memory
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.pieces import cut, join
from mini_sglang.backend.program import Program
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SequenceResult, SequenceStep, Submitter
from mini_sglang.backend.transformers_models.decoder import TransformersDecoder
from mini_sglang.config import VERSION
from mini_sglang.types import TokenLogprob

logger = logging.getLogger(__name__)

# Rows of prompt logprobs at a time: a row of float32 logits is up to a megabyte.
LOGPROB_ROWS = 128
_HOST = torch.device("cpu")


class ModelBackend:
    """A loaded model; implements ``Backend``. Make one with ``loader.load_backend``.

    Not thread-safe: one thread calls ``run``.
    """

    shares_prefixes = True
    chunks_prompts = True

    def __init__(
        self,
        decoder: Decoder | TransformersDecoder,
        kv: KVPool,
        attention: Attention,
        sampler: Sampler,
        context_length: int,
        num_parameters: int,
        kernels: str,
        dtype: torch.dtype,
        program: Program | None = None,
        quantization: str = "none",
        adapters: Adapters | None = None,
        implementation: str = "native",
        compiled: str = "off",
        path: Path | None = None,
        about: Mapping[str, str] | None = None,
        graphs: str = "off",
    ) -> None:
        self._about = dict(about or {})
        self.adapters = adapters
        self.decoder = decoder
        self.kv = kv
        self.attention = attention
        self.sampler = sampler
        self._num_parameters = num_parameters
        self._kernels = kernels
        self._dtype = dtype
        self._quantization = quantization
        self._implementation = implementation
        self._compiled = compiled
        self._graphs = graphs
        self.program = program
        self._path = path
        self._kept = KeptLogits()
        self.store = PoolStore(kv, self._identity)
        self.submitter: Submitter | None = None
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

    @says_out_of_memory()
    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        """See ``Backend.run``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``; nothing has run.
        """
        if not steps:
            return []
        if any(step.from_logits is not None for step in steps):
            return self._kept.run(steps, self.sampler, self.run)
        most = None if self.program is None else self.program.max_rows
        if most is None or sum([len(step.token_ids) for step in steps]) <= most:
            return self._run(steps, self._batch(steps))
        # Bit for bit the same, as in chunks.
        pieces = cut(steps, most)
        parts = [[part for _, part in piece] for piece in pieces]
        batches = [self._batch(part) for part in parts]
        return join(
            len(steps), pieces, [self._run(part, batch) for part, batch in zip(parts, batches, strict=True)]
        )

    def free_memory(self) -> None:
        """See ``Backend``."""
        give_back(self.kv.data.device)

    def _batch(self, steps: Sequence[SequenceStep]) -> Batch:
        batch = Batch.build(steps, self._limits, _HOST)
        if batch.adapters is not None:
            assert self.adapters is not None
            self.adapters.check(batch.adapters)
        return batch

    def _run(self, steps: Sequence[SequenceStep], batch: Batch) -> list[SequenceResult]:
        chosen = self._choose(steps, batch, later=False)
        if chosen is not None:
            return _in_places(len(steps), batch, chosen.results())
        if self.program is not None and self.program.takes(batch):
            # Without torch's inference mode: to enter it takes a tenth of the time outside the kernels.
            return self._results(steps, batch, self.program.forward(batch))
        with torch.inference_mode():
            return self._results(steps, batch, self._forward(batch))

    def _forward(self, batch: Batch) -> Tensor:
        batch = batch.to(self.kv.data.device)
        batch.fill(batch.token_ids)
        if self.adapters is not None and batch.adapters is not None and isinstance(self.decoder, Decoder):
            return self.decoder.forward(batch, self.kv, self.attention, self.adapters.begin(batch))
        return self.decoder.forward(batch, self.kv, self.attention)

    def launches(self, steps: Sequence[SequenceStep]) -> bool:
        """Whether ``launch`` takes these steps."""
        if any(s.from_logits is not None or s.prompt_targets or s.draft_samples for s in steps):
            return False
        most = None if self.program is None else self.program.max_rows
        return most is None or sum([len(step.token_ids) for step in steps]) <= most

    @says_out_of_memory()
    def launch(
        self, steps: Sequence[SequenceStep], followed: Followed | None
    ) -> tuple[Draw | Chosen | None, list[int]]:
        """Begin what ``run`` does, without waiting for the device.

        Args:
            followed: of the tokens of ``steps`` those that are on the device.

        Returns:
            what is chosen, None for nothing, and of each row of it the place of its step.
        """
        batch = self._batch(steps)
        batch.followed = followed
        chosen = self._choose(steps, batch, later=True)
        if chosen is not None:
            return chosen, [place for place, _ in batch.samples]
        program = self.program if self.program is not None and self.program.takes(batch) else None
        with torch.inference_mode():
            hidden = self._forward(batch) if program is None else program.forward(batch)
            if not batch.samples:
                return None, []
            places = [place for place, _ in batch.samples]
            assert isinstance(self.sampler, DeviceSampler)
            table = self.sampler.plain(batch.specs)
            rows = self._sampled_rows(batch, hidden)
            logits = self.decoder.logits(rows) if table is None else self.decoder.head(rows)
            self._kept.keep(steps, places, logits)
            if table is not None:
                return self.sampler.choose(logits, table), places
            return self.sampler.launch(logits, batch.specs), places

    def _choose(self, steps: Sequence[SequenceStep], batch: Batch, *, later: bool) -> Chosen | None:
        """Run a step and choose its tokens where both were recorded; None, and nothing has run, elsewhere."""
        # See ``_run`` for why there is no inference mode.
        program, sampler = self.program, self.sampler
        if not isinstance(program, GraphProgram) or not isinstance(sampler, DeviceSampler):
            return None
        if batch.prompts or program.choosing is None or any(s.keep_logits is not None for s in steps):
            return None
        if not program.takes(batch):
            return None  # before a table is made, which is made again where the step is not recorded
        table = sampler.plain(batch.specs)
        if table is None:
            return None
        found = program.choose(batch, table, later=later)
        return None if found is None else Chosen(*found, later=later)

    def _results(self, steps: Sequence[SequenceStep], batch: Batch, hidden: Tensor) -> list[SequenceResult]:
        """What ``hidden`` ``[R, hidden_size]`` comes to: tokens and prompt logprobs."""
        sampled: dict[int, SequenceResult] = {}
        if batch.samples:
            places = [place for place, _ in batch.samples]
            logits = self.decoder.logits(self._sampled_rows(batch, hidden))
            self._kept.keep(steps, places, logits)
            chosen = self.sampler.sample(logits, batch.specs)
            sampled = (_with_drafts if batch.drafts else dict)(zip(places, chosen, strict=True))
        results = [sampled.get(place) or SequenceResult() for place in range(len(steps))]
        for place, first, stop in batch.prompts:
            step = steps[place]
            results[place].prompt_logprobs = self._prompt_logprobs(
                hidden[first:stop], step.prompt_targets, step.prompt_top
            )
        return results

    @staticmethod
    def _sampled_rows(batch: Batch, hidden: Tensor) -> Tensor:
        """The rows of ``hidden`` that tokens are chosen after."""
        if not batch.prompts:
            # Tokens are chosen after all the output rows, in their order.
            return hidden
        return hidden[to_device(torch.tensor([row for _, row in batch.samples]), hidden.device)]

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
        return {
            "model_type": self.decoder.config.family,
            "implementation": self._implementation,
            "parameters": self._num_parameters,
            "dtype": dtype_name(self._dtype),
            "kv_dtype": dtype_name(self.kv.dtype),
            "quantization": self._quantization,
            "device": str(self.kv.data.device),
            "threads": torch.get_num_threads(),
            "kernels": self._kernels,
            "attention": _attention_name(self.attention),
            "compile": self._compiled,
            "cuda_graphs": self._graphs,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "page_size": self.page_size,
            "kv_tokens": self.num_pages * self.page_size,
            "kv_bytes_per_token": self.kv.bytes_per_token,
            "weight_bytes": self.decoder.nbytes,
            **self._about,
        }

    def _identity(self) -> dict[str, str]:
        """See ``PageStore.identity``."""
        kv, config = self.kv, self.decoder.config
        layers, _, width = kv.data.shape
        tiles = "in tiles" if kv.tiled else "in rows"
        return {
            "version": VERSION,
            "model": config.family,
            "config": hashlib.sha256(repr(config).encode()).hexdigest(),
            "weights": "unknown" if self._path is None else weights_fingerprint(self._path),
            "dtype": f"{dtype_name(self._dtype)} {self._quantization}",
            "kv_dtype": dtype_name(kv.dtype),
            "kernels": f"{self._kernels} {self._implementation} {self._compiled}",
            "layout": f"{layers} layers, {kv.page_size} tokens a page, {width} numbers a token, {tiles}",
        }

    def _prompt_logprobs(self, hidden: Tensor, targets: Sequence[int], top: int) -> list[TokenLogprob]:
        logprobs: list[TokenLogprob] = []
        for first in range(0, len(hidden), LOGPROB_ROWS):
            rows = slice(first, first + LOGPROB_ROWS)
            logprobs += self.sampler.prompt_logprobs(self.decoder.logits(hidden[rows]), targets[rows], top)
        return logprobs


def _in_places(count: int, batch: Batch, chosen: Iterable[SequenceResult]) -> list[SequenceResult]:
    """One result for each step, for a batch without drafts and prompt logprobs."""
    results = [SequenceResult() for _ in range(count)]
    for (place, _), result in zip(batch.samples, chosen, strict=True):
        results[place] = result
    return results


def _with_drafts(chosen: Iterable[tuple[int, SequenceResult]]) -> dict[int, SequenceResult]:
    """Results by place; those of a place that come after its first are what followed its drafts."""
    sampled: dict[int, SequenceResult] = {}
    for place, result in chosen:
        first = sampled.setdefault(place, result)
        if first is not result:
            first.drafted = [*first.drafted, result]
    return sampled


def _attention_name(attention: Attention) -> str:
    if isinstance(attention, PagedAttention):
        return f"paged, {'sdpa' if attention.fused else 'eager'}"
    return f"paged, {getattr(attention, 'name', 'own')}"
