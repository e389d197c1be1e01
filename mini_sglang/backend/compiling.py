"""``COMPILE_MODEL``: whether torch.compile is wanted, whether it can run here, and how a function gets it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar, cast

import torch

from mini_sglang.backend.step import Backend, SampleSpec, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])


@dataclass(frozen=True, slots=True)
class Compiler:
    """``torch.compile`` as the settings ask for it. ``demanded`` where they do by name, not by default."""

    mode: str
    demanded: bool

    @property
    def records(self) -> bool:
        """Whether what it compiles is recorded as CUDA graphs by itself."""
        return self.mode in ("reduce-overhead", "max-autotune")

    def compile(self, function: F) -> F:
        """``function`` compiled at its first call, and again for other numbers of dimensions or types."""
        return cast(F, torch.compile(function, dynamic=True, mode=self.mode))

    def give_up(self, why: str) -> str:
        """Refuse what was asked for by name; do without what is there by default, and say so.

        Raises:
            InvalidValueError: it was asked for.
        """
        if self.demanded:
            raise self.refusal(why)
        logger.warning("torch.compile is off: %s", why)
        return f"off: {why}"

    def refusal(self, why: str) -> InvalidValueError:
        """What to raise where the model cannot be compiled."""
        return InvalidValueError("COMPILE_MODEL", "1", f"0 or auto here: {why}")


def warm_up(backend: Backend) -> None:
    """Have what is compiled at the first steps compiled now: of one row, of several, of two sequences."""
    pages = array("i", range(backend.num_pages))
    half = backend.num_pages // 2
    counts = [1, min(5, backend.num_pages * backend.page_size, backend.context_length)]
    plans = [[(count, pages)] for count in counts]
    if half:
        plans.append([(1, pages[:half]), (1, pages[half:])])
    for plan in plans:
        backend.run(
            [
                SequenceStep(list(range(count)), 0, table, SampleSpec(SamplingParams(), 0, 0))
                for count, table in plan
            ]
        )


def choose_compiler(settings: Settings, device: torch.device) -> Compiler | None:
    """None where nothing is to be compiled.

    Raises:
        InvalidValueError: a mode without a compiled model, a mode that does nothing on this device, or no
            C++ compiler.
    """
    wanted = settings.compile_model == "1" or (settings.compile_model == "auto" and device.type == "cuda")
    mode = settings.compile_mode
    if not wanted:
        if mode != "default":
            raise InvalidValueError("COMPILE_MODE", mode, "default while COMPILE_MODEL is off")
        return None
    if device.type == "cpu":
        if mode not in ("default", "max-autotune"):
            allowed = "default or max-autotune on a CPU, which has no CUDA graphs"
            raise InvalidValueError("COMPILE_MODE", mode, allowed)
        if not _has_cpp_compiler():
            raise InvalidValueError(
                "COMPILE_MODEL", settings.compile_model, "0 or auto: no C++ compiler is found"
            )
    return Compiler(mode, settings.compile_model == "1")


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
