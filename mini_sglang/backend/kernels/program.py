"""A step written down once and replayed: the CPU's counterpart of a CUDA graph.

``Decoder.forward`` is the same step in Python; both do the same jobs in the same order, so that their
results are equal to the bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kernels.adapters import NativeAdapters
from mini_sglang.backend.kernels.jobs import (
    Attention,
    Entry,
    Job,
    Norm,
    Product,
    Rotate,
    SequenceTable,
    SiluAndMul,
    Turns,
)
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.lora.runs import narrowed, runs_of
from mini_sglang.backend.lora.weights import PLACES
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.weights import Weight


class StepProgram:
    """A ``Program``: the layers of a decoder as one list of jobs over buffers that stay where they are.

    Build one with ``build``. One thread uses it.
    """

    def __init__(self, kernels: NativeKernels, decoder: Decoder, kv: KVPool, max_rows: int) -> None:
        config = decoder.config
        self.kernels = kernels
        self._decoder = decoder
        self._kv = kv
        self.max_rows = max_rows
        self._sequences = SequenceTable()
        self._slots = torch.zeros(max_rows, dtype=torch.int64)
        self._turns = Turns()
        self._hidden, self._normed, self._delta = torch.empty(3, max_rows, config.hidden_size)
        self._qkv = torch.empty(max_rows, (config.num_heads + 2 * config.num_kv_heads) * config.head_dim)
        self._attended = torch.empty(max_rows, config.num_heads * config.head_dim)
        self._gate_up = torch.empty(max_rows, 2 * config.intermediate_size)
        self._inner = torch.empty(max_rows, config.intermediate_size)
        # Where the kernels cannot, torch looks the rows up.
        self._embed = decoder.embedding.lookup()
        self.jobs: list[Job] = []
        # After how many jobs each product is whole, what it reads and what it writes.
        self._products: list[tuple[int, Tensor, Tensor]] = []
        self._adapters: NativeAdapters | None = None
        if self._embed is not None:
            self._embed.out = self._hidden.data_ptr()
            self.jobs.append(self._embed)
        delta: Tensor | None = None
        last_attention = 0
        for index, layer in enumerate(decoder.layers):
            self._norm(delta, layer.input_norm)
            self._multiply(layer.qkv, layer.qkv_bias, self._normed, self._qkv)
            self._attend(index, layer.qk_norm)
            last_attention = len(self.jobs) - 1
            self._multiply(layer.o, layer.o_bias, self._attended, self._delta)
            self._norm(self._delta, layer.post_norm)
            self._multiply(layer.gate_up, layer.gate_up_bias, self._normed, self._gate_up)
            self.jobs.append(SiluAndMul.of(self._gate_up, self._inner))
            self._multiply(layer.down, layer.down_bias, self._inner, self._delta)
            delta = self._delta
        self._norm(delta, decoder.final_norm)
        # From the last attention on they are for the rows alone whose hidden states are wanted.
        self._last_attention = last_attention
        self._entries = _entries(self.jobs, last_attention)

    @classmethod
    def build(cls, kernels: NativeKernels, decoder: Decoder, kv: KVPool, max_rows: int) -> StepProgram | None:
        """The program of a float32 model whose operations and attention are ``kernels``' already.

        ``None`` where one of its weights is not multiplied by the kernels alone.
        """
        layers = decoder.layers
        weights = [weight for x in layers for weight in (x.qkv, x.o, x.gate_up, x.down)]
        if any(weight.products() is None for weight in weights):
            return None
        return cls(kernels, decoder, kv, max_rows)

    def adapt(self, adapters: NativeAdapters) -> None:
        """Write down, beside the list without them, one whose products have what ``adapters`` add."""
        self._adapters = adapters
        jobs: list[Job] = []
        done = 0
        for index, (end, x, out) in enumerate(self._products):
            jobs += self.jobs[done:end]
            jobs.append(adapters.job(*divmod(index, len(PLACES)), x, out))
            done = end
        self._adapted_jobs = jobs + self.jobs[done:]
        self._adapted_entries = _entries(
            self._adapted_jobs, self._adapted_jobs.index(self.jobs[self._last_attention])
        )

    def takes(self, batch: Batch) -> bool:
        """See ``Program``: all of at most ``max_rows`` rows."""
        return True

    def forward(self, batch: Batch) -> Tensor:
        """``Decoder.forward`` for a batch of at most ``max_rows`` rows.

        Returns:
            ``[R, hidden_size]``, which the next call overwrites.
        """
        rows = len(batch.token_ids)
        decoder = self._decoder
        batch.fill(batch.token_ids)
        if batch.opened_pages is not None:
            self._kv.open_pages(batch.opened_pages)
        self._sequences.set(batch.page_table, batch.query_starts, batch.seq_lens)
        self._slots[:rows] = batch.slot_mapping
        self._turns.set(decoder.rotations.table(max(batch.seq_lens)), batch.positions)
        if self._embed is None:
            self._hidden[:rows] = decoder.embedding.rows(batch.token_ids)
        else:
            self._embed.ids = batch.token_ids.data_ptr()
        parts, runs = self._entries, None
        if batch.adapters is not None:
            assert self._adapters is not None
            parts = self._adapted_entries
            runs = runs_of(batch)
            self._adapters.begin(runs)
        wanted = batch.output_rows
        if wanted is None:
            self.kernels.run_all(parts.whole, rows)
        else:
            self.kernels.run_all(parts.all_rows, rows)
            rows = len(wanted)
            if runs is not None and self._adapters is not None:
                self._adapters.begin(narrowed(runs, wanted))
            if rows:
                self._attend_for(batch, wanted, parts.attention)
                self.kernels.run_all(parts.wanted_rows, rows)
        hidden: Tensor = self._normed[:rows]
        return hidden

    def _attend_for(self, batch: Batch, wanted: Tensor, attention: ctypes.Array[Entry]) -> None:
        """The last attention; its results and the hidden states of the rows ``wanted``, in order."""
        count, buffers = len(wanted), [self._hidden, self._qkv]
        # A row for each sequence at most, each as if it were a decode; many of one are better off together.
        alone = count <= len(batch.seq_lens)
        if alone:
            places = np.searchsorted(batch.query_starts, wanted.numpy(), side="right") - 1
            lengths = (batch.positions.index_select(0, wanted) + 1).tolist()
            self._sequences.set(batch.page_table[places], range(count + 1), lengths)
        else:
            self.kernels.run_all(attention, len(batch.token_ids))
            buffers[1] = self._attended
        for buffer in buffers:
            buffer[:count] = buffer.index_select(0, wanted)
        if alone:
            self.kernels.run_all(attention, count)

    def _norm(self, delta: Tensor | None, weight: Tensor) -> None:
        eps = self._decoder.config.norm_eps
        self.jobs.append(Norm.of(self._hidden, delta, weight, self._normed, eps))

    def _multiply(self, weight: Weight, bias: Tensor | None, x: Tensor, out: Tensor) -> None:
        assert bias is None or bias.is_contiguous()
        products: list[Product] = weight.products() or []
        first = 0
        for product in products:
            product.x = x.data_ptr()
            product.bias = None if bias is None else bias[first:].data_ptr()
            product.y = out[:, first:].data_ptr()
            product.stride = out.shape[1]
            first += product.n
        self.jobs += products
        self._products.append((len(self.jobs), x, out))

    def _attend(self, index: int, head_norm: Tensor | None) -> None:
        config, kv = self._decoder.config, self._kv
        qkv = self._qkv.view(self.max_rows, -1, config.head_dim)
        turns = self._turns if config.rope_layers[index] else None
        self.jobs.append(Rotate.of(qkv, head_norm, turns, self._slots, kv, index, config.norm_eps))
        query, window = qkv[:, : config.num_heads], config.windows[index]
        self.jobs.append(Attention.of(self._sequences, kv, index, query, self._attended, window))


class _Entries(NamedTuple):
    """The jobs of a step, and in parts: before the last attention, that, after it."""

    whole: ctypes.Array[Entry]
    all_rows: ctypes.Array[Entry]
    attention: ctypes.Array[Entry]
    wanted_rows: ctypes.Array[Entry]


def _entries(jobs: Sequence[Job], attention: int) -> _Entries:
    parts = jobs, jobs[:attention], jobs[attention : attention + 1], jobs[attention + 1 :]
    return _Entries(*((Entry * len(part))(*map(Entry.of, part)) for part in parts))
