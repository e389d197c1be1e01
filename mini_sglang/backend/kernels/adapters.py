"""Adapters by the compiled kernels; their torch twin: ``TorchAdapters`` in ``lora/store.py``."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mini_sglang.backend.huge_pages import Arena
from mini_sglang.backend.kernels.jobs import Adapt, AdapterPart, AdapterRuns, AdapterSlot
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGML_TYPES
from mini_sglang.backend.lora.runs import Run
from mini_sglang.backend.lora.weights import PLACES, AdapterWeights, Place

_F32 = GGML_TYPES[0]


@dataclass(slots=True)
class _Packed:
    """An adapter's slots, ``[layer][place]``, and the memory they point to."""

    slots: list[list[AdapterSlot]]
    matrices: list[Tensor] = field(default_factory=list)


class NativeAdapters:
    """``AdapterMath`` in float32 on the CPU: a row gets the same bits alone and among others."""

    def __init__(self, kernels: NativeKernels, num_layers: int, capacity: int) -> None:
        self.runs = AdapterRuns()
        self._kernels = kernels
        self._tables = [[(AdapterSlot * capacity)() for _ in PLACES] for _ in range(num_layers)]
        self._kept: list[_Packed | None] = [None] * capacity

    def prepare(self, weights: AdapterWeights) -> object:
        # Room of its own: what is packed among the model's matrices would stay for ever.
        packed, arena = _Packed([]), Arena()

        def pack(matrix: Tensor) -> int:
            blocks = matrix.contiguous().view(torch.uint8)
            packed.matrices.append(self._kernels.pack(blocks, _F32, arena))
            return packed.matrices[-1].data_ptr()

        for layer in weights.places:
            packed.slots.append([_slot(place, pack) for place in layer])
        return packed

    def set(self, slot: int, prepared: object | None) -> None:
        assert prepared is None or isinstance(prepared, _Packed)
        for layer, tables in enumerate(self._tables):
            for place, table in enumerate(tables):
                table[slot] = AdapterSlot() if prepared is None else prepared.slots[layer][place]
        self._kept[slot] = prepared

    def begin(self, runs: Sequence[Run]) -> None:
        self.runs.set(runs)

    def job(self, layer: int, place: int, x: Tensor, y: Tensor) -> Adapt:
        """The job that does ``add`` for these very tensors, for the runs of the latest ``begin``."""
        assert x.is_contiguous() and y.stride(1) == 1
        return Adapt(
            runs=self.runs.address,
            slots=ctypes.addressof(self._tables[layer][place]),
            x=x.data_ptr(),
            y=y.data_ptr(),
            k=x.shape[1],
            stride=y.stride(0),
        )

    def add(self, layer: int, place: int, x: Tensor, y: Tensor) -> None:
        x = x.contiguous()
        self._kernels.run(self.job(layer, place, x, y), len(x))


def _slot(place: Place | None, pack: Callable[[Tensor], int]) -> AdapterSlot:
    slot = AdapterSlot()
    if place is None:
        return slot
    slot.down, slot.rank, slot.parts = pack(place.down), len(place.down), len(place.parts)
    for index, part in enumerate(place.parts):
        n, rank = part.up.shape
        slot.part[index] = AdapterPart(pack(part.up), rank, part.first, n)
    return slot
