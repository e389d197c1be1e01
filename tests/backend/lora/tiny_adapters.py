"""Tiny random adapters, made by PEFT over the tiny models and saved as it saves them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedModel

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def save_tiny_adapter(
    folder: Path, model: PreTrainedModel, *, seed: int = 0, targets: Sequence[str] | str = ALL, **config: Any
) -> Path:
    """A random adapter of ``model``, which is as it was afterwards; returns ``folder``.

    Args:
        config: of ``LoraConfig``.
    """
    plain = {"r": 8, "lora_alpha": 16, "task_type": "CAUSAL_LM"}
    modules = targets if isinstance(targets, str) else list(targets)
    adapted = get_peft_model(model, LoraConfig(**{**plain, "target_modules": modules, **config}))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(folder)
    adapted.unload()
    return folder


@torch.no_grad()
def peft_logits(model: PreTrainedModel, adapter: Path | None, ids: Sequence[int]) -> torch.Tensor:
    """PEFT's own logits after every token ``[T, vocab_size]``, float32; without an adapter the model's."""
    tokens = torch.tensor([list(ids)])
    if adapter is None:
        return model(tokens).logits[0].float()
    adapted = PeftModel.from_pretrained(model, adapter)
    logits = adapted(tokens).logits[0].float()
    adapted.unload()
    return logits


def peft_greedy(model: PreTrainedModel, adapter: Path | None, ids: Sequence[int], count: int) -> list[int]:
    """``count`` most probable tokens one after another."""
    tokens = list(ids)
    for _ in range(count):
        tokens.append(int(peft_logits(model, adapter, tokens)[-1].argmax()))
    return tokens[len(ids) :]
