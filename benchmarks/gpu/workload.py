"""What the GPU benchmark runs: models as facts of their configs, and the public workload. Without torch."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_QWEN3: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151936,
    "head_dim": 128,
    "num_key_value_heads": 8,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000,
    "rms_norm_eps": 1e-6,
    "attention_bias": False,
    "hidden_act": "silu",
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "torch_dtype": "bfloat16",
}
CONFIGS: Mapping[str, Mapping[str, Any]] = {
    "Qwen3-0.6B": {
        **_QWEN3,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
    "Qwen3-14B": {
        **_QWEN3,
        "hidden_size": 5120,
        "intermediate_size": 17408,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "tie_word_embeddings": False,
    },
}
# For a rehearsal: ids of the workload need the vocabulary.
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 10048,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Size:
    """How much of everything: requests, their longest prompt and answer, and what the other parts take.

    Attributes:
        shortest: prompt and answer.
        stream: new tokens of the one stream.
        together: rows of a batch of transformers' ``generate``.
    """

    requests: int = 256
    shortest: int = 100
    longest: int = 1024
    stream: int = 256
    together: int = 32
    copy_bytes: int = 4 << 30
    matrix: int = 8192


FULL = Size()
TINY = Size(8, 4, 16, stream=12, together=4, copy_bytes=1 << 22, matrix=128)


def write_config(name: str, folder: Path, tiny: bool) -> dict[str, Any]:
    """Put the config of a model into ``folder``, which with LOAD_FORMAT=dummy is the model; gives it."""
    config = {**CONFIGS[name], **(_TINY if tiny else {})}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return config


def requests(size: Size, seed: int = 0) -> tuple[list[list[int]], list[int]]:
    """Prompts, and how many tokens answer each: the public workload where ``size`` is ``FULL``.

    Lengths are drawn uniformly and ids from 0 to 10,000, by ``random`` in the order of nano-vllm's benchmark,
    so that the prompts are the same as there.
    """
    draw = random.Random(seed)
    low, high = size.shortest, size.longest
    prompts = [[draw.randint(0, 10000) for _ in range(draw.randint(low, high))] for _ in range(size.requests)]
    return prompts, [draw.randint(low, high) for _ in range(size.requests)]
