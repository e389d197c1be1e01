"""A model's ``config.json`` as flags of the one decoder.

A field that is missing takes the default of its family in transformers; one that makes no sense, or
asks for something the decoder does not do, is refused with a sentence.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mini_sglang.errors import ModelLoadError, shorten

_ARCHITECTURES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen2ForCausalLM": "qwen2",
    "Qwen3ForCausalLM": "qwen3",
    "SmolLM3ForCausalLM": "smollm3",
}
SUPPORTED_FAMILIES = tuple(_ARCHITECTURES.values())

# What transformers assumes where config.json says nothing.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"num_key_value_heads": 8, "max_position_embeddings": 131072, "sliding_window": 4096},
    "qwen2": {"num_key_value_heads": 32, "max_position_embeddings": 32768, "sliding_window": 4096},
    "qwen3": {
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "smollm3": {
        "num_key_value_heads": 4,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": True,
        "rope_theta": 2_000_000.0,
    },
}
_ROPE_KINDS = ("default", "linear", "llama3", "yarn", "dynamic", "factors")
_MAX_INT = (1 << 31) - 1


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


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What the decoder must know of a model.

    Attributes:
        windows: per layer, how many positions a token sees, itself included; ``None`` is all of them.
        rope_layers: per layer, whether queries and keys are rotated.
        context_length: tokens the model was made for.
        eos_ids: ids that end an answer; from ``generation_config.json`` where it names any.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    tied_embeddings: bool
    windows: tuple[int | None, ...]
    rope_layers: tuple[bool, ...]
    rope: RopeConfig
    context_length: int
    eos_ids: tuple[int, ...]

    @classmethod
    def from_hf(
        cls, config: Mapping[str, Any], generation_config: Mapping[str, Any] | None = None
    ) -> ModelConfig:
        """Read a ``config.json`` in the spelling of transformers 4 or 5.

        Raises:
            ModelLoadError: an architecture or feature that is not supported, or a senseless field.
        """
        family = _family(config)
        read = _Reader({**_DEFAULTS[family], **config})
        if config.get("quantization_config"):
            method = read.mapping("quantization_config").get("quant_method", "quantisation")
            raise ModelLoadError(
                f"The weights are quantised with {shorten(method)}, which is not supported; "
                "use the plain repository or a GGUF file."
            )
        if (act := read.values.get("hidden_act", "silu")) != "silu":
            raise _bad("hidden_act", act, "silu, the only activation that is supported")
        num_layers = read.integer("num_hidden_layers")
        hidden_size = read.integer("hidden_size")
        num_heads = read.integer("num_attention_heads")
        num_kv_heads = read.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise _bad("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}")
        if read.values.get("head_dim") is None and hidden_size % num_heads:
            raise _bad("num_attention_heads", num_heads, f"a divisor of hidden_size, {hidden_size}")
        head_dim = read.integer("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise _bad("head_dim", head_dim, "even")
        rope_layers = _rope_layers(read, family, num_layers)
        max_positions = read.integer("max_position_embeddings")
        rope, context_length = _rope(read, head_dim, max_positions)
        attention_bias = family in ("llama", "qwen3", "smollm3") and read.flag("attention_bias")
        return cls(
            family=family,
            vocab_size=read.integer("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=read.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            norm_eps=read.number("rms_norm_eps", default=1e-6),
            qkv_bias=family == "qwen2" or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family in ("llama", "smollm3") and read.flag("mlp_bias"),
            qk_norm=family == "qwen3",
            tied_embeddings=read.flag("tie_word_embeddings"),
            windows=_windows(read, family, num_layers, rope_layers),
            rope_layers=rope_layers,
            rope=rope,
            context_length=context_length,
            eos_ids=_eos_ids(config, generation_config or {}),
        )


class _Reader:
    """Typed access to a config; a value of the wrong type or size becomes a ``ModelLoadError``."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_INT:
            raise _bad(self.where + name, value, f"a whole number from 1 to {_MAX_INT}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise _bad(self.where + name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise _bad(self.where + name, value, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise _bad(self.where + name, value, "an object")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ModelLoadError(f"config.json has no {self.where}{name}, which is required.")
            return default
        return value


def _bad(name: str, value: object, allowed: str) -> ModelLoadError:
    return ModelLoadError(f"In config.json, {name} is {shorten(value)}; it must be {allowed}.")


def _family(config: Mapping[str, Any]) -> str:
    names = config.get("architectures") or []
    names = names if isinstance(names, list) else [names]
    for name in names:
        if isinstance(name, str) and name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    model_type = config.get("model_type")
    if not names and model_type in SUPPORTED_FAMILIES:
        return str(model_type)
    named = shorten(names[0] if names else model_type) if names or model_type else "not named"
    raise ModelLoadError(
        f"The model's architecture is {named}, which is not supported; supported are "
        + ", ".join(_ARCHITECTURES)
        + "."
    )


def _rope_layers(read: _Reader, family: str, num_layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * num_layers
    given = read.values.get("no_rope_layers")
    if given is None:
        interval = read.integer("no_rope_layer_interval", default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    # The name misleads: 1 marks a layer that has rotary embeddings.
    if not isinstance(given, list) or len(given) < num_layers or any(flag not in (0, 1) for flag in given):
        raise _bad("no_rope_layers", given, f"a list of 0 or 1 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in given[:num_layers])


def _windows(
    read: _Reader, family: str, num_layers: int, rope_layers: tuple[bool, ...]
) -> tuple[int | None, ...]:
    used = family == "mistral" or (family != "llama" and read.flag("use_sliding_window"))
    if not used or read.values.get("sliding_window") is None:
        return (None,) * num_layers
    window = read.integer("sliding_window")
    if family == "mistral":
        return (window,) * num_layers
    types = read.values.get("layer_types")
    if types is None:
        if family == "smollm3":
            return tuple(None if has_rope else window for has_rope in rope_layers)
        # 0 is allowed here and means every layer.
        full = read.values.get("max_window_layers", 28)
        if isinstance(full, bool) or not isinstance(full, int) or full < 0:
            raise _bad("max_window_layers", full, "a whole number of at least 0")
        return tuple(window if layer >= full else None for layer in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in allowed for kind in types):
        raise _bad("layer_types", types, f"{num_layers} of " + " or ".join(allowed))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def _rope(read: _Reader, head_dim: int, max_positions: int) -> tuple[RopeConfig, int]:
    """The rotary settings, and the context length they allow."""
    name = "rope_scaling" if read.values.get("rope_scaling") else "rope_parameters"
    values = read.mapping(name)
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in _ROPE_KINDS or any(isinstance(value, Mapping) for value in values.values()):
        what = "one kind for all layers" if kind in _ROPE_KINDS else "one of " + ", ".join(_ROPE_KINDS)
        raise _bad(f"{name}.rope_type", kind, what)
    rope = _Reader({"rope_theta": read.values.get("rope_theta"), **values}, where=f"{name}.")
    theta = rope.number("rope_theta", default=10_000.0)
    partial = rope.values.get("partial_rotary_factor", read.values.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise _bad("partial_rotary_factor", partial, "1")
    if kind == "default":
        return RopeConfig(theta=theta), max_positions
    if kind == "dynamic":
        # Up to its original length dynamic NTK is the default; beyond it, a token's rotation would
        # depend on how long the sequence has become, which cached keys cannot follow.
        original = rope.integer("original_max_position_embeddings", default=max_positions)
        return RopeConfig(theta=theta), min(original, max_positions)
    if kind == "linear":
        return RopeConfig(kind="linear", theta=theta, factor=rope.number("factor")), max_positions
    if kind == "factors":
        divisors = rope.values.get("factors")
        if not isinstance(divisors, (list, tuple)) or len(divisors) != head_dim // 2:
            raise _bad(f"{name}.factors", divisors, f"a list of {head_dim // 2} numbers")
        checked = tuple(_Reader({"factors": value}, rope.where).number("factors") for value in divisors)
        scale = rope.number("attention_factor", default=1.0)
        return RopeConfig(
            kind="factors", theta=theta, divisors=checked, attention_factor=scale
        ), max_positions
    stated = read.values.get("original_max_position_embeddings") or rope.values.get(
        "original_max_position_embeddings"
    )
    original = _Reader({"o": stated}).integer("o", default=max_positions)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if high <= low:
            raise _bad(f"{name}.high_freq_factor", high, f"above low_freq_factor, {low:g}")
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


def _yarn_attention_factor(rope: _Reader, factor: float) -> float:
    if rope.values.get("attention_factor") is not None:
        return rope.number("attention_factor")

    def scale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    if rope.values.get("mscale") and rope.values.get("mscale_all_dim"):
        return scale(rope.number("mscale")) / scale(rope.number("mscale_all_dim"))
    return scale(1.0)


def _eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    for source in (generation_config, config):
        given = source.get("eos_token_id")
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise _bad("eos_token_id", given, "a token id or a list of them")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()
