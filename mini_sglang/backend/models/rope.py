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

_FIRST_POSITIONS = 1024


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


class Rotations:
    """Cosines and signed sines for ``rotate_``, computed once for each position that has come up so far.

    Args:
        frequencies: ``[head_dim / 2]`` float32.
        scale: the attention factor.
        dtype: of the result.
    """

    def __init__(self, frequencies: Tensor, scale: float, dtype: torch.dtype) -> None:
        self._frequencies = frequencies
        self._scale = scale
        self._dtype = dtype
        self._table = self._compute(_FIRST_POSITIONS)

    def at(self, positions: Tensor, stop: int) -> Tensor:
        """The rows of ``positions`` ``[T]`` int64, all below ``stop``: ``[2, T, head_dim]`` of ``table``."""
        return self.table(stop).index_select(1, positions)

    def table(self, stop: int) -> Tensor:
        """All positions up to ``stop`` at least.

        Returns:
            ``[2, P, head_dim]``: cosines, then sines, of which the first half is negated.
        """
        if stop > self._table.shape[1]:
            self._table = self._compute(max(stop, 2 * self._table.shape[1]))
        return self._table

    def _compute(self, count: int) -> Tensor:
        positions = torch.arange(count, dtype=torch.float32, device=self._frequencies.device)
        angles = positions[:, None] * self._frequencies
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return torch.stack((torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1))).to(self._dtype)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate ``heads`` ``[T, heads, head_dim]`` in place by ``cos`` and ``sin`` ``[T, head_dim]``.

    Three roundings (two products, one sum), so that half precision gives what transformers gives.
    """
    tokens, count, head_dim = heads.shape
    swapped = heads.view(tokens, count, 2, head_dim // 2).flip(2).view(heads.shape)
    heads.mul_(cos.unsqueeze(1)).add_(swapped.mul_(sin.unsqueeze(1)))


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
