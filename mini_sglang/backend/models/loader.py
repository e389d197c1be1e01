"""From a checkpoint to a ``Decoder``: names, shapes, fusing."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.loading.ggml_types import GGMLType
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.decoder import Decoder, LayerWeights
from mini_sglang.backend.models.operations import Operations, TorchOperations
from mini_sglang.backend.models.quantization import quantized_weight
from mini_sglang.backend.weights import Weight, accelerate, stack_rows
from mini_sglang.errors import ModelLoadError

logger = logging.getLogger(__name__)

_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_LM_HEAD = "lm_head.weight"


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor the model needs, by its name in transformers' checkpoints, with its shape."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries, keys = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {_EMBEDDING: (config.vocab_size, hidden), _FINAL_NORM: (hidden,)}
    if not config.tied_embeddings:
        shapes[_LM_HEAD] = (config.vocab_size, hidden)
    matrices = {
        "self_attn.q_proj": ((queries, hidden), config.qkv_bias),
        "self_attn.k_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.v_proj": ((keys, hidden), config.qkv_bias),
        "self_attn.o_proj": ((hidden, queries), config.o_bias),
        "mlp.gate_proj": ((inner, hidden), config.mlp_bias),
        "mlp.up_proj": ((inner, hidden), config.mlp_bias),
        "mlp.down_proj": ((hidden, inner), config.mlp_bias),
    }
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        for name, (shape, biased) in matrices.items():
            shapes[f"{prefix}{name}.weight"] = shape
            if biased:
                shapes[f"{prefix}{name}.bias"] = shape[:1]
        shapes[f"{prefix}input_layernorm.weight"] = (hidden,)
        shapes[f"{prefix}post_attention_layernorm.weight"] = (hidden,)
        if config.qk_norm:
            shapes[f"{prefix}self_attn.q_norm.weight"] = (config.head_dim,)
            shapes[f"{prefix}self_attn.k_norm.weight"] = (config.head_dim,)
    return shapes


def check_tensors(checkpoint: Checkpoint, config: ModelConfig) -> int:
    """Compare names and shapes with ``expected_tensors``; the number of parameters.

    Raises:
        ModelLoadError: a tensor is missing or has another shape.
    """
    present = set(checkpoint.names())
    expected = expected_tensors(config)
    for name, shape in expected.items():
        if name not in present:
            raise ModelLoadError(f"The weights have no tensor {name}, which a {config.family} model needs.")
        if tuple(checkpoint.shape(name)) != shape:
            raise ModelLoadError(
                f"The tensor {name} has the shape {list(checkpoint.shape(name))}; "
                f"config.json asks for {list(shape)}."
            )
    if unused := sorted(present - expected.keys()):
        logger.debug("%d tensors of the file are not used: %s", len(unused), ", ".join(unused[:8]))
    return sum(math.prod(shape) for shape in expected.values())


def load_decoder(
    checkpoint: Checkpoint,
    config: ModelConfig,
    dtype: torch.dtype,
    device: torch.device,
    loaded: Callable[[str], None],
    kernels: NativeKernels | None = None,
    compute: torch.dtype | None = None,
    formats: Mapping[str, GGMLType] = MappingProxyType({}),
    triton: bool = False,
) -> Decoder:
    """Read the weights, layer by layer, onto ``device``.

    Args:
        dtype: of the dense matrices.
        loaded: called with the name of each tensor that was read.
        kernels: that the matrices multiply with; torch's operators without.
        compute: dtype of everything between the matrices, by default ``dtype``.
        formats: of the dense matrices that become blocks (``block_formats``).
        triton: whether Triton's kernels may multiply by blocks.

    Raises:
        ModelLoadError: as ``check_tensors``, the file is damaged, or a number fits no block.
    """

    compute = compute or dtype

    def vector(name: str) -> Tensor:
        tensor = checkpoint.tensor(name, compute).to(device)
        loaded(name)
        return tensor

    def matrix(name: str) -> Weight:
        if name in formats:
            weight = quantized_weight(checkpoint, name, formats[name], dtype, device)
        else:
            weight = checkpoint.weight(name, dtype)
        loaded(name)
        return weight

    def weights(prefix: str, names: Sequence[str]) -> Weight:
        return placed(stack_rows([matrix(f"{prefix}{name}.weight") for name in names]))

    def placed(weight: Weight) -> Weight:
        return accelerate(weight.to(device), kernels, compute, triton)

    def biases(prefix: str, names: Sequence[str], biased: bool) -> Tensor | None:
        return torch.cat([vector(f"{prefix}{name}.bias") for name in names]) if biased else None

    embedding = placed(matrix(_EMBEDDING))
    checkpoint.release()
    layers: list[LayerWeights] = []
    qkv, gate_up = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
    for index in range(config.num_layers):
        prefix = f"model.layers.{index}."
        attention, mlp = prefix + "self_attn.", prefix + "mlp."
        qk_norm = None
        if config.qk_norm:
            qk_norm = torch.cat(
                (
                    vector(f"{attention}q_norm.weight").expand(config.num_heads, -1),
                    vector(f"{attention}k_norm.weight").expand(config.num_kv_heads, -1),
                )
            )
        layers.append(
            LayerWeights(
                input_norm=vector(f"{prefix}input_layernorm.weight"),
                qkv=weights(attention, qkv),
                qkv_bias=biases(attention, qkv, config.qkv_bias),
                qk_norm=qk_norm,
                o=weights(attention, ("o_proj",)),
                o_bias=biases(attention, ("o_proj",), config.o_bias),
                post_norm=vector(f"{prefix}post_attention_layernorm.weight"),
                gate_up=weights(mlp, gate_up),
                gate_up_bias=biases(mlp, gate_up, config.mlp_bias),
                down=weights(mlp, ("down_proj",)),
                down_bias=biases(mlp, ("down_proj",), config.mlp_bias),
            )
        )
        checkpoint.release()
    final_norm = vector(_FINAL_NORM)
    lm_head = embedding if config.tied_embeddings else placed(matrix(_LM_HEAD))
    return Decoder(config, embedding, layers, final_norm, lm_head, _operations(config, compute, kernels))


def _operations(config: ModelConfig, dtype: torch.dtype, kernels: NativeKernels | None) -> Operations:
    if (
        kernels
        and kernels.fast
        and NativeOperations.fit(config.hidden_size, config.intermediate_size, config.head_dim, dtype)
    ):
        return NativeOperations(kernels, config.norm_eps)
    return TorchOperations(config.norm_eps)
