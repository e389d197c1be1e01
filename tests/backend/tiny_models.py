"""Tiny random models of every family, made on the spot with transformers and saved as safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 300
_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_FAMILY: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": None}, "qwen3": {"head_dim": 16}}


def tiny_model(family: str = "llama", *, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """A float32 model of ``family`` in eval mode, with weights large enough for differences to show.

    Args:
        family: a ``model_type``: llama, mistral, qwen2, qwen3, smollm3.
        overrides: fields of its config.
    """
    config = AutoConfig.for_model(family, **{**_COMMON, **_FAMILY.get(family, {}), **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name:
                parameter.copy_(1.0 + 0.3 * noise)
            else:
                parameter.copy_((0.5 if name.endswith("bias") else 0.2) * noise)
    model.tie_weights()
    return model


def save_tiny_model(folder: Path, family: str = "llama", *, seed: int = 0, **overrides: Any) -> Path:
    """``tiny_model`` saved to ``folder`` as ``config.json`` and ``model.safetensors``; returns ``folder``."""
    tiny_model(family, seed=seed, **overrides).save_pretrained(folder)
    return folder
