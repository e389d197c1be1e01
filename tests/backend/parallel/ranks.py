"""Ranks as threads of one process: what each computes, without the processes it would have."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.parallel.group import Group
from mini_sglang.config import Settings
from tests.backend.harness import step, step_logits

T = TypeVar("T")


class Meeting:
    """Where the threads of a group leave what the others want."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.barrier = threading.Barrier(size, timeout=60)
        self.given: list[Any] = [None] * size


class ThreadGroup(Group):
    def __init__(self, rank: int, meeting: Meeting) -> None:
        self.rank = rank
        self.size = meeting.size
        self._meeting = meeting

    def _exchange(self, value: T) -> list[T]:
        self._meeting.given[self.rank] = value
        self._meeting.barrier.wait()
        given = list(self._meeting.given)
        self._meeting.barrier.wait()
        return given

    def all_reduce(self, x: Tensor) -> Tensor:
        return torch.stack(self._exchange(x.clone())).sum(0)

    def gather(self, x: Tensor) -> Tensor:
        parts = self._exchange(x)
        return torch.cat(parts, -1) if self.rank == 0 else x

    def least(self, number: int) -> int:
        return min(self._exchange(number))


class ThreadMember:
    """A rank of its own thread; its backend runs what it is given, and nobody is told."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def backend(self, *parts: Any, **more: Any) -> ModelBackend:
        return ModelBackend(*parts, **more)


class Ranks:
    """A model over ``size`` ranks; what is asked of it is done by all of them at once."""

    def __init__(self, path: Path, size: int, **settings: object) -> None:
        self._meeting = Meeting(size)
        self._pool = ThreadPoolExecutor(size)
        given = {
            "dtype": "fp32", "device": "cpu", "kv_token_budget": 2048, "page_size_tokens": 16, **settings,
            "tensor_parallel_size": size,
        }  # fmt: skip
        resolved = Settings.resolve(given, env={})

        def load(rank: int) -> ModelBackend:
            member = ThreadMember(ThreadGroup(rank, self._meeting))
            backend = load_backend(path, resolved, member=member)
            assert isinstance(backend, ModelBackend)
            backend.kv.data.view(torch.uint8).fill_(255)
            return backend

        self.backends = list(self._pool.map(load, range(size)))

    def all(self, do: Callable[[ModelBackend], T]) -> list[T]:
        """``do`` at every rank at once."""
        return list(self._pool.map(do, self.backends))

    def logits(self, prompts: Sequence[Sequence[int]], tables: Sequence[array[int]]) -> list[Tensor]:
        """Rank 0's logits after every token of every prompt."""
        steps = [step(prompt, 0, table) for prompt, table in zip(prompts, tables, strict=True)]
        return self.all(lambda backend: step_logits(backend, steps))[0]
