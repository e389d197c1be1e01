"""The ranks that run one model together, and what they tell one another in a step."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import FileStore, PrefixStore

from mini_sglang.errors import InvalidValueError, ModelLoadError

# What Gloo adds up; other types go through the first.
_GLOO_TYPES = (torch.float32, torch.float64, torch.int64)
_CONNECT_SECONDS = 120.0
_NEVER = 86_400.0


class Group:
    """A group of one, which has nothing to tell. Every rank of a group calls the same, in the same order.

    Attributes:
        rank: of this process, 0 for the one that leads.
        size: how many there are.
    """

    rank = 0
    size = 1

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum of every rank's ``x``, the same to the bit on all of them. May overwrite ``x``."""
        return x

    def gather(self, x: Tensor) -> Tensor:
        """At rank 0 every rank's ``x`` ``[..., N]`` side by side, ``[..., size * N]``; elsewhere ``x``."""
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Every rank's ``x`` ``[..., N]`` side by side, ``[..., size * N]``, on all of them."""
        return x

    def least(self, number: int) -> int:
        """The smallest of the ranks' numbers; waits until all have given one."""
        return number

    def as_default(self) -> AbstractContextManager[None]:
        """Within it code that calls ``torch.distributed`` itself may make groups of these ranks.

        What it has made then works until ``close``.

        Raises:
            ModelLoadError: another model in this process has its ranks there.
        """
        return nullcontext()

    def abort(self) -> None:
        """Have what waits for another rank fail, from any thread."""

    def close(self) -> None:
        """Let go of the other ranks; nothing is called after this."""


class TorchGroup(Group):
    """A group of ``torch.distributed``: NCCL between CUDA devices, Gloo between CPUs.

    It keeps its process group to itself, so that one process may have several.

    Args:
        folder: private to the ranks, for them to find one another.
        device: of this rank.
        timeout: seconds after which a rank that waits for another gives up; 0 is never.

    Raises:
        RuntimeError: the others did not come, or are gone; every method raises it too.
    """

    def __init__(self, rank: int, size: int, folder: Path, device: torch.device, timeout: float) -> None:
        self.rank = rank
        self.size = size
        self._device = device
        self._is_default = False
        store = self._store = FileStore(str(folder / "ranks"), size)
        store.set_timeout(timedelta(seconds=_CONNECT_SECONDS))
        patience = self._patience = timedelta(seconds=timeout or _NEVER)
        self._on_cpu = device.type == "cpu"
        if self._on_cpu:
            gloo = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            gloo._timeout = patience
            # By itself it would listen on whatever address the host's name stands for.
            gloo._devices = [dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
            self._group: dist.ProcessGroup = dist.ProcessGroupGloo(store, rank, size, gloo)  # type: ignore[assignment]
        else:
            nccl = dist.ProcessGroupNCCL.Options()
            nccl._timeout = patience
            self._group = dist.ProcessGroupNCCL(store, rank, size, nccl)  # type: ignore[assignment]

    def all_reduce(self, x: Tensor) -> Tensor:
        if self._on_cpu and x.dtype not in _GLOO_TYPES:
            return x.copy_(self.all_reduce(x.float()))
        x = x.contiguous()
        if self.size == 2 or not self._on_cpu:
            self._reduce(x, dist.ReduceOp.SUM)
            return x
        # Gloo begins with another rank for each part of a tensor: what a row comes to would depend on what
        # else is in the step.
        first, *others = self._parts(x)
        for other in others:
            first.add_(other)
        return first

    def gather(self, x: Tensor) -> Tensor:
        if self._on_cpu and x.dtype not in _GLOO_TYPES:
            return self.gather(x.float()).to(x.dtype)
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.size)] if self.rank == 0 else []
        options = dist.GatherOptions()
        options.rootRank = 0
        self._group.gather([parts] if parts else [], [x], options).wait()
        return torch.cat(parts, -1) if parts else x

    def all_gather(self, x: Tensor) -> Tensor:
        if self._on_cpu and x.dtype not in _GLOO_TYPES:
            return self.all_gather(x.float()).to(x.dtype)
        return torch.cat(self._parts(x.contiguous()), -1)

    def least(self, number: int) -> int:
        one = torch.tensor([number], dtype=torch.int64, device=self._device)
        self._reduce(one, dist.ReduceOp.MIN)
        return int(one.item())

    @contextmanager
    def as_default(self) -> Iterator[None]:
        if dist.is_initialized() and not self._is_default:
            raise ModelLoadError(
                "torch has one group of ranks in a process, and another model has it; with "
                "ENGINE_ISOLATION=process each engine has a process."
            )
        wanted = {"LOCAL_RANK": str(self._device.index or 0)}
        if self._on_cpu and (loopback := {"lo", "lo0"} & {name for _, name in socket.if_nameindex()}):
            wanted["GLOO_SOCKET_IFNAME"] = loopback.pop()
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            if not self._is_default:
                dist.init_process_group(
                    "gloo" if self._on_cpu else "nccl",
                    store=PrefixStore("default", self._store),
                    rank=self.rank,
                    world_size=self.size,
                    timeout=self._patience,
                    device_id=None if self._on_cpu else self._device,
                )
                self._is_default = True
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def abort(self) -> None:
        # Gloo fails by itself when a connection closes. A CUDA stream waits for a rank that is gone for ever.
        if not self._on_cpu:
            with suppress(Exception):
                self._group.abort()
            if self._is_default:
                with suppress(Exception):
                    dist.distributed_c10d._abort_process_group()

    def close(self) -> None:
        # At the interpreter's end it would be too late for its threads.
        if hasattr(self, "_group"):
            del self._group
        if self._is_default:
            self._is_default = False
            with suppress(Exception):
                dist.destroy_process_group()

    def _parts(self, x: Tensor) -> tuple[Tensor, ...]:
        """Every rank's ``x``, which is contiguous."""
        parts = x.new_empty((self.size * x.shape[0], *x.shape[1:]))
        self._group._allgather_base(parts, x).wait()
        return parts.chunk(self.size)

    def _reduce(self, x: Tensor, operation: dist.ReduceOp.RedOpType) -> None:
        options = dist.AllreduceOptions()
        options.reduceOp = operation  # type: ignore[assignment]
        self._group.allreduce([x], options).wait()


def check_device(device: torch.device, size: int) -> None:
    """Refuse a size that the machine has no devices for.

    Raises:
        InvalidValueError: on MPS, where torch has no collectives, or with fewer GPUs.
    """
    if not dist.is_available() or device.type == "mps":
        where = "on MPS" if device.type == "mps" else "in this build"
        raise InvalidValueError("TENSOR_PARALLEL_SIZE", size, f"1: torch has no collectives {where}")
    if device.type == "cuda" and size > (count := torch.cuda.device_count()):
        raise InvalidValueError("TENSOR_PARALLEL_SIZE", size, f"at most {count}, the GPUs that torch finds")
