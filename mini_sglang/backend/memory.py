"""A device that is out of memory, said by one exception."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable
from typing import Concatenate, ParamSpec, TypeVar

import torch

from mini_sglang.errors import OutOfMemoryError, shorten

P = ParamSpec("P")
S = TypeVar("S")
T = TypeVar("T")

# As torch, CUDA's libraries, MPS and the C library say it, where the exception is a plain RuntimeError.
_WORDS = (
    "out of memory",
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a failure says that the device, or the host, had no memory left."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _WORDS)


def says_out_of_memory(
    past_lost: bool = False,
) -> Callable[[Callable[Concatenate[S, P], T]], Callable[Concatenate[S, P], T]]:
    """Decorate a method: what ``is_out_of_memory`` is raised as ``OutOfMemoryError``, all else as it was.

    By then the tensors that the failed call had made are free.
    """

    def decorate(method: Callable[Concatenate[S, P], T]) -> Callable[Concatenate[S, P], T]:
        @functools.wraps(method)
        def call(self: S, /, *args: P.args, **named: P.kwargs) -> T:
            try:
                return method(self, *args, **named)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                said = shorten(" ".join(str(error).split()) or type(error).__name__)
                traceback.clear_frames(error.__traceback__)
            # Out here it has no context, whose frames would be kept.
            raise OutOfMemoryError(said, past_lost=past_lost)

        return call

    return decorate


def give_back(device: torch.device) -> None:
    """Have torch give back to ``device`` what it holds for later."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
