"""The one decoder: Llama, Mistral, Qwen2, Qwen3 and SmolLM3 as flags of ``ModelConfig``.

Pure: the batch, the KV pool and the attention are arguments.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mini_sglang.backend.attention.base import Attention
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kv.pool import KVPool
from mini_sglang.backend.lora.store import StepAdapters
from mini_sglang.backend.lora.weights import DOWN, GATE_UP, OUT, QKV
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.operations import Operations
from mini_sglang.backend.models.rope import Rotations, inverse_frequencies
from mini_sglang.backend.weights import Weight


@dataclass(slots=True)
class LayerWeights:
    """One layer. ``qkv`` is q, k and v on top of each other, ``gate_up`` gate and up.

    ``qk_norm`` is ``[heads + kv_heads, head_dim]``: the q norm for each query head, then the k norm.
    """

    input_norm: Tensor
    qkv: Weight
    qkv_bias: Tensor | None
    qk_norm: Tensor | None
    o: Weight
    o_bias: Tensor | None
    post_norm: Tensor
    gate_up: Weight
    gate_up_bias: Tensor | None
    down: Weight
    down_bias: Tensor | None

    @property
    def matrices(self) -> tuple[Weight, Weight, Weight, Weight]:
        return self.qkv, self.o, self.gate_up, self.down


class Decoder:
    """Weights and flags. Calling it changes nothing but the KV pool it is handed."""

    def __init__(
        self,
        config: ModelConfig,
        embedding: Weight,
        layers: list[LayerWeights],
        final_norm: Tensor,
        lm_head: Weight,
        operations: Operations,
    ) -> None:
        self.config = config
        self.embedding = embedding
        self.layers = layers
        self.final_norm = final_norm
        self.lm_head = lm_head
        self.operations = operations
        self.dtype = final_norm.dtype
        frequencies = inverse_frequencies(config.rope, config.head_dim).to(final_norm.device)
        self.rotations = Rotations(frequencies, config.rope.attention_factor, self.dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of the weight matrices, tied ones once."""
        matrices = [weight for layer in self.layers for weight in layer.matrices]
        matrices.append(self.embedding)
        if self.lm_head is not self.embedding:
            matrices.append(self.lm_head)
        return sum(weight.nbytes for weight in matrices)

    def forward(
        self, batch: Batch, kv: KVPool, attention: Attention, adapters: StepAdapters | None = None
    ) -> Tensor:
        """Run the batch's tokens, writing their KV, with what ``adapters`` add to the products.

        Returns:
            ``[R, hidden_size]``: the normed hidden state of ``batch.output_rows``, or of all T rows.
        """
        config, ops = self.config, self.operations
        heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
        last = config.num_layers - 1
        if batch.opened_pages is not None:
            kv.open_pages(batch.opened_pages)
        attend = attention.begin(batch, kv)
        rotation = self.rotations.at(batch.positions, max(batch.seq_lens))
        hidden = self.embedding.rows(batch.token_ids)
        delta: Tensor | None = None
        for index, layer in enumerate(self.layers):
            if adapters is None:
                qkv = ops.norm_linear(hidden, delta, layer.input_norm, layer.qkv, layer.qkv_bias)
            else:
                normed = ops.norm(hidden, delta, layer.input_norm)
                qkv = layer.qkv.linear(normed, layer.qkv_bias)
                adapters.add(index, QKV, normed, qkv)
            qkv = qkv.view(len(qkv), heads + 2 * kv_heads, head_dim)
            turns = rotation if config.rope_layers[index] else None
            ops.rotate_and_store(qkv, layer.qk_norm, turns, kv, index, batch.slot_mapping)
            query, key, value = torch.split_with_sizes(qkv, (heads, kv_heads, kv_heads), 1)
            attended = attend(index, config.windows[index], query, key, value)
            if index == last and batch.output_rows is not None:
                attended = attended.index_select(0, batch.output_rows)
                hidden = hidden.index_select(0, batch.output_rows)
                if adapters is not None:
                    adapters.narrow(batch.output_rows)
            if adapters is None:
                delta = ops.linear_add(attended, layer.o, layer.o_bias, hidden)
                inner = ops.norm_gated(hidden, delta, layer.post_norm, layer.gate_up, layer.gate_up_bias)
                delta = ops.linear_add(inner, layer.down, layer.down_bias, hidden)
            else:
                delta = layer.o.linear(attended, layer.o_bias)
                adapters.add(index, OUT, attended, delta)
                normed = ops.norm(hidden, delta, layer.post_norm)
                gate_up = layer.gate_up.linear(normed, layer.gate_up_bias)
                adapters.add(index, GATE_UP, normed, gate_up)
                inner = ops.silu_and_mul(gate_up)
                delta = layer.down.linear(inner, layer.down_bias)
                adapters.add(index, DOWN, inner, delta)
        return ops.norm(hidden, delta, self.final_norm)

    def logits(self, hidden: Tensor) -> Tensor:
        """``[R, hidden_size]`` to float32 ``[R, vocab_size]``."""
        return self.head(hidden).float()

    def head(self, hidden: Tensor) -> Tensor:
        """The logits in the type that they are computed in."""
        return self.lm_head.linear(hidden)
