"""A model's ``config.json`` as flags of the one decoder.

A field that is missing takes the default of its family in transformers; one that makes no sense, or
asks for something the decoder does not do, is refused with a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mini_sglang.backend.loading.fp8_blocks import is_fp8
from mini_sglang.backend.models.fields import FieldReader, bad_field
from mini_sglang.backend.models.rope_config import RopeConfig, read_rope
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
        read = FieldReader({**_DEFAULTS[family], **config})
        if config.get("quantization_config") and not is_fp8(config):
            method = read.mapping("quantization_config").get("quant_method", "quantisation")
            raise ModelLoadError(
                f"The weights are quantised with {shorten(method)}, which is not supported; "
                "use the plain repository or a GGUF file."
            )
        if (act := read.values.get("hidden_act", "silu")) != "silu":
            raise bad_field("hidden_act", act, "silu, the only activation that is supported")
        num_layers = read.integer("num_hidden_layers")
        hidden_size = read.integer("hidden_size")
        num_heads = read.integer("num_attention_heads")
        num_kv_heads = read.integer("num_key_value_heads", default=num_heads)
        if num_heads % num_kv_heads:
            raise bad_field(
                "num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads, {num_heads}"
            )
        if read.values.get("head_dim") is None and hidden_size % num_heads:
            raise bad_field("num_attention_heads", num_heads, f"a divisor of hidden_size, {hidden_size}")
        head_dim = read.integer("head_dim", default=hidden_size // num_heads)
        if head_dim % 2:
            raise bad_field("head_dim", head_dim, "even")
        rope_layers = _rope_layers(read, family, num_layers)
        max_positions = read.integer("max_position_embeddings")
        rope, context_length = read_rope(read, head_dim, max_positions)
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
            eos_ids=read_eos_ids(config, generation_config or {}),
        )


def is_native(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is of a family that the decoder has flags for."""
    return _native_family(config) is not None


def _native_family(config: Mapping[str, Any]) -> str | None:
    names = _names(config)
    for name in names:
        if isinstance(name, str) and name in _ARCHITECTURES:
            return _ARCHITECTURES[name]
    model_type = config.get("model_type")
    return str(model_type) if not names and model_type in SUPPORTED_FAMILIES else None


def _names(config: Mapping[str, Any]) -> list[Any]:
    names = config.get("architectures") or []
    return names if isinstance(names, list) else [names]


def _family(config: Mapping[str, Any]) -> str:
    family = _native_family(config)
    if family is not None:
        return family
    names, model_type = _names(config), config.get("model_type")
    named = shorten(names[0] if names else model_type) if names or model_type else "not named"
    raise ModelLoadError(
        f"The model's architecture is {named}, which is not supported; supported are "
        + ", ".join(_ARCHITECTURES)
        + "."
    )


def _rope_layers(read: FieldReader, family: str, num_layers: int) -> tuple[bool, ...]:
    if family != "smollm3":
        return (True,) * num_layers
    given = read.values.get("no_rope_layers")
    if given is None:
        interval = read.integer("no_rope_layer_interval", default=4)
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    # The name misleads: 1 marks a layer that has rotary embeddings.
    if not isinstance(given, list) or len(given) < num_layers or any(flag not in (0, 1) for flag in given):
        raise bad_field("no_rope_layers", given, f"a list of 0 or 1 for each of {num_layers} layers")
    return tuple(bool(flag) for flag in given[:num_layers])


def _windows(
    read: FieldReader, family: str, num_layers: int, rope_layers: tuple[bool, ...]
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
            raise bad_field("max_window_layers", full, "a whole number of at least 0")
        return tuple(window if layer >= full else None for layer in range(num_layers))
    allowed = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != num_layers or any(kind not in allowed for kind in types):
        raise bad_field("layer_types", types, f"{num_layers} of " + " or ".join(allowed))
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def read_eos_ids(config: Mapping[str, Any], generation_config: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end an answer. Raises ``ModelLoadError`` for a field that makes no sense."""
    for source in (generation_config, config):
        given = source.get("eos_token_id")
        if given is None:
            continue
        ids = given if isinstance(given, list) else [given]
        if any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
            raise bad_field("eos_token_id", given, "a token id or a list of them")
        if ids:
            return tuple(dict.fromkeys(ids))
    return ()
