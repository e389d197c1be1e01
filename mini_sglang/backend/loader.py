"""From a model's files and the settings to a backend: what it runs on, and who runs it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

import torch

from mini_sglang.backend.compiling import choose_compiler
from mini_sglang.backend.device import choose_device, choose_threads
from mini_sglang.backend.fp8 import refuse_fp8
from mini_sglang.backend.graphs.recorder import choose_recorder
from mini_sglang.backend.kernels.library import open_kernels
from mini_sglang.backend.kernels.triton.available import triton_wanted
from mini_sglang.backend.loading.checkpoint import Checkpoint, open_checkpoint
from mini_sglang.backend.loading.fp8_blocks import is_fp8
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.models.dummy import open_dummy
from mini_sglang.backend.native_model import load_native_backend
from mini_sglang.backend.overlap import choose_submitter
from mini_sglang.backend.parallel.choice import threads_per_rank
from mini_sglang.backend.parallel.rank import Member
from mini_sglang.backend.step import LoadedBackend
from mini_sglang.backend.transformers_models.kinds import choose_kind
from mini_sglang.config import Settings
from mini_sglang.errors import ModelLoadError

_DEQUANTIZE = MappingProxyType({"auto": None, "0": False, "1": True})


def load_backend(
    path: Path,
    settings: Settings,
    notify: Callable[[str], None] | None = None,
    *,
    sharing: int = 1,
    member: Member | None = None,
) -> LoadedBackend:
    """Load the model at ``path``, a folder or a ``.gguf`` file, and allocate its KV pool.

    Sets the number of torch's CPU threads, which belongs to the whole process.

    Args:
        notify: called with a line for the user when something slow begins.
        sharing: backends that are loaded side by side and share the device's free memory.
        member: what this process is in a group that another one leads.

    Raises:
        ModelLoadError: the model is damaged, incomplete or unsupported.
        InvalidValueError: a setting that this model or machine cannot honour.
    """
    device = choose_device(settings.device)
    refuse_fp8(settings, device)
    compiler = choose_compiler(settings, device)
    recorder = choose_recorder(settings, device)
    threads = threads_per_rank(choose_threads(settings.num_threads), settings)
    torch.set_num_threads(threads)
    kernels, kernels_used = open_kernels(
        settings.kernels, device, settings.cache_path / "kernels", threads, notify
    )
    triton = triton_wanted(settings.kernels, device)
    machine = Machine(device, kernels, kernels_used, sharing, compiler, triton, recorder)
    checkpoint: Checkpoint
    if settings.load_format == "dummy":
        checkpoint = open_dummy(path, settings, device)
    else:
        checkpoint = open_checkpoint(
            path,
            dequantize=_DEQUANTIZE[settings.gguf_dequantize],
            fast_types=kernels.fast_formats if kernels else frozenset(),
        )
    try:
        served = choose_kind(path, checkpoint.config, settings.trust_remote_code)
        if served == "native" and not settings.engine_fast_decode:
            backend: LoadedBackend = load_native_backend(path, checkpoint, settings, machine, notify, member)
        else:
            if is_fp8(checkpoint.config):
                raise ModelLoadError(
                    f"The weights of {path} are quantised (fp8), which is read for models of this stack's "
                    "own decoder alone; use the model's plain safetensors."
                )
            # Imported here, since most models do without.
            from mini_sglang.backend.transformers_models.backend import load_transformers_backend

            backend = load_transformers_backend(path, checkpoint, served, settings, machine, notify, member)
        backend.submitter = choose_submitter(settings, backend, device)
        return backend
    finally:
        checkpoint.close()
