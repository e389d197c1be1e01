"""Tiny random models of the families that are served through transformers, and how each is served."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 200
WINDOW = 8
CONTEXT = 128

_SHARED: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "sliding_window": WINDOW,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
# Whichever of these names a family's config knows.
_SIZES: dict[str, Any] = {
    **_SHARED,
    "ffn_dim": 40,
    "n_inner": 40,
    "word_embed_proj_dim": 32,
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
_MIXED = {"layer_types": ["sliding_attention", "full_attention"]}
_MLA = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 16,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
}
_HEADS = {"head_dim": 12}


@dataclass(frozen=True)
class Family:
    """One row of the list in docs/models.md.

    Attributes:
        name: as users know it.
        model_type: of its config.
        kind: what ``choose_kind`` says; ``paged`` models are run against transformers here.
        config: fields beside the sizes that all share.
    """

    name: str
    model_type: str
    kind: str = "paged"
    config: dict[str, Any] = field(default_factory=dict)


NATIVE = (
    ("Llama 1 to 3.x, SmolLM, SmolLM 2", "llama"),
    ("Mistral", "mistral"),
    ("Qwen2, Qwen2.5", "qwen2"),
    ("Qwen3", "qwen3"),
    ("SmolLM 3", "smollm3"),
)
PAGED = (
    Family("Gemma", "gemma", config=_HEADS),
    Family("Gemma 2", "gemma2", config={**_MIXED, **_HEADS, "query_pre_attn_scalar": 20}),
    Family("Gemma 3", "gemma3_text", config={**_MIXED, **_HEADS, "query_pre_attn_scalar": 20}),
    Family(
        "Gemma 3 with vision (text only)",
        "gemma3",
        config={
            "text_config": {**_SHARED, **_MIXED, **_HEADS, "query_pre_attn_scalar": 20},
            "vision_config": {
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "image_size": 28,
                "patch_size": 14,
            },
            "mm_tokens_per_image": 4,
        },
    ),
    Family(
        "Gemma 3n",
        "gemma3n_text",
        config={
            **_HEADS,
            "num_hidden_layers": 4,
            "intermediate_size": [40] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.5, 0.0, 0.0, 0.0],
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "laurel_rank": 8,
            "altup_num_inputs": 2,
        },
    ),
    Family(
        "Gemma 4",
        "gemma4_text",
        config={
            **_MIXED,
            **_HEADS,
            "global_head_dim": 24,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
            "num_kv_shared_layers": 0,
        },
    ),
    Family("Phi-2", "phi"),
    Family("Phi-3, Phi-4", "phi3"),
    Family("Phi-3.5 MoE", "phimoe"),
    Family("OLMo", "olmo", config={"clip_qkv": 3.0}),
    Family("OLMo 2", "olmo2"),
    Family("OLMo 3", "olmo3", config=_MIXED),
    Family("OLMoE", "olmoe"),
    Family("GPT-2", "gpt2", config={"scale_attn_by_inverse_layer_idx": True}),
    Family("GPT-BigCode (StarCoder)", "gpt_bigcode"),
    Family("GPT-NeoX (Pythia)", "gpt_neox"),
    Family("GPT-J", "gptj", config={"rotary_dim": 4}),
    Family("CodeGen", "codegen", config={"rotary_dim": 4}),
    Family("OPT", "opt"),
    Family("BioGPT", "biogpt"),
    Family("StarCoder 2", "starcoder2"),
    Family("StableLM", "stablelm"),
    Family("Persimmon", "persimmon"),
    Family("Nemotron, Minitron", "nemotron"),
    Family("Cohere (Command R)", "cohere", config={"use_qk_norm": True}),
    Family("Cohere 2 (Command R7B, Command A)", "cohere2", config=_MIXED),
    Family("GLM", "glm", config=_HEADS),
    Family("GLM-4", "glm4", config=_HEADS),
    Family("GLM-4.5", "glm4_moe", config=_HEADS),
    Family("Granite", "granite", config={"attention_multiplier": 0.2, "logits_scaling": 3.0}),
    Family(
        "Granite 4 (attention only)",
        "granitemoehybrid",
        config={
            "layer_types": ["attention", "attention"],
            "mamba_n_heads": 4,
            "mamba_d_head": 16,
            "shared_intermediate_size": 40,
            "num_local_experts": 0,
        },
    ),
    Family("Granite MoE", "granitemoe", config={"attention_multiplier": 0.2, "logits_scaling": 3.0}),
    Family("Helium", "helium", config={"head_dim": 8}),
    Family("EXAONE 4", "exaone4", config=_MIXED),
    Family("ERNIE 4.5", "ernie4_5"),
    Family("Hunyuan", "hunyuan_v1_dense", config=_HEADS),
    Family("Seed-OSS", "seed_oss", config=_HEADS),
    Family("Apertus", "apertus"),
    Family("Arcee", "arcee"),
    Family("Ministral", "ministral", config={**_MIXED, **_HEADS}),
    Family("Mixtral", "mixtral", config={"sliding_window": None}),
    Family("Qwen2-MoE", "qwen2_moe"),
    Family("Qwen3-MoE", "qwen3_moe", config=_HEADS),
    Family("DeepSeek-V2", "deepseek_v2", config=_MLA),
    Family("DeepSeek-V3, R1", "deepseek_v3", config=_MLA),
    Family("MiniCPM 3", "minicpm3", config=_MLA),
    Family("MiniMax M2", "minimax_m2", config={**_HEADS, "rotary_dim": 8}),
    Family("gpt-oss", "gpt_oss", config={**_MIXED, **_HEADS}),
    Family(
        "MiMo-V2",
        "mimo_v2_flash",
        config={**_HEADS, "v_head_dim": 8, "layer_types": ["full_attention", "sliding_attention"]},
    ),
)

PER_REQUEST = (
    Family(
        "LFM2", "lfm2", "per_request", {"layer_types": ["conv", "full_attention"], "num_hidden_layers": 2}
    ),
    *(
        Family(name, model_type, "per_request")
        for name, model_type in (
            ("Falcon", "falcon"),
            ("BLOOM", "bloom"),
            ("MPT", "mpt"),
            ("GPT-Neo", "gpt_neo"),
            ("XGLM", "xglm"),
            ("Mamba", "mamba"),
            ("Mamba 2", "mamba2"),
            ("Falcon Mamba", "falcon_mamba"),
            ("Falcon-H1", "falcon_h1"),
            ("Jamba", "jamba"),
            ("Bamba", "bamba"),
            ("Zamba 2", "zamba2"),
            ("Nemotron-H", "nemotron_h"),
            ("Granite 4 (hybrid)", "granitemoehybrid"),
            ("RecurrentGemma", "recurrent_gemma"),
            ("RWKV", "rwkv"),
            ("Qwen3-Next", "qwen3_next"),
            ("Qwen3.5", "qwen3_5_text"),
            ("Kimi Linear", "kimi_linear"),
            ("DeepSeek-V3.2", "deepseek_v32"),
            ("BART", "bart"),
        )
    ),
)


def tiny_config(family: Family, **overrides: Any) -> Any:
    """Two layers or so, every token able to matter."""
    known = AutoConfig.for_model(family.model_type)
    names = set(known.to_dict()) | set(known.attribute_map)
    sizes = {name: value for name, value in _SIZES.items() if name in names}
    return AutoConfig.for_model(family.model_type, **{**sizes, **family.config, **overrides})


def tiny_model(family: Family, **overrides: Any) -> PreTrainedModel:
    """A float32 model in eval mode, with weights large enough for differences to show."""
    config = tiny_config(family, **overrides)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager").eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in name and parameter.dim() == 1:
                parameter.copy_(1.0 + 0.3 * noise)
            elif name.startswith("lm_head") and parameter.dim() == 1:
                parameter.copy_(0.05 * noise)
            else:
                parameter.copy_((0.5 if parameter.dim() == 1 else 0.2) * noise)
    model.tie_weights()
    return model


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def table() -> str:
    """The list in docs/models.md: every family of the tests and how it is served."""
    lines = ["| model | `model_type` | served |", "| --- | --- | --- |"]
    lines += [f"| {name} | `{model_type}` | native |" for name, model_type in NATIVE]
    for family in (*PAGED, *PER_REQUEST):
        kind = family.kind.replace("_", " ")
        lines.append(f"| {family.name} | `{family.model_type}` | {kind} |")
    return "\n".join(lines) + "\n"
