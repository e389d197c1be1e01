"""The adapters of a model that are loaded: slots, and what they add to a step's products."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.lora.runs import Run, narrowed, runs_of
from mini_sglang.backend.lora.weights import AdapterWeights, read_weights
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import Adapter


class AdapterMath(Protocol):
    """What adapters add, and the memory of their matrices. One thread at a time, but for ``prepare``."""

    def prepare(self, weights: AdapterWeights) -> object:
        """The matrices as ``set`` wants them; any thread may call it."""

    def set(self, slot: int, prepared: object | None) -> None:
        """Take an adapter into a slot, or nothing."""

    def begin(self, runs: Sequence[Run]) -> None:
        """The rows that have adapters from now on."""

    def add(self, layer: int, place: int, x: Tensor, y: Tensor) -> None:
        """Add to ``y`` ``[T, out_features]`` what the rows' adapters make of ``x`` ``[T, in_features]``."""


class StepAdapters:
    """The adapters of one step, for ``Decoder.forward``."""

    def __init__(self, math: AdapterMath, runs: Sequence[Run]) -> None:
        self._math = math
        self._runs = runs
        math.begin(runs)

    def add(self, layer: int, place: int, x: Tensor, y: Tensor) -> Tensor:
        """``y`` with what is added to it in place; ``place`` counts the products of a layer."""
        self._math.add(layer, place, x, y)
        return y

    def narrow(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self._math.begin(narrowed(self._runs, rows))


class Adapters:
    """The loaded adapters of one model. Ids count from 1; 0 is none.

    Args:
        math: what adds them up.
        capacity: adapters at a time.
        max_rank: highest rank of one.
    """

    def __init__(self, model: ModelConfig, math: AdapterMath, capacity: int, max_rank: int) -> None:
        self.math = math
        self._model = model
        self._max_rank = max_rank
        self._taken = [False] * capacity

    @property
    def capacity(self) -> int:
        return len(self._taken)

    def read(self, adapter: Adapter) -> object:
        """Read and check an adapter for ``attach``. Any thread may call it. Raises as ``read_weights``."""
        with torch.inference_mode():
            return self.math.prepare(read_weights(adapter, self._model, self._max_rank))

    def attach(self, prepared: object) -> int:
        """Give an adapter that ``read`` gave its id, which steps name from now on.

        Raises:
            InvalidValueError: as many as there is room for are there already.
        """
        if all(self._taken):
            raise InvalidValueError(
                "MAX_LORAS", self.capacity, "more than the adapters loaded now, or one must be unloaded"
            )
        slot = self._taken.index(False)
        self.math.set(slot, prepared)
        self._taken[slot] = True
        return slot + 1

    def detach(self, adapter_id: int) -> None:
        """Free an adapter that no step names any more."""
        assert self._taken[adapter_id - 1]
        self.math.set(adapter_id - 1, None)
        self._taken[adapter_id - 1] = False

    def check(self, adapter_ids: Collection[int]) -> None:
        """Raises InvalidValueError for an id, other than 0, that ``attach`` did not give."""
        for adapter_id in set(adapter_ids):
            if adapter_id and not (0 < adapter_id <= self.capacity and self._taken[adapter_id - 1]):
                raise InvalidValueError("adapter", adapter_id, "the id of an adapter that is loaded")

    def begin(self, batch: Batch) -> StepAdapters:
        """The adapters of a step that has some."""
        return StepAdapters(self.math, runs_of(batch))


class TorchAdapters:
    """``AdapterMath`` with torch's operators, in float32 whatever the model computes in.

    As with torch's other products, a row's last bits may depend on how many rows share the step.
    """

    def __init__(self, device: torch.device, capacity: int) -> None:
        self._device = device
        self._slots: list[AdapterWeights | None] = [None] * capacity
        self._runs: Sequence[Run] = ()

    def prepare(self, weights: AdapterWeights) -> object:
        return weights.to(self._device)

    def set(self, slot: int, prepared: object | None) -> None:
        assert prepared is None or isinstance(prepared, AdapterWeights)
        self._slots[slot] = prepared

    def begin(self, runs: Sequence[Run]) -> None:
        self._runs = runs

    def add(self, layer: int, place: int, x: Tensor, y: Tensor) -> None:
        for first, stop, slot in self._runs:
            weights = self._slots[slot]
            assert weights is not None
            found = weights.places[layer][place]
            if found is None:
                continue
            middle = F.linear(x[first:stop].float(), found.down)
            at = 0
            for part in found.parts:
                n, rank = part.up.shape
                columns = y[first:stop, part.first : part.first + n]
                columns.add_(F.linear(middle[:, at : at + rank], part.up))
                at += rank
