"""``COMPILE_MODEL``: whether torch.compile is wanted, whether it can run here, and how a function gets it."""

from __future__ import annotations

import logging
from array import array
from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar, cast

import torch

from mini_sglang.backend.step import Backend, SampleSpec, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

logger = logging.getLogger(__name__)

F = TypeVar("F", bound=Callable[..., object])

# Of modes that would have torch.compile record CUDA graphs, what else they do.
_UNRECORDED = MappingProxyType({"reduce-overhead": "default", "max-autotune": "max-autotune-no-cudagraphs"})


@dataclass(frozen=True, slots=True)
class Compiler:
    """``torch.compile`` as the settings ask for it. ``demanded`` where they do by name, not by default."""

    mode: str
    demanded: bool

    @property
    def records(self) -> bool:
        """Whether CUDA graphs are part of the mode."""
        return self.mode in _UNRECORDED

    def compile(self, function: F, *, record: bool = False) -> F:
        """``function`` compiled at its first call, and again for other numbers of dimensions or types.

        Args:
            record: whether torch.compile records it where the mode says so; else whoever calls it does.
        """
        mode = self.mode if record else _UNRECORDED.get(self.mode, self.mode)
        return cast(F, torch.compile(function, dynamic=True, mode=mode))

    def refuse_lost_graphs(self, device: torch.device) -> None:
        """For a model whose graphs torch.compile is to record, in one thread, and to replay in another.

        Raises:
            InvalidValueError: this torch cannot.
        """
        if device.type == "cuda" and self.records and not _records_in_any_thread():
            allowed = (
                "default or max-autotune-no-cudagraphs for this model with torch "
                f"{torch.__version__}, whose torch.compile records CUDA graphs in one thread only"
            )
            raise InvalidValueError("COMPILE_MODE", self.mode, allowed)

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
    compiler = Compiler(mode, settings.compile_model == "1")
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
    elif compiler.records and not (settings.enable_decode_cuda_graph or settings.enable_cuda_graph):
        allowed = (
            "default or max-autotune-no-cudagraphs while ENABLE_DECODE_CUDA_GRAPH and ENABLE_CUDA_GRAPH are 0"
        )
        raise InvalidValueError("COMPILE_MODE", mode, allowed)
    return compiler


def _records_in_any_thread() -> bool:
    """Whether torch.compile's graphs work outside of the thread that imported them: not before torch 2.13."""
    from torch._inductor import cudagraph_trees

    return hasattr(cudagraph_trees, "_initialize_tls")


def _has_cpp_compiler() -> bool:
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return False
    return True
