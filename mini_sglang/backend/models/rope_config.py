"""The rotary settings of a ``config.json``, in the spelling of transformers 4 or 5."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mini_sglang.backend.models.fields import FieldReader, bad_field

_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "factors")
_ORIGINAL = "original_max_position_embeddings"


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """How the rotary angles are made; ``rope.inverse_frequencies`` reads it.

    Attributes:
        kind: ``default``, ``linear``, ``llama3``, ``yarn`` or ``factors``.
        theta: base of the frequencies.
        factor: how far the context is stretched (linear, llama3, yarn).
        original_context: tokens of context before stretching (llama3, yarn).
        attention_factor: what cosine and sine are multiplied by (yarn, factors).
        divisors: what each frequency is divided by (factors), ``head_dim / 2`` numbers.
    """

    kind: str = "default"
    theta: float = 10_000.0
    factor: float = 1.0
    original_context: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0
    divisors: tuple[float, ...] = ()


def read_rope(read: FieldReader, head_dim: int, max_positions: int) -> tuple[RopeConfig, int]:
    """The rotary settings, and the context length they allow.

    Raises:
        ModelLoadError: a kind that is not supported, or a field that is missing or makes no sense.
    """
    name = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    values = read.mapping(name)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE_KINDS or any(isinstance(value, Mapping) for value in values.values()):
        what = "one kind for all layers" if kind in _ROPE_KINDS else "one of " + ", ".join(_ROPE_KINDS)
        raise bad_field(f"{name}.rope_type", kind, what)
    rope = FieldReader({"rope_theta": read.values.get("rope_theta"), **values}, where=f"{name}.")
    theta = rope.number("rope_theta", default=10_000.0)
    if theta <= 1:
        raise bad_field("rope_theta", theta, "above 1")
    partial = rope.values.get("partial_rotary_factor", read.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise bad_field("partial_rotary_factor", partial, "1")
    if kind == "default":
        return RopeConfig(theta=theta), max_positions
    if kind == "dynamic":
        # Up to its original length dynamic NTK is the default; beyond it, a token's rotation would
        # depend on how long the sequence has become, which cached keys cannot follow.
        original = rope.integer(_ORIGINAL, default=max_positions)
        return RopeConfig(theta=theta), min(original, max_positions)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=rope.number("factor")), max_positions
    if kind == "factors":
        divisors = rope.values.get("factors")
        if not isinstance(divisors, (list, tuple)) or len(divisors) != head_dim // 2:
            raise bad_field(f"{name}.factors", divisors, f"a list of {head_dim // 2} numbers")
        checked = tuple(FieldReader({"factors": value}, rope.where).number("factors") for value in divisors)
        scale = rope.number("attention_factor", default=1.0)
        return RopeConfig(
            kind="factors", theta=theta, divisors=checked, attention_factor=scale
        ), max_positions
    stated = read.values.get(_ORIGINAL) or rope.values.get(_ORIGINAL)
    original = FieldReader({_ORIGINAL: stated}).integer(_ORIGINAL, default=max_positions)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise bad_field(f"{name}.high_freq_factor", high, f"above low_freq_factor, {low:g}")
        config = RopeConfig(
            kind="llama3",
            theta=theta,
            factor=rope.number("factor"),
            original_context=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
        return config, max_positions
    factor = rope.number("factor", default=max_positions / original)
    config = RopeConfig(
        kind="yarn",
        theta=theta,
        factor=factor,
        original_context=original,
        beta_fast=rope.number("beta_fast", default=32.0),
        beta_slow=rope.number("beta_slow", default=1.0),
        truncate=rope.flag("truncate", default=True),
        attention_factor=_yarn_attention_factor(rope, factor),
    )
    # Repositories that add YaRN by hand often leave max_position_embeddings at the original length.
    return config, max(max_positions, int(original * factor)) if stated else max_positions


def _yarn_attention_factor(rope: FieldReader, factor: float) -> float:
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)
