"""The decoder with what lies between its attention calls handed to torch.compile.

Attention plans each step anew from Python lists, which would be compiled anew each time; it stays as it is.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.closeness import HIDDEN_TOLERANCE, relative_error
from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.lora.store import StepAdapters
from mini_sglang.backend.models.decoder import Decoder, LayerWeights
from mini_sglang.backend.models.operations import TorchOperations
from mini_sglang.backend.step import SequenceStep


class CompiledDecoder(Decoder):
    """``Decoder`` on torch's operators, in two compiled pieces a layer.

    Args:
        decoder: whose weights and operations to take.
        compiler: what to compile with, at the first step.
    """

    def __init__(self, decoder: Decoder, compiler: Compiler) -> None:
        assert isinstance(decoder.operations, TorchOperations)
        vars(self).update(vars(decoder))
        self._operations = decoder.operations
        self._before = compiler.compile(self._before_attention)
        self._after = compiler.compile(self._after_attention)
        self._last_norm = compiler.compile(self._operations.norm)

    def forward(
        self, batch: Batch, kv: KVPool, attention: Attention, adapters: StepAdapters | None = None
    ) -> Tensor:
        if adapters is not None:
            # They come between what the pieces have in one.
            return super().forward(batch, kv, attention, adapters)
        config = self.config
        last = config.num_layers - 1
        if batch.opened_pages is not None:
            kv.open_pages(batch.opened_pages)
        attend = attention.begin(batch, kv)
        rotation = self.rotations.at(batch.positions, max(batch.seq_lens))
        hidden = self.embedding.rows(batch.token_ids)
        # Not None, which would be compiled by itself.
        delta = torch.zeros_like(hidden)
        for index, layer in enumerate(self.layers):
            turns = rotation if config.rope_layers[index] else None
            hidden, qkv = self._before(layer, hidden, delta, turns)
            heads, kv_heads = config.num_heads, config.num_kv_heads
            query, key, value = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), 1)
            kv.write(index, batch.slot_mapping, qkv[:, heads:].flatten(1))
            attended = attend(index, config.windows[index], query, key, value)
            if index == last and batch.output_rows is not None:
                attended = attended.index_select(0, batch.output_rows)
                hidden = hidden.index_select(0, batch.output_rows)
            hidden, delta = self._after(layer, hidden, attended)
        return self._last_norm(hidden, delta, self.final_norm)

    def _before_attention(
        self, layer: LayerWeights, hidden: Tensor, delta: Tensor, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The residual ``[T, hidden_size]``, and q, k and v ``[T, heads + 2 * kv_heads, head_dim]``."""
        config, ops = self.config, self._operations
        qkv = layer.qkv.linear(ops.norm(hidden, delta, layer.input_norm), layer.qkv_bias)
        qkv = qkv.view(len(qkv), config.num_heads + 2 * config.num_kv_heads, config.head_dim)
        ops.rotate(qkv[:, : config.num_heads + config.num_kv_heads], layer.qk_norm, rotation)
        return hidden, qkv

    def _after_attention(
        self, layer: LayerWeights, hidden: Tensor, attended: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The residual and what is to be added to it, ``[T, hidden_size]`` each."""
        ops = self._operations
        normed = ops.norm(hidden, layer.o.linear(attended, layer.o_bias), layer.post_norm)
        gate_up = layer.gate_up.linear(normed, layer.gate_up_bias)
        return hidden, layer.down.linear(ops.silu_and_mul(gate_up), layer.down_bias)


@torch.inference_mode()
def prove(
    compiled: CompiledDecoder, plain: Decoder, kv: KVPool, attention: Attention, limits: Limits
) -> None:
    """Compile for one row and for several, and compare with the decoder as it was. Writes to the pool.

    Raises:
        RuntimeError: the hidden states differ by more than rounding. What torch.compile raises.
    """
    pages = array("i", range(kv.num_pages))
    for count in (1, min(5, kv.num_pages * kv.page_size, limits.context_length)):
        step = SequenceStep(list(range(count)), 0, pages, prompt_targets=[0] * count)
        batch = Batch.build([step], limits, kv.data.device)
        ours = compiled.forward(batch, kv, attention).float()
        own = plain.forward(batch, kv, attention).float()
        off = relative_error(ours, own)
        if not off <= HIDDEN_TOLERANCE[plain.dtype]:
            raise RuntimeError(f"its hidden states are off by {off:.2g} of their size")
