"""A model of Qwen2.5-0.5B's shape with random weights, for timing where no real one can be had.

    python benchmarks/random_model.py FOLDER [--quantization int4] [--seed 0] [--check]

Writes FOLDER/hf (config.json, bfloat16 safetensors, tokenizer) and FOLDER/int4.gguf, the same weights as
QUANTIZATION makes them at load, which llama.cpp reads too: engines can be timed on the same numbers.
The tokenizer is the starter model's with filler tokens up to the vocabulary's size. Needs the gguf package.
"""

from __future__ import annotations

import argparse
import json
import time
from array import array
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import gguf
import torch
from safetensors.torch import save_file
from torch import Tensor

from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint
from mini_sglang.backend.loading.gguf import read_gguf
from mini_sglang.backend.loading.starter import starter_model
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.loader import expected_tensors
from mini_sglang.backend.models.quantization import block_formats
from mini_sglang.backend.quantize import quantize
from mini_sglang.backend.step import SequenceStep
from mini_sglang.config import Settings
from mini_sglang.text.gguf_tokenizer import GGUFTokenizer, convert_tokenizer

FILE_TYPES = {"int8": gguf.LlamaFileType.MOSTLY_Q8_0, "int4": gguf.LlamaFileType.MOSTLY_Q4_1}


@dataclass(frozen=True)
class Shape:
    """Fields of a Qwen2 ``config.json``; the defaults are Qwen2.5-0.5B's."""

    hidden_size: int = 896
    intermediate_size: int = 4864
    num_hidden_layers: int = 24
    num_attention_heads: int = 14
    num_key_value_heads: int = 2
    vocab_size: int = 151936
    max_position_embeddings: int = 32768
    rope_theta: float = 1000000.0
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = True


def hf_config(shape: Shape, tokenizer: GGUFTokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_act": "silu",
        "torch_dtype": "bfloat16",
        "use_sliding_window": False,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.eos_ids),
        **asdict(shape),
    }


def random_weights(shapes: Mapping[str, tuple[int, ...]], seed: int) -> dict[str, Tensor]:
    """Normal weights in bfloat16, of a size that keeps every layer's input and output near 1.

    The embedding is also the head: 2.4 / sqrt(hidden_size) gives logits of a standard deviation of 2.4, so
    the most probable token has a few percent and depends on the prompt.
    """
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator)
        if "norm" in name:
            noise.mul_(0.1).add_(1)
        elif len(shape) == 1:
            noise.mul_(0.1)
        else:
            noise.mul_((1 if ".layers." in name else 2.4) / shape[1] ** 0.5)
        weights[name] = noise.bfloat16()
    return weights


def starter_tokens(size: int) -> dict[str, Any]:
    """The keys of the starter model's tokenizer, with filler up to ``size`` tokens, or cut to it.

    No merge makes a filler token, so no text becomes one; but each has a text, so an answer can be streamed.
    """
    with read_gguf(starter_model(Settings.resolve().cache_path, notify=print, timeout=60.0)) as file:
        keys = {key: value for key, value in file.metadata.items() if key.startswith("tokenizer.")}
    tokens = keys["tokenizer.ggml.tokens"]
    if size < len(tokens):
        raise SystemExit(f"The vocabulary must have at least {len(tokens)} tokens, the starter model's.")
    keys["tokenizer.ggml.tokens"] = tokens + [f"Ġ[{index}]" for index in range(len(tokens), size)]
    keys["tokenizer.ggml.token_type"] += [gguf.TokenType.NORMAL] * (size - len(tokens))
    return keys


def write_folder(
    folder: Path, config: dict[str, Any], weights: dict[str, Tensor], tokenizer: GGUFTokenizer
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.tokenizer.save(str(folder / "tokenizer.json"))
    texts = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "chat_template")}
    (folder / "tokenizer_config.json").write_text(json.dumps(texts))


def write_gguf(path: Path, shape: Shape, checkpoint: Checkpoint, quantization: str, tokens: dict) -> None:
    """What llama.cpp's converter would write of a Qwen2 folder, with our blocks for matrices."""
    writer = gguf.GGUFWriter(path, "qwen2")
    writer.add_name("random weights")
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_file_type(FILE_TYPES[quantization])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in tokens.items():
        if isinstance(value, list):
            writer.add_array(key, value)
        else:
            kinds = {bool: writer.add_bool, int: writer.add_uint32, str: writer.add_string}
            kinds[type(value)](key, value)
    shapes = expected_tensors(ModelConfig.from_hf(checkpoint.config, {}))
    formats = block_formats(checkpoint, shapes, quantization)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, shape.num_hidden_layers)
    for name in shapes:
        stored = names.get_name(name, (".weight", ".bias"))
        assert stored is not None
        values = checkpoint.tensor(name, None)
        if name in formats:
            kind = gguf.GGMLQuantizationType[formats[name].name]
            writer.add_tensor(stored, quantize(values, formats[name]).numpy(), raw_dtype=kind)
        else:
            writer.add_tensor(stored, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@torch.inference_mode()
def logits(path: Path, ids: list[int], **settings: object) -> Tensor:
    """After each of ``ids``, float32 ``[len(ids), V]``."""
    common = {"device": "cpu", "dtype": "fp32", "kv_token_budget": 256, "gguf_dequantize": "0"}
    backend = load_backend(path, Settings.resolve({**common, **settings}))
    step = SequenceStep(ids, 0, array("i", range(backend.num_pages)), prompt_targets=[0] * len(ids))
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    batch = Batch.build([step], limits, torch.device("cpu"))
    return backend.decoder.logits(backend.decoder.forward(batch, backend.kv, PagedAttention()))


def make(folder: Path, quantization: str, seed: int, shape: Shape = Shape()) -> tuple[Path, Path]:
    """Write both models; their paths, of the folder and of the GGUF file."""
    tokens = starter_tokens(shape.vocab_size)
    tokenizer = convert_tokenizer(tokens)
    config = hf_config(shape, tokenizer)
    hf, file = folder / "hf", folder / f"{quantization}.gguf"
    weights = random_weights(expected_tensors(ModelConfig.from_hf(config, {})), seed)
    write_folder(hf, config, weights, tokenizer)
    checkpoint = open_checkpoint(hf, dequantize=None)
    start = time.perf_counter()
    write_gguf(file, shape, checkpoint, quantization, tokens)
    print(f"{hf}\n{file}, {file.stat().st_size / 1e6:.0f} MB in {time.perf_counter() - start:.1f} s")
    checkpoint.close()
    return hf, file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quantization", choices=tuple(FILE_TYPES), default="int4")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--check", action="store_true", help="compare the two models' logits")
    args = parser.parse_args()
    hf, file = make(args.folder, args.quantization, args.seed)
    if not args.check:
        return 0
    ids = list(range(1000, 1016))
    ours, stored = logits(hf, ids, quantization=args.quantization), logits(file, ids)
    plain = logits(hf, ids)
    noise = float((ours - plain).std() / plain.std())
    print(f"logits equal: {torch.equal(ours, stored)}; noise of quantisation {noise:.3f} of their deviation")
    return 0 if torch.equal(ours, stored) else 1


if __name__ == "__main__":
    raise SystemExit(main())
