"""Rotary embeddings whose frequencies depend on the longest sequence of a step, made to stand still."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FROZEN = "frozen"


def context_length(config: Any) -> tuple[int, int]:
    """The tokens that a text config's model is served with, and up to which CONTEXT_LENGTH may go.

    They differ with LongRoPE, whose frequencies change beyond the original length: cached keys cannot follow
    that, so the original length is the default, with the frequencies for it. Dynamic NTK's change beyond
    ``max_position_embeddings``, where the context ends.
    """
    longest = int(getattr(config, "max_position_embeddings", None) or 2048)
    originals = [_original(config, kind, longest) for kind in _long_kinds(config)]
    return min(originals, default=longest), longest


def freeze(model: nn.Module, config: Any, length: int) -> None:
    """Fix the frequencies of every rotary embedding for contexts of up to ``length`` tokens."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str):
            module.rope_type = _freeze(module, config, kinds, None, length)  # type: ignore[assignment]
        elif isinstance(kinds, dict):
            frozen = {layer: _freeze(module, config, kind, layer, length) for layer, kind in kinds.items()}
            module.rope_type = frozen  # type: ignore[assignment]


def _freeze(module: nn.Module, config: Any, kind: str, layer: str | None, length: int) -> str:
    if kind == "longrope":
        values = config.rope_parameters if layer is None else config.rope_parameters[layer]
        original = int(values["original_max_position_embeddings"])
        if length > original:
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            prefix = "" if layer is None else f"{layer}_"
            held: torch.Tensor = getattr(module, f"{prefix}inv_freq")
            frequencies, _ = ROPE_INIT_FUNCTIONS[kind](
                config, held.device, seq_len=original + 1, layer_type=layer
            )
            held.copy_(frequencies)
    elif "dynamic" not in kind:
        return kind
    return _FROZEN


def _long_kinds(config: Any) -> list[dict[str, Any]]:
    """The settings of LongRoPE, for each kind of layer that has it."""
    values = getattr(config, "rope_parameters", None) or {}
    kinds = [value for value in values.values() if isinstance(value, dict)] or [values]
    return [kind for kind in kinds if kind.get("rope_type") == "longrope"]


def _original(config: Any, kind: dict[str, Any], longest: int) -> int:
    stated = kind.get("original_max_position_embeddings")
    return min(int(stated or getattr(config, "original_max_position_embeddings", None) or longest), longest)
