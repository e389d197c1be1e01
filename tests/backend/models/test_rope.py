"""Rotations against transformers' own cosines and sines, at positions near and far."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from mini_sglang.backend.models.rope import Rotations, rotate_

HEAD_DIM = 16
CONFIG = LlamaConfig(hidden_size=2 * HEAD_DIM, num_attention_heads=2, max_position_embeddings=1 << 17)


def theirs(heads: Tensor, positions: Tensor) -> Tensor:
    embedding = LlamaRotaryEmbedding(CONFIG)
    query = heads.transpose(0, 1)[None]
    cos, sin = embedding(query, positions[None])
    rotated: Tensor = apply_rotary_pos_emb(query, query, cos, sin)[0]
    return rotated[0].transpose(0, 1)


@pytest.mark.parametrize("order", [(5, 1500, 70_000), (70_000, 5), (1023, 1024, 1025, 2047, 2048, 2049)])
def test_heads_are_rotated_as_theirs_however_far_the_table_has_grown(order: tuple[int, ...]) -> None:
    frequencies = LlamaRotaryEmbedding(CONFIG).inv_freq
    rotations = Rotations(frequencies, 1.0, torch.float32)
    for last in order:
        positions = torch.tensor([0, last // 2, last])
        heads = torch.randn(3, 2, HEAD_DIM, generator=torch.Generator().manual_seed(last))
        expected = theirs(heads, positions)
        rotate_(heads, *rotations.at(positions, last + 1))
        torch.testing.assert_close(heads, expected, rtol=1e-6, atol=1e-6)


def test_the_attention_factor_scales_both_parts() -> None:
    frequencies = torch.tensor([1.0, 0.1])
    plain, scaled = (Rotations(frequencies, factor, torch.float32) for factor in (1.0, 1.5))
    positions = torch.arange(9)
    torch.testing.assert_close(scaled.at(positions, 9), 1.5 * plain.at(positions, 9))
