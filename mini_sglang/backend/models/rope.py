"""Rotary position embeddings: frequencies of each kind, and the rotation.

Sources: RoFormer (Su et al. 2021); linear interpolation (kaiokendev; Chen et al. 2023); YaRN (Peng et
al. 2023); the frequency smoothing of Llama 3.1. The halves of a head are rotated against each other,
as in transformers' checkpoints.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mini_sglang.backend.models.rope_config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position of each pair of dimensions, ``[head_dim / 2]`` float32."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    wavelengths = rope.theta**exponents
    plain = 1.0 / wavelengths
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "factors":
        return plain / torch.tensor(rope.divisors, dtype=torch.float32)
    if rope.kind == "llama3":
        return _llama3(rope, plain)
    if rope.kind == "yarn":
        keep = 1.0 - _yarn_ramp(rope, head_dim)
        return (1.0 / (rope.factor * wavelengths)) * (1.0 - keep) + plain * keep
    return plain


def rotation(
    positions: Tensor, frequencies: Tensor, scale: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and signed sine rows for ``rotate_``.

    Args:
        positions: ``[T]`` integers.
        frequencies: ``[head_dim / 2]`` float32, on the same device.
        scale: the attention factor.

    Returns:
        two tensors ``[T, 1, head_dim]`` of ``dtype``; the first half of the sine is negated.
    """
    angles = positions[:, None, None].float() * frequencies
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return torch.cat((cos, cos), -1).to(dtype), torch.cat((-sin, sin), -1).to(dtype)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``heads`` ``[T, heads, head_dim]`` in place.

    Three roundings (two products, one sum), so that half precision gives what transformers gives.
    """
    tokens, count, head_dim = heads.shape
    swapped = heads.view(tokens, count, 2, head_dim // 2).flip(2).view(heads.shape)
    heads.mul_(cos).add_(swapped.mul_(sin))


def _llama3(rope: RopeConfig, plain: Tensor) -> Tensor:
    wavelengths = 2 * math.pi / plain
    turns = rope.original_context / wavelengths
    smooth = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    smooth = smooth.clamp(0.0, 1.0)
    return (1.0 - smooth) * plain / rope.factor + smooth * plain


def _yarn_ramp(rope: RopeConfig, head_dim: int) -> Tensor:
    """How much each frequency is interpolated: 0 (fast, kept) to 1 (slow, divided by the factor)."""

    def dimension(rotations: float) -> float:
        turns = rope.original_context / (rotations * 2 * math.pi)
        return head_dim * math.log(turns) / (2 * math.log(rope.theta))

    low, high = dimension(rope.beta_fast), dimension(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0.0, 1.0)
