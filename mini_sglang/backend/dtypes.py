"""The types of a native model: what its weights, its activations and its KV are kept in."""

from __future__ import annotations

from typing import NamedTuple

import torch

from mini_sglang.backend.attention.choice import OWN
from mini_sglang.backend.attention.native import NativeAttention
from mini_sglang.backend.device import KV_DTYPES, choose_dtype, dtype_name
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.operations import NativeOperations
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError


class Dtypes(NamedTuple):
    """What a native model is kept and computed in."""

    weights: torch.dtype  # of the plain ones
    compute: torch.dtype  # of what is between the products
    kv: torch.dtype


def choose_dtypes(
    settings: Settings,
    config: ModelConfig,
    device: torch.device,
    kernels: NativeKernels | None,
    quantized: bool,
) -> Dtypes:
    """What the settings come to for a model of our own decoder.

    Args:
        quantized: whether its matrices are blocks.

    Raises:
        InvalidValueError: a dtype that the device or the operators in use cannot honour.
    """
    weights = choose_dtype(settings.dtype, device)
    if quantized and settings.dtype == "auto" and device.type == "cpu":
        weights = torch.float32
    sizes = config.hidden_size, config.intermediate_size, config.head_dim
    if (
        kernels is not None
        and kernels.fast
        and NativeOperations.fit(*sizes, torch.float32)
        and NativeAttention.fit(config.num_heads, config.num_kv_heads, config.head_dim, torch.float32)
    ):
        if settings.attn_impl not in OWN:
            if settings.kv_dtype not in ("auto", "fp32"):
                raise InvalidValueError(
                    "KV_DTYPE", settings.kv_dtype, f"auto or fp32 with ATTN_IMPL={settings.attn_impl}"
                )
            return Dtypes(weights, torch.float32, torch.float32)
        kv = KV_DTYPES.get(settings.kv_dtype, kernels.half if quantized else weights)
        return Dtypes(weights, torch.float32, kv)
    if settings.kv_dtype != "auto" and KV_DTYPES[settings.kv_dtype] != weights:
        raise InvalidValueError(
            "KV_DTYPE",
            settings.kv_dtype,
            f"auto: KV is kept as {dtype_name(weights)} where the compiled CPU kernels do not run the model",
        )
    return Dtypes(weights, weights, weights)
