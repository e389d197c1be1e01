"""What the metadata of a GGUF model file means: a Hugging Face style config and parameter names.

Facts about keys, defaults and names are those of llama.cpp (its converter and its loader). No torch here.
"""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NoReturn

from mini_sglang.backend.loading.gguf import GGUFFile
from mini_sglang.errors import ModelLoadError, shorten

_MAX_SIZE = 1 << 24
_MAX_LAYERS = 4096
_NO_ROPE_INTERVAL = 4


@dataclass(frozen=True, slots=True)
class _Architecture:
    """How llama.cpp's name for an architecture maps to transformers'.

    Attributes:
        interleaved: llama.cpp rotates neighbouring pairs, so its converter reorders the rows of q and k.
    """

    model_type: str
    class_name: str
    interleaved: bool


ARCHITECTURES: Mapping[str, _Architecture] = MappingProxyType(
    {
        "llama": _Architecture("llama", "LlamaForCausalLM", interleaved=True),
        "qwen2": _Architecture("qwen2", "Qwen2ForCausalLM", interleaved=False),
        "qwen3": _Architecture("qwen3", "Qwen3ForCausalLM", interleaved=False),
        "smollm3": _Architecture("smollm3", "SmolLM3ForCausalLM", interleaved=True),
    }
)

# Keys that change what the model computes and that our decoder has no place for, with the value that
# changes nothing.
_NEUTRAL: Mapping[str, float] = MappingProxyType(
    {
        "expert_count": 0,
        "attention.clamp_kqv": 0.0,
        "attention.max_alibi_bias": 0.0,
        "attention.scale": 0.0,
        "attention.causal": True,
        "attn_logit_softcapping": 0.0,
        "final_logit_softcapping": 0.0,
        "logit_scale": 1.0,
        "residual_scale": 1.0,
        "embedding_scale": 1.0,
        "rope.scaling.yarn_ext_factor": 1.0,
        "rope.scaling.yarn_log_multiplier": 0.0,
    }
)

ROPE_FACTORS_NAME = "rope_freqs.weight"
_TOP_NAMES: Mapping[str, str] = MappingProxyType(
    {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
)
_LAYER_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "attn_q_norm": "self_attn.q_norm",
        "attn_k_norm": "self_attn.k_norm",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
)
_LAYER_PATTERN = re.compile(r"blk\.(0|[1-9][0-9]{0,5})\.([a-z_]+)\.(weight|bias)", re.ASCII)
# A table of rotation frequencies that old converters wrote; every loader computes it instead.
_IGNORED_PATTERN = re.compile(r"blk\.[0-9]+\.attn_rot_embd\.weight", re.ASCII)


def architecture(file: GGUFFile) -> _Architecture:
    """The architecture of a model file.

    Raises:
        ModelLoadError: it is not one of ``ARCHITECTURES``, or is not said.
    """
    return ARCHITECTURES[_architecture_name(file)]


