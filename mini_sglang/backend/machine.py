"""What a model is to run on, as the settings and the machine have it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.graphs.recorder import Recorder
from mini_sglang.backend.kernels.library import NativeKernels


@dataclass(frozen=True, slots=True)
class Machine:
    """What the model runs on.

    Attributes:
        kernels: the compiled CPU kernels; None without a compiler, and on other devices.
        kernels_used: says in words which kernels run.
        sharing: backends that are loaded side by side and share the device's free memory.
        compiler: None where nothing is to be compiled.
        triton: whether Triton's kernels may run.
        recorder: for CUDA graphs; None where none are wanted.
    """

    device: torch.device
    kernels: NativeKernels | None
    kernels_used: str
    sharing: int
    compiler: Compiler | None = None
    triton: bool = False
    recorder: Recorder | None = None
