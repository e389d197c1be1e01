"""Tiny models of every family, written as safetensors and as GGUF, and ways to read them back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import gguf
import numpy as np
import torch
import transformers

from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
# transformers' config class, its settings, and the architecture's name in a GGUF file.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama": (
        "LlamaConfig",
        {"tie_word_embeddings": False, "attention_bias": True, "mlp_bias": True},
        "llama",
    ),
    "llama-tied": ("LlamaConfig", {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}, "llama"),
    "mistral": ("MistralConfig", {"sliding_window": 32, "head_dim": 16}, "llama"),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True, "rope_theta": 1_000_000.0}, "qwen2"),
    "qwen3": ("Qwen3Config", {"head_dim": 32, "tie_word_embeddings": True}, "qwen3"),
    "smollm3": ("SmolLM3Config", {"tie_word_embeddings": True}, "smollm3"),
}
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
F32 = gguf.GGMLQuantizationType.F32
Q8_0 = gguf.GGMLQuantizationType.Q8_0


def tiny_model(family: str) -> Any:
    name, extra, _ = FAMILIES[family]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SIZES, **extra})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    return model


def gguf_name(name: str) -> str:
    stem, _, kind = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, layer, rest = stem.split(".", 3)
        return f"blk.{layer}.{GGUF_NAMES[rest]}.{kind}"
    return f"{GGUF_NAMES[stem]}.{kind}"


def interleave(values: np.ndarray, heads: int) -> np.ndarray:
    """What llama.cpp's converter does to the rows of q and k of the llama family."""
    return (
        values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        .swapaxes(1, 2)
        .reshape(values.shape)
    )


def write_gguf(
    path: Path,
    model: Any,
    architecture: str,
    kind: gguf.GGMLQuantizationType = F32,
    extra: Callable[[gguf.GGUFWriter], None] = lambda writer: None,
    others: Mapping[str, gguf.GGMLQuantizationType] = MappingProxyType({}),
    encode: Callable[[np.ndarray, gguf.GGMLQuantizationType], np.ndarray] = gguf.quants.quantize,
) -> Path:
    """Write a transformers model as llama.cpp's converter would: matrices in ``kind``, vectors in F32.

    ``others`` are the kinds of those matrices whose names contain its keys, ``encode`` gives their bytes.
    """
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_vocab_size(config.vocab_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_bos_token_id(config.bos_token_id)
    writer.add_eos_token_id(config.eos_token_id)
    writer.add_pad_token_id(config.pad_token_id)
    if config.model_type == "mistral":
        writer.add_sliding_window(config.sliding_window)
    extra(writer)
    tied = config.tie_word_embeddings
    for name, parameter in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = parameter.numpy()
        if architecture in ("llama", "smollm3") and ("q_proj" in name or "k_proj" in name):
            values = interleave(values, heads if "q_proj" in name else kv_heads)
        special = next((other for part, other in others.items() if part in name), kind)
        stored = special if values.ndim == 2 else F32
        writer.add_tensor(gguf_name(name), encode(values, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def dense(checkpoint: Checkpoint, name: str, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    if len(checkpoint.shape(name)) == 2:
        return checkpoint.weight(name, dtype).dequantize(dtype)
    return checkpoint.tensor(name, dtype)


def load_everything(path: Path) -> None:
    checkpoint = open_checkpoint(path, dequantize=False)
    for name in checkpoint.names():
        dense(checkpoint, name)
