"""How many ranks run a model, and what does not go together with more than one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch

from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.parallel.group import check_device
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

# Of a GPU's free memory; the rest is for KV and what a step needs.
_WEIGHTS_SHARE = 0.8


class Divisible(Protocol):
    """A model that several ranks may share."""

    def sizes(self) -> list[int]:
        """Every number of ranks that it can be divided by, 1 first."""

    def obstacle(self, size: int) -> str | None:
        """Why it cannot be divided by ``size``, a clause; None where it can."""


def choose_size(settings: Settings, device: torch.device, model: Divisible, stored: int) -> int:
    """The number of ranks: TENSOR_PARALLEL_SIZE, or as many GPUs as the weights need.

    Args:
        stored: see ``weight_bytes``.

    Raises:
        InvalidValueError: the model or the machine does not allow it, or another setting.
    """
    size = settings.tensor_parallel_size
    if size == 0:
        size = 1
        if device.type == "cuda" and settings.enable_multi_device:
            free = [int(torch.cuda.mem_get_info(gpu)[0]) for gpu in range(torch.cuda.device_count())]
            size = size_that_fits(stored, free, model.sizes())
    if size > 1:
        check_device(device, size)
        check_size(model, size)
        refuse_settings(settings, size)
    return size


def check_size(model: Divisible, size: int) -> None:
    """Refuse a number of ranks that a model cannot be divided by.

    Raises:
        InvalidValueError: it names those that it can.
    """
    why = model.obstacle(size)
    if why is not None:
        *firsts, last = map(str, model.sizes())
        allowed = f"{', '.join(firsts)} or {last}" if firsts else last
        raise InvalidValueError("TENSOR_PARALLEL_SIZE", size, f"{allowed} for this model: {why}")


def without_compiler(machine: Machine, size: int) -> tuple[Machine, str]:
    """``machine`` without torch.compile where several ranks run a model, and what became of it, in words.

    Raises:
        InvalidValueError: it was asked for.
    """
    if size == 1 or machine.compiler is None:
        return machine, "off"
    why = f"TENSOR_PARALLEL_SIZE is {size}, and the ranks meet in every layer"
    return replace(machine, compiler=None), machine.compiler.give_up(why)


def weight_bytes(checkpoint: Checkpoint, parameters: int, dtype: torch.dtype, blocks: bool) -> int:
    """About how much memory a model's weights take, all ranks together.

    Args:
        dtype: of dense matrices; ``blocks`` says that QUANTIZATION makes blocks of them.
    """
    if checkpoint.quantized:
        return checkpoint.nbytes
    # Q8_0, the larger of the formats.
    return parameters * 34 // 32 if blocks else parameters * dtype.itemsize


def size_that_fits(stored: int, free: Sequence[int], sizes: Sequence[int]) -> int:
    """The smallest of ``sizes`` whose part of the weights fits each of the first GPUs; else the largest.

    Args:
        free: bytes that each GPU has free.
    """
    possible = [size for size in sizes if size <= len(free)]
    for size in possible:
        if stored / size <= _WEIGHTS_SHARE * min(free[:size]):
            return size
    return possible[-1] if possible else 1


def refuse_settings(settings: Settings, size: int) -> None:
    """Refuse what would otherwise be ignored by all ranks but the first.

    Raises:
        InvalidValueError: it names the setting.
    """
    unset = f"unset with TENSOR_PARALLEL_SIZE={size}"
    if settings.lora_adapters is not None:
        raise InvalidValueError(
            "LORA_ADAPTERS", settings.lora_adapters, f"{unset}: adapters are not divided over ranks"
        )
    if settings.lora_root is not None:
        raise InvalidValueError(
            "LORA_ROOT", str(settings.lora_root), f"{unset}: adapters are not divided over ranks"
        )
    if settings.prefix_cache_file is not None:
        raise InvalidValueError(
            "PREFIX_CACHE_FILE", str(settings.prefix_cache_file), f"{unset}: each rank has KV of its own"
        )


def threads_per_rank(threads: int, settings: Settings) -> int:
    """What each rank has of a machine's ``threads``."""
    return max(1, threads // max(1, settings.tensor_parallel_size))
