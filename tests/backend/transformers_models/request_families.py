"""Tiny random models that are served with one cache per request, and what their caches allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.backend.transformers_models.families import Family

_SSM = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_chunk_size": 8, "mamba_n_groups": 1}
_LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    "head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}


@dataclass(frozen=True)
class Case:
    """A family with what a trial of its caches must find.

    Attributes:
        chunks: whether a prompt can be read in pieces.
        together: whether sequences of different lengths can be decoded as one batch.
        grows: whether a cache grows with the sequence.
        replays: whether a sequence can be set back and resumed.
    """

    family: Family
    chunks: bool = True
    together: bool = True
    grows: bool = True
    replays: bool = True


def _case(model_type: str, config: dict[str, Any] | None = None, **found: bool) -> Case:
    return Case(Family(model_type, model_type, "per_request", config or {}), **found)


CASES = (
    _case("mamba", {"state_size": 8, "time_step_rank": 4}, chunks=False, grows=False),
    _case(
        "mamba2",
        {"state_size": 8, "num_heads": 8, "head_dim": 8, "n_groups": 2, "chunk_size": 8},
        grows=False,
    ),
    _case("falcon_mamba", {"state_size": 8, "time_step_rank": 4}, chunks=False, grows=False),
    _case("rwkv", {"attention_hidden_size": 32, "context_length": 128}, together=False, grows=False),
    _case("falcon_h1", {**_SSM, "mamba_d_ssm": 64}),
    _case(
        "jamba",
        {
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "num_experts": 2,
            "num_experts_per_tok": 1,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "use_mamba_kernels": False,
        },
        chunks=False,
    ),
    _case("bamba", {**_SSM, "attn_layer_indices": [1]}),
    _case(
        "zamba2",
        {
            "num_hidden_layers": 4,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "hybrid_layer_ids": [1, 3],
            "mamba_d_state": 8,
            "n_mamba_heads": 8,
            "mamba_headdim": 8,
            "mamba_ngroups": 1,
            "chunk_size": 8,
            "num_mem_blocks": 1,
            "attention_head_dim": 16,
            "attention_hidden_size": 64,
        },
    ),
    _case(
        "granitemoehybrid", {**_SSM, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 32}
    ),
    _case(
        "nemotron_h",
        {
            "layers_block_type": ["mamba", "moe", "attention"],
            "num_hidden_layers": 3,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 2,
            "chunk_size": 8,
        },
    ),
    _case(
        "recurrent_gemma",
        {"lru_width": 32, "attention_window_size": 8, "num_hidden_layers": 3, "head_dim": 8},
        chunks=False,
    ),
    _case("lfm2", {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    _case("qwen3_next", {**_LINEAR, "num_experts": 4, "decoder_sparse_step": 1}),
    _case("qwen3_5_text", _LINEAR),
    _case(
        "deepseek_v32",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 24,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
            "n_group": 1,
            "topk_group": 1,
            "index_n_heads": 2,
            "index_head_dim": 16,
            "index_topk": 4,
        },
        chunks=False,
        together=False,
        replays=False,
    ),
    _case(
        "kimi_linear",
        {
            "layer_types": ["linear_attention", "full_attention"],
            "num_key_value_heads": 4,
            "linear_num_heads": 4,
            "linear_head_dim": 8,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 12,
        },
    ),
    _case("falcon", {"alibi": True}),
    _case("bloom"),
    _case("mpt", {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    _case("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 8}),
    _case("xglm", {"attention_heads": 4, "d_model": 32, "num_layers": 2}),
    _case(
        "bart",
        {
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 40,
            "encoder_layers": 2,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 40,
        },
        together=False,
    ),
    _case("openai-gpt", chunks=False, together=False, grows=False),
)
