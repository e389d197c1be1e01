"""How many GPUs there are and how many a model needs, asked without torch in this process."""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

from mini_sglang.backend.children import module_command, module_environment
from mini_sglang.config import Settings, plain_settings
from mini_sglang.errors import ModelLoadError

_PROBE_SECONDS = 300.0
_VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True)
class Need:
    """What torch finds, and what a model takes: ``gpus`` there are, ``size`` of them for one engine."""

    gpus: int
    size: int


def visible_gpus() -> list[str]:
    """Names that CUDA_VISIBLE_DEVICES takes, of the GPUs this process may use; none without a driver.

    Torch may find fewer: it may be made for CPUs.
    """
    chosen = os.environ.get(_VISIBLE)
    if chosen is not None:
        names = [name.strip() for name in chosen.split(",")]
        # As CUDA reads it: what comes after a name that is none is not visible.
        end = next((place for place, name in enumerate(names) if name in ("", "-1")), len(names))
        return names[:end]
    return [str(number) for number in range(_driver_count())]


def _driver_count() -> int:
    count = ctypes.c_uint(0)
    with contextlib.suppress(OSError, AttributeError):
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
        if nvml.nvmlInit_v2() == 0:
            nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
            nvml.nvmlShutdown()
    return count.value


def ask_need(settings: Settings, path: Path) -> Need:
    """Have a process of its own look at the GPUs and at the model at ``path``.

    Raises:
        ModelLoadError: with the sentence that refuses the model or a setting.
    """
    asked = json.dumps({"path": str(path), "settings": plain_settings(settings)})
    done = subprocess.run(
        module_command("mini_sglang.backend.parallel.need_main"),
        input=asked.encode(),
        stdout=subprocess.PIPE,
        timeout=_PROBE_SECONDS,
        check=False,
        env=module_environment(),
    )
    try:
        answer = json.loads(done.stdout)
    except ValueError:
        raise ModelLoadError(f"The GPUs could not be looked at (exit status {done.returncode}).") from None
    if "refused" in answer:
        raise ModelLoadError(answer["refused"])
    return Need(answer["gpus"], answer["size"])
