"""One safetensors file: its header, checked against its length, and its tensors, mapped.

The format is read here rather than through its library so that every damage gets its own sentence and shapes
are known without touching the data.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import NoReturn, TypeGuard

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.loading.json_files import parse_json
from mini_sglang.backend.loading.mapped import map_file
from mini_sglang.errors import ModelLoadError, shorten

_MAX_HEADER_BYTES = 100_000_000
_MAX_DIMS = 8

DTYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
"""Those that a model's weights are read from as they are, by their names in the format."""
# Known so that their lengths can be checked; a model's weights are not read from them.
_OTHER_DTYPE_BYTES = MappingProxyType(
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
    | {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
)


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a tensor is: bytes ``start`` to ``end`` of a mapped file."""

    file: SafetensorsFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """One mapped file: 8 bytes of header length, the header as JSON, then the data."""

    def __init__(self, path: Path, content: mmap.mmap | None = None) -> None:
        self.path = path
        self.buffer: mmap.mmap = map_file(path) if content is None else content

    def close(self) -> None:
        # Tensors still in use keep the map; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def tensor(self, entry: Entry, dtype: torch.dtype) -> Tensor:
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        # Not torch.frombuffer: its tensors would not keep the map from being closed under them.
        raw = torch.from_numpy(np.frombuffer(self.buffer, np.uint8, entry.end - entry.start, entry.start))
        if entry.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def entries(self) -> dict[str, Entry]:
        size = len(self.buffer)
        header_bytes = int.from_bytes(self.buffer[:8], "little")
        if size < 8 or header_bytes > size - 8 or header_bytes > _MAX_HEADER_BYTES:
            raise ModelLoadError(
                f"The file {self.path} is cut short or not safetensors: its {size} bytes cannot hold "
                f"the header of {header_bytes} bytes that it announces."
            )
        header = parse_json(self.buffer[8 : 8 + header_bytes], f"The header of {self.path}")
        header.pop("__metadata__", None)
        data_start = 8 + header_bytes
        entries = {name: self._entry(name, value, data_start) for name, value in header.items()}
        end, previous = data_start, ""
        for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].end)):
            if entry.start < end:
                self._damaged(f"the tensors {shorten(previous)} and {shorten(name)} overlap")
            if entry.end > size:
                raise ModelLoadError(
                    f"The file {self.path} is incomplete: the tensor {shorten(name)} ends at "
                    f"byte {entry.end}, and the file has {size}."
                )
            end, previous = entry.end, name
        return entries

    def _entry(self, name: str, value: object, data_start: int) -> Entry:
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not _are_sizes(shape, range(_MAX_DIMS + 1)) or not _are_sizes(offsets, (2,)):
            self._damaged(f"the entry of the tensor {shorten(name)} is {shorten(value)}")
        if not isinstance(dtype, str) or (dtype not in DTYPES and dtype not in _OTHER_DTYPE_BYTES):
            raise ModelLoadError(
                f"The tensor {shorten(name)} of {self.path} has the type {shorten(dtype)}; "
                f"supported are {', '.join(DTYPES)}."
            )
        itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else _OTHER_DTYPE_BYTES[dtype]
        start, end = offsets
        if end - start != prod(shape) * itemsize:
            self._damaged(
                f"the tensor {shorten(name)}, {dtype} of the shape {shorten(shape)}, "
                f"has {shorten(end - start)} bytes"
            )
        return Entry(self, dtype, tuple(shape), data_start + start, data_start + end)

    def _damaged(self, reason: str) -> NoReturn:
        raise ModelLoadError(f"The safetensors file {self.path} is damaged: {reason}.")


def _are_sizes(value: object, lengths: Collection[int]) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) in lengths
        and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
    )


def read_tensors(path: Path, content: mmap.mmap) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; they keep its ``content`` alive.

    Raises:
        ModelLoadError: it is damaged, or has a tensor of another type than F32, F16 and BF16.
    """
    file = SafetensorsFile(path, content)
    found: dict[str, Tensor] = {}
    for name, entry in file.entries().items():
        if entry.dtype not in DTYPES:
            raise ModelLoadError(
                f"The tensor {shorten(name)} of {path} has the type {entry.dtype}; "
                f"supported are {', '.join(DTYPES)}."
            )
        found[name] = file.tensor(entry, DTYPES[entry.dtype])
    return found
