"""Reading config.json: against transformers' own reading, and refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.rope import inverse_frequencies
from mini_sglang.errors import ModelLoadError
from tests.backend.tiny_models import tiny_model

BASE: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def read(**changes: Any) -> ModelConfig:
    return ModelConfig.from_hf({**BASE, **changes})


def _family(model_type: str, class_name: str) -> dict[str, Any]:
    return {"model_type": model_type, "architectures": [class_name]}


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 2.5},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {
            "rope_type": "llama3",
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024},
        {"rope_type": "yarn", "factor": 8.0, "beta_fast": 16, "beta_slow": 2, "truncate": False},
        {"rope_type": "yarn", "factor": 8.0, "attention_factor": 1.5},
        {"rope_type": "yarn", "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 1.1},
    ],
    ids=str,
)
@pytest.mark.parametrize("head_dim", [16, 128])
def test_scaled_frequencies_are_those_of_transformers(scaling: dict[str, Any], head_dim: int) -> None:
    fields = {**BASE, "head_dim": head_dim}
    kind = scaling.get("rope_type", scaling.get("type"))
    theirs = AutoConfig.for_model(**{**fields, "rope_theta": 50_000.0, "rope_scaling": dict(scaling)})
    frequencies, attention_factor = ROPE_INIT_FUNCTIONS[kind](theirs, device="cpu")
    for spelling in (
        {"rope_theta": 50_000.0, "rope_scaling": scaling},
        {"rope_parameters": {"rope_theta": 50_000.0, **scaling}},
    ):
        ours = ModelConfig.from_hf({**fields, **spelling})
        torch.testing.assert_close(inverse_frequencies(ours.rope, head_dim), frequencies, rtol=1e-6, atol=0)
        assert ours.rope.attention_factor == pytest.approx(attention_factor)


def test_factors_divide_the_frequencies() -> None:
    factors = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0]
    ours = read(rope_parameters={"rope_type": "factors", "rope_theta": 500.0, "factors": factors})
    plain = 1.0 / 500.0 ** (torch.arange(0, 16, 2) / 16)
    torch.testing.assert_close(inverse_frequencies(ours.rope, 16), plain / torch.tensor(factors))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_every_family_saved_by_transformers_is_read(family: str) -> None:
    saved = tiny_model(family).config
    ours = ModelConfig.from_hf(saved.to_dict())
    assert (ours.family, ours.num_layers, ours.num_kv_heads, ours.head_dim) == (family, 3, 2, 16)
    assert ours.rope.theta == saved.rope_parameters["rope_theta"]
    assert ours.eos_ids == (2,)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_missing_fields_take_the_family_s_default(family: str) -> None:
    given = {k: v for k, v in BASE.items() if k not in ("num_key_value_heads", "max_position_embeddings")}
    given |= {"model_type": family, "architectures": None, "num_attention_heads": 32, "hidden_size": 256}
    theirs = AutoConfig.for_model(**{k: v for k, v in given.items() if v is not None})
    ours = ModelConfig.from_hf(given)
    assert ours.num_kv_heads == theirs.num_key_value_heads
    assert ours.head_dim == (getattr(theirs, "head_dim", None) or 8)
    assert ours.context_length == theirs.max_position_embeddings
    assert ours.tied_embeddings == theirs.tie_word_embeddings
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.rope.theta == theirs.rope_parameters["rope_theta"]


def test_windows_per_layer() -> None:
    mistral, qwen = _family("mistral", "MistralForCausalLM"), _family("qwen2", "Qwen2ForCausalLM")
    smollm3 = _family("smollm3", "SmolLM3ForCausalLM")
    sliding = {"sliding_window": 8, "use_sliding_window": True}
    assert read(**mistral, sliding_window=8).windows == (8,) * 4
    assert read(**mistral, sliding_window=None).windows == (None,) * 4
    assert read(**qwen, sliding_window=8).windows == (None,) * 4
    assert read(**qwen, **sliding, max_window_layers=3).windows == (None, None, None, 8)
    assert read(**qwen, **sliding, max_window_layers=0).windows == (8,) * 4
    types = ["sliding_attention", "full_attention"] * 2
    assert read(**qwen, **sliding, layer_types=types).windows == (8, None, 8, None)
    assert read(**smollm3, **sliding, no_rope_layers=[1, 0, 1, 1]).windows == (None, 8, None, None)
    assert read(**smollm3).rope_layers == (True, True, True, False)


def test_the_context_that_rope_scaling_allows() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 4.0}
    assert read(rope_scaling=dynamic).context_length == 4096
    assert read(rope_scaling={**dynamic, "original_max_position_embeddings": 1024}).context_length == 1024
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096}
    assert read(rope_scaling=yarn).context_length == 16384


def test_end_of_text_ids() -> None:
    assert ModelConfig.from_hf({**BASE, "eos_token_id": [3, 4, 3]}).eos_ids == (3, 4)
    assert ModelConfig.from_hf({**BASE, "eos_token_id": 3}, {"eos_token_id": [5, 6]}).eos_ids == (5, 6)
    assert ModelConfig.from_hf({**BASE, "eos_token_id": 3}, {"eos_token_id": None}).eos_ids == (3,)
    assert read().eos_ids == ()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"architectures": ["GPT2LMHeadModel"]},
            "'GPT2LMHeadModel', which is not supported; supported are Llama",
        ),
        ({"architectures": None, "model_type": "gpt2"}, "'gpt2', which is not supported"),
        ({"architectures": None, "model_type": None}, "architecture is not named"),
        ({"architectures": [["LlamaForCausalLM"]]}, "which is not supported"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0; it must be a whole number from 1"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers is '4'"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True"),
        ({"hidden_size": None}, "config.json has no hidden_size, which is required."),
        ({"vocab_size": 1e9}, "vocab_size is 1000000000.0"),
        (
            {"num_key_value_heads": 3},
            "num_key_value_heads is 3; it must be a divisor of num_attention_heads, 4.",
        ),
        ({"hidden_size": 66}, "num_attention_heads is 4; it must be a divisor of hidden_size, 66."),
        ({"head_dim": 15}, "head_dim is 15; it must be even."),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; it must be silu"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings is 'yes'; it must be true or false."),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantised with 'gptq'"),
        ({"rope_scaling": {"type": "longrope", "factor": 4.0}}, "rope_type is 'longrope'; it must be one of"),
        ({"rope_scaling": {"rope_type": "linear"}}, "no rope_scaling.factor, which is required."),
        ({"rope_scaling": {"rope_type": "linear", "factor": -1}}, "rope_scaling.factor is -1"),
        ({"rope_scaling": [1]}, "rope_scaling is .*; it must be an object."),
        ({"rope_theta": 1.0, "rope_scaling": {"type": "yarn", "factor": 2}}, "rope_theta is 1"),
        ({"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "one kind for all layers"),
        ({"rope_parameters": {"rope_type": "factors", "factors": [1.0]}}, "a list of 8 numbers"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5; it must be 1."),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>'"),
        (
            {
                **_family("qwen2", "Qwen2ForCausalLM"),
                "use_sliding_window": True,
                "layer_types": ["chunked"] * 4,
            },
            "layer_types is .*; it must be 4 of full_attention or sliding_attention.",
        ),
        ({**_family("mistral", "MistralForCausalLM"), "sliding_window": 0}, "sliding_window is 0"),
        ({**_family("smollm3", "SmolLM3ForCausalLM"), "no_rope_layers": [1, 2]}, "no_rope_layers is"),
    ],
)
def test_what_makes_no_sense_is_refused_with_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ModelLoadError, match=sentence):
        read(**changes)
