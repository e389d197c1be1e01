"""Which way a model is served: our decoder, our paged attention, or one cache per request."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from mini_sglang.backend.models.config import is_native
from mini_sglang.backend.transformers_models.loading import read_config

Kind = Literal["native", "paged", "per_request"]

# What a layer may be whose whole memory of the past is keys and values.
_PAGED_LAYERS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})


def choose_kind(path: Path, checkpoint_config: Mapping[str, Any], trust_remote_code: bool = False) -> Kind:
    """How the model in ``path`` is to be served, as far as its config and class tell.

    ``paged`` is a candidate: the loaded model must still pass ``probe`` and ``self_check``.

    Args:
        checkpoint_config: the content of its ``config.json``.

    Raises:
        ModelLoadError: transformers is needed and missing, or does not know the model.
    """
    if is_native(checkpoint_config):
        return "native"
    config = read_config(path, checkpoint_config, trust_remote_code)
    return "per_request" if why_per_request(config) else "paged"


def why_per_request(config: Any) -> str:
    """What keeps our attention out of a model of this ``PreTrainedConfig``, empty where nothing is seen."""
    text = config.get_text_config(decoder=True)
    if getattr(config, "is_encoder_decoder", False) or getattr(text, "add_cross_attention", False):
        return "it has cross attention"
    layers = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None)
    if others := sorted({str(kind) for kind in layers or ()} - _PAGED_LAYERS):
        return f"it has layers of the kind {others[0]}"
    model_class = class_of(config)
    if model_class is None:
        # The repository's own code, which the loaded model's probe will judge.
        return ""
    if getattr(model_class, "_is_stateful", False) and not layers:
        return "it keeps a state that is no KV"
    if not model_class._can_set_attn_implementation():
        return "its attention is no function that can be replaced"
    return ""


def class_of(config: Any) -> Any:
    """transformers' class of causal LMs with this config; None where it has none."""
    mapping = importlib.import_module("transformers").models.auto.modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING
    return mapping.get(type(config), None)
