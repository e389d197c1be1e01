"""Which device, which dtype, how many threads, how much memory."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType

import torch

from mini_sglang.errors import InvalidValueError

_DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KV_DTYPES: Mapping[str, torch.dtype] = MappingProxyType({**_DTYPES, "int8": torch.int8})
# Flags of /proc/cpuinfo (x86, Arm) of CPUs whose bf16 products are done in hardware.
_BF16_CPU_FLAGS = {"avx512_bf16", "amx_bf16", "bf16"}
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")
_CPUS = Path("/sys/devices/system/cpu")


def choose_device(setting: str) -> torch.device:
    """``auto`` takes CUDA, then MPS, then the CPU.

    Raises:
        InvalidValueError: a device that torch does not find.
    """
    present = ["cuda"] if torch.cuda.is_available() else []
    present += ["mps"] if torch.backends.mps.is_available() else []
    present.append("cpu")
    if setting == "auto":
        return torch.device(present[0])
    if setting not in present:
        raise InvalidValueError("DEVICE", setting, "auto or cpu: torch finds no such device here")
    return torch.device(setting)


def dtype_name(dtype: torch.dtype) -> str:
    """Without torch's prefix: ``bfloat16``."""
    return str(dtype).removeprefix("torch.")


def choose_dtype(setting: str, device: torch.device) -> torch.dtype:
    """``auto`` takes bf16 where the device computes in it, else fp16 on a GPU and fp32 on a CPU.

    Raises:
        InvalidValueError: bf16 on a GPU that cannot.
    """
    if device.type == "cuda":
        has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "mps":
        has_bf16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        has_bf16 = cpu_has_bf16()
    if setting == "auto":
        if device.type == "mps":
            return torch.float16
        if has_bf16:
            return torch.bfloat16
        return torch.float32 if device.type == "cpu" else torch.float16
    if setting == "bf16" and not has_bf16 and device.type != "cpu":
        why = "this GPU has no bf16" if device.type == "cuda" else "bf16 needs macOS 14"
        raise InvalidValueError("MODEL_DTYPE", setting, f"fp16, fp32 or auto: {why}")
    return _DTYPES[setting]


def to_device(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """``values``, of the CPU, on ``device``, without waiting for what the device is doing."""
    if device.type != "cuda":
        return values.to(device)
    # From memory that is not pinned the copy would be waited for. torch keeps the pinned memory until it is
    # done.
    return values.pin_memory().to(device, non_blocking=True)


def host_buffer(nbytes: int, device: torch.device) -> torch.Tensor:
    """``nbytes`` uint8 on the host, not yet set, from which a copy to ``device`` need not be waited for."""
    # torch keeps pinned memory until copies from it are done.
    return torch.empty(nbytes, dtype=torch.uint8, pin_memory=device.type == "cuda")


def cpu_has_bf16(proc: Path = _PROC) -> bool:
    """Whether this CPU multiplies bf16 in hardware; without it bf16 is slower than fp32."""
    try:
        lines = (proc / "cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return False
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return not _BF16_CPU_FLAGS.isdisjoint(flags.split())


def choose_threads(setting: int, proc: Path = _PROC, cgroup_root: Path = _CGROUP_ROOT) -> int:
    """``setting``, or for 0 every core this process may use.

    That is the smallest of its CPU affinity, its cgroup's quota, and ``OMP_NUM_THREADS``.
    """
    if setting:
        return setting
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    omp = os.environ.get("OMP_NUM_THREADS", "")
    if omp.isdecimal() and int(omp) > 0:
        cores = min(cores, int(omp))
    for folder in _cgroup_folders("cpu", proc, cgroup_root):
        quota = _read_words(folder / "cpu.max") or [
            *_read_words(folder / "cpu.cfs_quota_us"),
            *_read_words(folder / "cpu.cfs_period_us"),
        ]
        if len(quota) == 2 and all(word.isdecimal() for word in quota) and int(quota[1]):
            cores = min(cores, max(1, round(int(quota[0]) / int(quota[1]))))
    return cores


def core_share(cores: Iterable[int], index: int, count: int, cpus: Path = _CPUS) -> list[int]:
    """The ``index``-th of ``count`` parts of ``cores``, what shares a socket or a physical core together.

    Empty where there are fewer cores than parts.
    """

    def place(core: int) -> tuple[int, int, int]:
        topology = cpus / f"cpu{core}" / "topology"
        package = _read_number(topology / "physical_package_id")
        physical = _read_number(topology / "core_id")
        return package or 0, core if physical is None else physical, core

    ordered = sorted(cores, key=place)
    if len(ordered) < count:
        return []
    return ordered[index * len(ordered) // count : (index + 1) * len(ordered) // count]


def keep_to_share(index: int, count: int, threads: int) -> list[int]:
    """Keep this thread, and those it starts, to its share of the cores that the process may use.

    Does nothing where the share has fewer cores than ``threads``, or the system has no such thing.

    Returns:
        the cores; none where nothing was done.
    """
    if not hasattr(os, "sched_setaffinity"):
        return []
    share = core_share(os.sched_getaffinity(0), index, count)
    if len(share) < threads:
        return []
    os.sched_setaffinity(0, share)
    return share


def free_memory(device: torch.device, proc: Path = _PROC, cgroup_root: Path = _CGROUP_ROOT) -> int:
    """Bytes that can still be had on ``device``; for a CPU the cgroup's limit counts too."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    free = _available_memory(proc)
    if device.type == "mps":
        return min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    for folder in _cgroup_folders("memory", proc, cgroup_root):
        limit = _read_number(folder / "memory.max") or _read_number(folder / "memory.limit_in_bytes")
        used = _read_number(folder / "memory.current") or _read_number(folder / "memory.usage_in_bytes")
        if limit is not None and used is not None:
            # The page cache counts as used, but is given back when asked for.
            free = min(free, max(0, limit - used + _reclaimable(folder / "memory.stat")))
    return free


def _available_memory(proc: Path) -> int:
    """What the whole machine can still give: Linux' own estimate, elsewhere that of psutil."""
    words = _read_words(proc / "meminfo")
    if "MemAvailable:" in words:
        return int(words[words.index("MemAvailable:") + 1]) * 1024
    import psutil

    return int(psutil.virtual_memory().available)


def _cgroup_folders(controller: str, proc: Path, root: Path) -> list[Path]:
    """The folders of this process's cgroup and of all those above it, version 2 or 1."""
    folders: list[Path] = []
    try:
        lines = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return folders
    for line in lines:
        _, controllers, path = [*line.split(":", 2), "", ""][:3]
        if controllers and controller not in controllers.split(","):
            continue
        top = root / controller if controllers else root
        folder = top / path.lstrip("/")
        # Inside a container the path may be the host's; the top is then the container's own group.
        chain = [folder, *folder.parents]
        folders += chain[: chain.index(top) + 1] if ".." not in path else [top]
    return folders


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").split()
    except (OSError, UnicodeDecodeError):
        return []


def _read_number(path: Path) -> int | None:
    words = _read_words(path)
    return int(words[0]) if words and words[0].isdecimal() else None


def _reclaimable(path: Path) -> int:
    words = _read_words(path)
    pairs = dict(zip(words[::2], words[1::2], strict=False))
    value = pairs.get("total_inactive_file", pairs.get("inactive_file", "0"))
    return int(value) if value.isdecimal() else 0