def hf_names(file: GGUFFile) -> dict[str, str]:
    """Map the Hugging Face name of each parameter to its name in the file.

    Raises:
        ModelLoadError: a tensor is none that the supported architectures have.
    """
    names: dict[str, str] = {}
    for name in file.tensors:
        top, _, kind = name.rpartition(".")
        layer = _LAYER_PATTERN.fullmatch(name)
        if top in _TOP_NAMES and kind in ("weight", "bias"):
            names[f"{_TOP_NAMES[top]}.{kind}"] = name
        elif layer and layer[2] in _LAYER_NAMES:
            names[f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{layer[3]}"] = name
        elif name != ROPE_FACTORS_NAME and not _IGNORED_PATTERN.fullmatch(name):
            raise ModelLoadError(
                f"The GGUF file {file.path} has a tensor {shorten(name)}, which no supported "
                f"architecture has ({', '.join(ARCHITECTURES)})."
            )
    return names


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """The content a ``config.json`` of this model would have.

    ``rope_parameters`` is always there, with ``rope_type`` ``default``, ``linear``, ``yarn`` or, where the
    file has a table of factors, ``factors``: each inverse frequency is divided by its entry in ``factors``.
    ``eos_token_id`` is a list where the file names several ends (end of text, turn, message).

    Raises:
        ModelLoadError: the architecture is not supported, a key is missing or has an impossible value, or
            a key asks for a computation that is not supported.
    """
    return _Metadata(file).config()


def _architecture_name(file: GGUFFile) -> str:
    name = file.metadata.get("general.architecture")
    if name not in ARCHITECTURES:
        shown = "no architecture" if name is None else f"the architecture {shorten(name)}"
        raise ModelLoadError(
            f"The GGUF file {file.path} has {shown}; supported are {', '.join(ARCHITECTURES)}."
        )
    return str(name)


class _Metadata:
    """Typed, checked access to the keys of one architecture."""

    def __init__(self, file: GGUFFile) -> None:
        self.file = file
        self.name = _architecture_name(file)

    def config(self) -> dict[str, Any]:
        self._refuse_what_is_ignored()
        arch = ARCHITECTURES[self.name]
        hidden_size = self.size("embedding_length")
        heads = self.size("attention.head_count")
        head_dim = self.size("attention.key_length", hidden_size // heads)
        self.expect("attention.value_length", head_dim)
        self.expect("rope.dimension_count", head_dim)
        layers = self.size("block_count", limit=_MAX_LAYERS)
        theta = self.positive("rope.freq_base", 10000.0)
        tensors = self.file.tensors
        config: dict[str, Any] = {
            "architectures": [arch.class_name],
            "model_type": arch.model_type,
            "hidden_size": hidden_size,
            "intermediate_size": self.size("feed_forward_length"),
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": self.size("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": self.positive("attention.layer_norm_rms_epsilon"),
            "rope_theta": theta,
            "rope_parameters": {"rope_theta": theta, **self._rope_scaling(head_dim)},
            "max_position_embeddings": self.size("context_length"),
            "vocab_size": self._vocab_size(),
            "tie_word_embeddings": "output.weight" not in tensors,
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_gate.bias" in tensors,
        }
        if self.name == "smollm3":
            # No key says it: llama.cpp too has the interval in its code. 1 is a layer with rope.
            config["no_rope_layers"] = [int((i + 1) % _NO_ROPE_INTERVAL != 0) for i in range(layers)]
        self._add_sliding_window(config)
        self._add_token_ids(config)
        return config

    def bad(self, key: str, value: object, allowed: str) -> NoReturn:
        raise ModelLoadError(
            f"In the GGUF file {self.file.path}, {key} is {shorten(value)}; it must be {allowed}."
        )

    def get(self, suffix: str) -> tuple[str, Any]:
        key = f"{self.name}.{suffix}"
        return key, self.file.metadata.get(key)

    def size(self, suffix: str, default: int | None = None, limit: int = _MAX_SIZE) -> int:
        key, value = self.get(suffix)
        value = default if value is None else value
        if type(value) is not int or not 1 <= value <= limit:
            self.bad(key, "missing" if value is None else value, f"a whole number from 1 to {limit}")
        return value

    def positive(self, suffix: str, default: float | None = None) -> float:
        key, found = self.get(suffix)
        value: Any = default if found is None else found
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            self.bad(key, "missing" if value is None else value, "a number above 0")
        return _shortest(float(value))

    def expect(self, suffix: str, expected: int) -> None:
        key, value = self.get(suffix)
        if value is not None and value != expected:
            self.bad(key, value, f"{expected}, the size of an attention head")

    def _refuse_what_is_ignored(self) -> None:
        metadata = self.file.metadata
        for suffix, neutral in _NEUTRAL.items():
            key, value = self.get(suffix)
            if value is not None and value != neutral:
                self.bad(key, value, f"{neutral:g} or absent, as anything else is not supported")
        parts = metadata.get("split.count", 1)
        if parts not in (0, 1):
            self.bad("split.count", parts, "1: join the parts of a split model with llama-gguf-split --merge")

    def _vocab_size(self) -> int:
        embedding = self.file.tensors.get("token_embd.weight")
        if embedding is None or len(embedding.shape) != 2:
            raise ModelLoadError(
                f"The GGUF file {self.file.path} has no matrix token_embd.weight, the token embedding."
            )
        return embedding.shape[0]

    def _rope_scaling(self, head_dim: int) -> dict[str, Any]:
        key, kind = self.get("rope.scaling.type")
        # As in llama.cpp: a factor without a type is linear, and one without a value is 1.
        factor = self.positive("rope.scaling.factor", self.positive("rope.scale_linear", 1.0))
        attention_key, _ = self.get("rope.scaling.attn_factor")
        attention_factor = self.positive("rope.scaling.attn_factor", 1.0)
        if kind not in (None, "none", "linear", "yarn"):
            self.bad(key, kind, "none, linear or yarn")
        scaling: dict[str, Any] = {"rope_type": "default"}
        if kind == "yarn":
            original = self.size("rope.scaling.original_context_length", self.size("context_length"))
            scaling = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original}
            for name in ("beta_fast", "beta_slow"):
                if self.get(f"rope.scaling.yarn_{name}")[1] is not None:
                    scaling[name] = self.positive(f"rope.scaling.yarn_{name}")
            if attention_factor != 1.0:
                # llama.cpp multiplies its own factor by yarn's; in a config the value stands for both.
                scaling["attention_factor"] = attention_factor * (1 + 0.1 * math.log(max(1.0, factor)))
        elif attention_factor != 1.0:
            self.bad(attention_key, attention_factor, "1, unless the scaling type is yarn")
        elif kind != "none" and factor != 1.0:
            scaling = {"rope_type": "linear", "factor": factor}
        if ROPE_FACTORS_NAME in self.file.tensors:
            if scaling["rope_type"] != "default":
                self.bad(key, kind, f"none where the file has a tensor {ROPE_FACTORS_NAME}")
            scaling = {"rope_type": "factors", "factors": self._rope_factors(head_dim)}
        return scaling

    def _rope_factors(self, head_dim: int) -> list[float]:
        tensor = self.file.tensors[ROPE_FACTORS_NAME]
        if tensor.type.name != "F32" or tensor.shape != (head_dim // 2,):
            raise ModelLoadError(
                f"In the GGUF file {self.file.path}, {ROPE_FACTORS_NAME} is {tensor.type.name} of the shape "
                f"{tensor.shape}; it must be F32 of the shape ({head_dim // 2},)."
            )
        factors = list(struct.unpack(f"<{head_dim // 2}f", self.file.view(ROPE_FACTORS_NAME).tobytes()))
        for factor in factors:
            if not math.isfinite(factor) or factor <= 0:
                self.bad(f"an entry of {ROPE_FACTORS_NAME}", factor, "a number above 0")
        return factors

    def _add_sliding_window(self, config: dict[str, Any]) -> None:
        if not self.get("attention.sliding_window")[1]:
            return
        config["sliding_window"] = self.size("attention.sliding_window", limit=1 << 31)
        if self.name == "llama":
            # The llama family has no window; a llama file with one is a Mistral.
            config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"]}
        else:
            config |= {"use_sliding_window": True, "max_window_layers": 0}

    def _add_token_ids(self, config: dict[str, Any]) -> None:
        ends: list[int] = []
        for name in ("eos", "eot", "eom"):
            token_id = self._token_id(name, config["vocab_size"])
            if token_id is not None and token_id not in ends:
                ends.append(token_id)
        if ends:
            config["eos_token_id"] = ends[0] if len(ends) == 1 else ends
        for name, key in (("bos", "bos_token_id"), ("padding", "pad_token_id")):
            token_id = self._token_id(name, config["vocab_size"])
            if token_id is not None:
                config[key] = token_id

    def _token_id(self, name: str, vocab_size: int) -> int | None:
        key = f"tokenizer.ggml.{name}_token_id"
        value = self.file.metadata.get(key)
        if value is None:
            return None
        if type(value) is not int or not 0 <= value < vocab_size:
            self.bad(key, value, f"a token id from 0 to {vocab_size - 1}")
        return value


def _shortest(value: float) -> float:
    """The shortest decimal that is the same float32: metadata has 1e-5 as 9.999999747378752e-06."""
    try:
        single = struct.pack("<f", value)
    except OverflowError:
        return value
    return next(
        (
            short
            for digits in range(6, 9)
            if struct.pack("<f", short := float(f"{value:.{digits}g}")) == single
        ),
        value,
    )
