"""What a mask of transformers lets a token see, found by asking it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""Whether query positions see key positions, given the indices of (batch, head, query, key)."""


class NotPagedError(Exception):
    """Our paged attention cannot serve this model; the message says why, as a part of a sentence."""


@dataclass(frozen=True, slots=True, eq=False)
class AskedMask:
    """The mask that a model asked transformers for; it travels to the attention in the mask's place."""

    function: MaskFunction
    local_size: int | None

    def window(self, context_length: int) -> int | None:
        """How many positions a token sees, itself included; ``None`` is all up to its own.

        Args:
            context_length: how many positions there are.

        Raises:
            NotPagedError: it is neither causal nor a sliding window.
        """
        size = self.local_size
        positions = _turning_points(size, context_length)
        if _equals(self.function, None, positions):
            return None
        if size is not None and _equals(self.function, size, positions):
            return size
        raise NotPagedError("it has a mask that is neither causal nor a sliding window")


def asked_mask(*, mask_function: MaskFunction, local_size: int | None = None, **_: object) -> AskedMask:
    """Registered with ``AttentionMaskInterface``: gives the description instead of a tensor."""
    return AskedMask(mask_function, local_size)


def _turning_points(size: int | None, context_length: int) -> Tensor:
    """Positions around which such masks change: the start, the end, and multiples of their size."""
    near = {base + step for base in (1, 130, context_length) for step in range(-4, 4)}
    if size:
        near |= {base * size + step for base in (1, 2, 5) for step in range(-2, 3)}
    return torch.tensor(sorted(position for position in near if 0 <= position < context_length))


def _equals(function: MaskFunction, window: int | None, positions: Tensor) -> bool:
    query, key, zero = positions[:, None], positions[None], torch.zeros((), dtype=torch.int64)
    try:
        seen = function(zero, zero, query, key).expand(len(positions), len(positions))
    except Exception as error:
        raise NotPagedError(f"its mask cannot be asked: {error}") from None
    expected = key <= query
    if window is not None:
        expected &= query - key < window
    return torch.equal(seen, expected)
