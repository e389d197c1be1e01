"""A ``Recorder`` on a CPU that knows of a step what a CUDA graph knows: which kernels ran, and where.

Recording notes each of torch's operators and each launch of Triton; a replay does them again, on the very
tensors of the recording, and runs none of the Python between them. So whatever a step takes from the host
is what it was at the recording, and a buffer that somebody made anew elsewhere is not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

# What waits for the device, or copies from the host; a capture fails at it.
_FORBIDDEN = {"aten::_local_scalar_dense", "aten::lift_fresh", "aten::nonzero", "aten::masked_select"}


class NotStaticError(Exception):
    """A step did what a CUDA graph cannot hold."""


@dataclass(slots=True)
class _Call:
    run: Callable[[], Any]
    inputs: list[Tensor]
    outputs: list[Tensor]
    mutates: bool
    fills: bool = True


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[_Call] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name, given = func._schema.name, kwargs or {}
        by_mask = name == "aten::index" and any(t.dtype == torch.bool for t in _tensors(args[1]))
        if name in _FORBIDDEN or by_mask:
            raise NotStaticError(name)
        out = func(*args, **given)
        call = _Call(lambda: func(*args, **given), _tensors((args, given)), _tensors(out), False)
        call.mutates, call.fills = func._schema.is_mutable, "empty" not in name
        self.calls.append(call)
        return out


def _watch(step: Callable[[], None]) -> list[_Call]:
    """Run ``step`` and note what it has the device do."""
    from triton.runtime.interpreter import InterpretedFunction

    run = InterpretedFunction.run
    within = [True]

    def launch(self: Any, *args: Any, **given: Any) -> Any:
        def again() -> None:
            # The interpreter itself uses torch's operators.
            outer, within[0] = within[0], False
            with _disable_current_modes():
                run(self, *args, **given)
            within[0] = outer

        again()
        watch.calls.append(_Call(again, _tensors((args, given)), [], True))

    def refusing(own: Any, name: str) -> Any:
        def read(self: Tensor, *args: Any, **given: Any) -> Any:
            if within[0]:
                raise NotStaticError(name)
            return own(self, *args, **given)

        return read

    with pytest.MonkeyPatch.context() as patch, _Watch() as watch:
        patch.setattr(InterpretedFunction, "run", launch)
        # Of a CPU's tensors these are no operators.
        for name in ("tolist", "numpy"):
            patch.setattr(Tensor, name, refusing(getattr(Tensor, name), name))
        step()
        within[0] = False
    calls: list[_Call] = watch.calls
    return calls


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _storages(tensors: Iterable[Tensor]) -> set[int]:
    return {_storage(tensor) for tensor in tensors}


class FaithfulRecorder:
    """See above. ``bytes_each`` is what a recording says it takes of the device's memory."""

    def __init__(self, bytes_each: int = 0) -> None:
        self.bytes_each = bytes_each
        self.recorded = 0
        self.replayed = 0
        self.released = 0

    def record(self, step: Callable[[], None]) -> Callable[[], None]:
        first, calls = _watch(step), _watch(step)
        known = _storages(tensor for call in first for tensor in (*call.inputs, *call.outputs))
        made: dict[int, Tensor] = {}
        for call in calls:
            for tensor in call.inputs:
                if _storage(tensor) not in known and _storage(tensor) not in made:
                    raise NotStaticError("a step reads a tensor that is new in every run")
            inputs = _storages(call.inputs)
            for tensor in call.outputs:
                if _storage(tensor) not in inputs and _storage(tensor) not in known:
                    made.setdefault(_storage(tensor), tensor)
        self.recorded += 1

        @torch.inference_mode()
        def replay() -> None:
            # Another recording has had this memory.
            for tensor in made.values():
                torch.tensor([], dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(255)
            for call in calls:
                _again(call)
            self.replayed += 1

        # ``first`` lives on, so that no new tensor is at an address it had.
        replay.warm_up = first  # type: ignore[attr-defined]
        return replay

    def used_bytes(self) -> int:
        return self.bytes_each * self.recorded

    def release(self) -> None:
        self.released += 1


def _again(call: _Call) -> None:
    shared = _storages(call.inputs)
    if not call.mutates and all(_storage(tensor) in shared for tensor in call.outputs):
        return  # a view
    results = _tensors(call.run())
    if not call.mutates and call.fills:
        for kept, result in zip(call.outputs, results, strict=True):
            kept.copy_(result)
