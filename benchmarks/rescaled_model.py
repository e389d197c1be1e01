"""The starter model with its channels rescaled: the same function, with weights that lie on no grid.

    python benchmarks/rescaled_model.py FOLDER --model HUGGING_FACE_FOLDER [--seed 0]

The starter model's weights were 4-bit blocks before, so QUANTIZATION=int4 finds them again and costs nothing.
Here channel by channel a factor between 0.84 and 1.19 goes out of what writes it and into what reads it: from
each RMSNorm's weight into the products after it, from v into o, from up into down. The logits stay, and so do
the outliers that make a model hard to quantise, but the 32 weights of a block have no common step any more.
Writes a float32 Hugging Face folder with a head of its own; only the embedding, which is looked up and not
multiplied, is as before. Needs transformers.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

OCTAVES = 0.25


@torch.no_grad()
def rescale(model: Any, seed: int) -> None:
    """Rescale a Llama-shaped model in place."""
    generator = torch.Generator().manual_seed(seed)

    def factors(size: int) -> Tensor:
        return torch.exp2((torch.rand(size, generator=generator) * 2 - 1) * OCTAVES)

    def norm(norm: Any, *readers: Any) -> None:
        factor = factors(norm.weight.numel())
        norm.weight.div_(factor)
        for reader in readers:
            reader.weight.mul_(factor)

    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        norm(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
        norm(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
        factor = factors(attention.v_proj.weight.shape[0])
        attention.v_proj.weight.mul_(factor[:, None])
        # Each KV head is read by several query heads.
        heads = factor.view(-1, attention.head_dim)
        repeated = heads.repeat_interleave(attention.num_key_value_groups, 0)
        attention.o_proj.weight.div_(repeated.flatten())
        factor = factors(mlp.up_proj.weight.shape[0])
        mlp.up_proj.weight.mul_(factor[:, None])
        mlp.down_proj.weight.div_(factor)
    norm(model.model.norm, model.lm_head)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a Llama-shaped folder without biases")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    ids = torch.tensor([tokenizer.encode("What is taken here is given there, and the answer stays.")])
    with torch.no_grad():
        before = model(ids).logits
    # The last norm's factors go into the head, and the embedding must not have them.
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    model.config.tie_word_embeddings = False
    rescale(model, args.seed)
    with torch.no_grad():
        worst = float((model(ids).logits - before).abs().max())
    print(f"logits differ by {worst:.1e} at most, of {float(before.abs().max()):.1f}")
    if worst > 1e-2:
        raise SystemExit("that is not the same function: the model is not of Llama's shape")
    model.save_pretrained(args.folder)
    tokenizer.save_pretrained(args.folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
