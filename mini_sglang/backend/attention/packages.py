"""What every attention from a package of its own needs of machine and model."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mini_sglang.backend.device import dtype_name
from mini_sglang.backend.kv.pool import KVPool

if TYPE_CHECKING:
    from mini_sglang.backend.attention.choice import Heads


def why_no_package(
    package: str, layers: Sequence[Heads], dtype: torch.dtype, device: torch.device
) -> str | None:
    """What keeps ``package`` from this model on this device; None if nothing that all of them share."""
    if device.type != "cuda":
        return f"{package} runs on CUDA alone, and the device is {device.type}"
    if importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"{package} needs a GPU of compute capability 8.0 or above"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"{package} takes fp16 and bf16, and the model computes in {dtype_name(dtype)}"
    if any(layer.form.sinks is not None for layer in layers):
        return f"{package} has no attention sinks"
    if any(layer.key_dim != layer.value_dim for layer in layers):
        return f"{package} takes values as wide as keys"
    return None


def pages_of(kv: KVPool, layer: int) -> tuple[Tensor, Tensor]:
    """Keys and values of a layer as the packages take them, ``[pages, page_size, kv_heads, head_dim]``."""
    keys, values = kv.keys_values(layer, kv.rows(layer))
    shape = (kv.num_pages, kv.page_size, *keys.shape[1:])
    return keys.view(shape), values.view(shape)
