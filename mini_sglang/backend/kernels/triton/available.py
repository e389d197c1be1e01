"""Whether Triton's kernels can run on a device, and why not."""

from __future__ import annotations

import importlib.util
import os

import torch

from mini_sglang.errors import InvalidValueError

# Whether the kernels of a layer may start while the one before ends, and load weights meanwhile
# (programmatic dependent launches). Nothing is right or wrong by it.
DEPENDENT_LAUNCHES = True


def interpreted() -> bool:
    """Whether Triton is told to run its kernels in Python, on any device."""
    return os.environ.get("TRITON_INTERPRET", "") == "1"


def why_no_triton(device: torch.device) -> str | None:
    """What keeps Triton's kernels from ``device``; None if nothing does. Imports nothing."""
    if device.type != "cuda" and not interpreted():
        return f"Triton's kernels run on CUDA, and the device is {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def triton_wanted(setting: str, device: torch.device) -> bool:
    """Whether ``KERNELS=setting`` has Triton's kernels run: on CUDA they are the default where they can.

    Raises:
        InvalidValueError: they are asked for and cannot.
    """
    why = why_no_triton(device)
    if setting == "triton" and why is not None:
        raise InvalidValueError("KERNELS", setting, f"auto or reference here: {why}")
    return setting == "triton" or (setting == "auto" and device.type == "cuda" and why is None)


def dependent_launches(device: torch.device) -> bool:
    """Whether kernels are launched so: it takes a GPU of compute capability 9.0."""
    return DEPENDENT_LAUNCHES and not interpreted() and torch.cuda.get_device_capability(device) >= (9, 0)


def shared_bytes(device: torch.device) -> int:
    """Shared memory that a block may have."""
    if device.type != "cuda":
        return 96 * 1024
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 0)) or properties.shared_memory_per_block
