"""What a CUDA graph could not record, found on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

# A number read by the host, shapes that depend on numbers, memory that comes from the host.
_NOT_IN_GRAPHS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "lift_fresh", "item")


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func._schema.name.split("::")[1])
        return func(*args, **(kwargs or {}))


def operators(work: Callable[[], object]) -> list[str]:
    """The names of torch's operators that ``work`` calls, none of which a graph could not record."""
    with _Recorder() as recorder:
        work()
    refused = [name for name in recorder.names if name.startswith(_NOT_IN_GRAPHS)]
    assert not refused, refused
    return recorder.names
