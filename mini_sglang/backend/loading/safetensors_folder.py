"""Reader of a Hugging Face folder: ``config.json`` and safetensors, in one file or in shards.

The safetensors format is read here rather than through its library so that every damage gets its own
sentence and shapes are known without touching the data. Pickled weights (``.bin``) are never opened.
"""

from __future__ import annotations

import contextlib
import json
import mmap
from collections.abc import Collection
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn, TypeGuard

import numpy as np
import torch
from torch import Tensor

from mini_sglang.backend.loading.fp8_blocks import SCALE_SUFFIX, dequantize_blocks, fp8_block, is_fp8
from mini_sglang.backend.loading.mapped import map_file, release_read
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.weights import DenseWeight, Weight
from mini_sglang.errors import ModelLoadError, shorten

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_MAX_HEADER_BYTES = 100_000_000
_MAX_JSON_BYTES = 100_000_000
_MAX_DIMS = 8
_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_DTYPES = MappingProxyType({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
# Known so that their lengths can be checked; a model's weights are not read from them.
_OTHER_DTYPE_BYTES = MappingProxyType(
    dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1)
    | {"I16": 2, "U16": 2, "I32": 4, "U32": 4, "I64": 8, "U64": 8, "F64": 8, "C64": 8}
)


@dataclass(frozen=True, slots=True)
class _Entry:
    """Where a tensor is: bytes ``start`` to ``end`` of a mapped file."""

    file: _SafetensorsFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsCheckpoint:
    """The checkpoint of a folder; see ``checkpoint.Checkpoint``.

    Raises:
        ModelLoadError: on opening, for anything missing, damaged or unsupported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = _read_json(folder / "config.json")
        self._fp8_block: tuple[int, int] | None = None
        if is_fp8(self.config):
            self._fp8_block = fp8_block(self.config, folder)
        else:
            _refuse_quantized(self.config, folder)
        has_generation_config = (folder / "generation_config.json").is_file()
        self.generation_config = (
            _read_json(folder / "generation_config.json") if has_generation_config else {}
        )
        self._entries: dict[str, _Entry] = {}
        self._files: list[_SafetensorsFile] = []
        try:
            if (folder / WEIGHTS_FILE).exists():
                self._add(folder / WEIGHTS_FILE)
            elif (folder / INDEX_FILE).exists():
                self._add_shards(folder / INDEX_FILE)
            else:
                raise _no_weights(folder)
        except BaseException:
            self.close()
            raise
        self.quantized = False
        self.nbytes = sum(entry.end - entry.start for entry in self._entries.values())

    def names(self) -> Collection[str]:
        if self._fp8_block is None:
            return self._entries.keys()
        return [name for name in self._entries if not name.endswith(SCALE_SUFFIX)]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def weight(self, name: str, dtype: torch.dtype, part: Part | None = None) -> Weight:
        shape = self.shape(name)
        if len(shape) != 2:
            raise ModelLoadError(
                f"The tensor {name} of {self.path} has the shape {shape}; it must be a matrix."
            )
        return DenseWeight(self.tensor(name, dtype, part))

    def tensor(self, name: str, dtype: torch.dtype | None, part: Part | None = None) -> Tensor:
        entry = self._entry(name)
        if entry.dtype == "F8_E4M3" and self._fp8_block is not None and len(entry.shape) == 2:
            return self._from_fp8(name, entry, self._fp8_block, part, dtype or torch.float32)
        if entry.dtype not in _DTYPES:
            raise ModelLoadError(
                f"The tensor {name} of {entry.file.path} has the type {entry.dtype}; "
                f"supported are {', '.join(_DTYPES)}."
            )
        stored = entry.file.tensor(entry, _DTYPES[entry.dtype])
        if part is not None:
            stored = stored.narrow(part.dim, part.start, part.stop - part.start).contiguous()
        return stored if dtype is None else stored.to(dtype)

    def _from_fp8(
        self, name: str, entry: _Entry, block: tuple[int, int], part: Part | None, dtype: torch.dtype
    ) -> Tensor:
        scales = self._entry(name + SCALE_SUFFIX)
        if scales.dtype not in _DTYPES:
            raise ModelLoadError(
                f"The tensor {name}{SCALE_SUFFIX} of {scales.file.path} has the type {scales.dtype}; "
                f"supported are {', '.join(_DTYPES)}."
            )
        codes = entry.file.tensor(entry, torch.float8_e4m3fn)
        try:
            return dequantize_blocks(
                codes, scales.file.tensor(scales, _DTYPES[scales.dtype]), block, part, dtype
            )
        except ValueError as error:
            raise ModelLoadError(f"The tensor {name}{SCALE_SUFFIX} of {self.path} has {error}.") from None

    def in_blocks(self, name: str) -> bool:
        self._entry(name)
        return False

    def block_size(self, name: str) -> int:
        self._entry(name)
        return 1

    def release(self) -> None:
        for file in self._files:
            release_read(file.buffer)

    def close(self) -> None:
        for file in self._files:
            file.close()

    def _entry(self, name: str) -> _Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelLoadError(f"The model {self.path} has no tensor {shorten(name)}.") from None

    def _add(self, path: Path) -> dict[str, _Entry]:
        file = _SafetensorsFile(path)
        self._files.append(file)
        entries = file.entries()
        for name in entries:
            if name in self._entries:
                other = self._entries[name].file.path.name
                raise ModelLoadError(f"The tensor {shorten(name)} is in both {other} and {path.name}.")
        self._entries |= entries
        return entries

    def _add_shards(self, index_path: Path) -> None:
        weight_map = _read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ModelLoadError(
                f"The shard index {index_path} has no weight_map, tensor names to file names."
            )
        shards: dict[str, list[str]] = {}
        for name, shard in weight_map.items():
            if not isinstance(shard, str) or not _is_plain_name(shard):
                raise ModelLoadError(
                    f"The shard index {index_path} places {shorten(name)} in {shorten(shard)}; "
                    "it must be the plain name of a .safetensors file beside it."
                )
            shards.setdefault(shard, []).append(name)
        for shard, names in sorted(shards.items()):
            path = index_path.parent / shard
            if not path.exists():
                raise ModelLoadError(f"The shard {shorten(shard)}, named in {index_path}, is missing.")
            held = self._add(path)
            for name in names:
                if name not in held:
                    raise ModelLoadError(
                        f"The tensor {shorten(name)} is not in the shard {path}, where the index places it."
                    )


class _SafetensorsFile:
    """One mapped file: 8 bytes of header length, the header as JSON, then the data."""

    def __init__(self, path: Path, content: mmap.mmap | None = None) -> None:
        self.path = path
        self.buffer: mmap.mmap = map_file(path) if content is None else content

    def close(self) -> None:
        # Tensors still in use keep the map; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self.buffer.close()

    def tensor(self, entry: _Entry, dtype: torch.dtype) -> Tensor:
        if entry.start == entry.end:
            return torch.empty(entry.shape, dtype=dtype)
        # Not torch.frombuffer: its tensors would not keep the map from being closed under them.
        raw = torch.from_numpy(np.frombuffer(self.buffer, np.uint8, entry.end - entry.start, entry.start))
        if entry.start % dtype.itemsize:
            raw = raw.clone()
        return raw.view(dtype).view(entry.shape)

    def entries(self) -> dict[str, _Entry]:
        size = len(self.buffer)
        header_bytes = int.from_bytes(self.buffer[:8], "little")
        if size < 8 or header_bytes > size - 8 or header_bytes > _MAX_HEADER_BYTES:
            raise ModelLoadError(
                f"The file {self.path} is cut short or not safetensors: its {size} bytes cannot hold "
                f"the header of {header_bytes} bytes that it announces."
            )
        header = _parse_json(self.buffer[8 : 8 + header_bytes], f"The header of {self.path}")
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

    def _entry(self, name: str, value: object, data_start: int) -> _Entry:
        fields = value if isinstance(value, dict) else {}
        dtype, shape, offsets = (fields.get(key) for key in ("dtype", "shape", "data_offsets"))
        if not _are_sizes(shape, range(_MAX_DIMS + 1)) or not _are_sizes(offsets, (2,)):
            self._damaged(f"the entry of the tensor {shorten(name)} is {shorten(value)}")
        if not isinstance(dtype, str) or (dtype not in _DTYPES and dtype not in _OTHER_DTYPE_BYTES):
            raise ModelLoadError(
                f"The tensor {shorten(name)} of {self.path} has the type {shorten(dtype)}; "
                f"supported are {', '.join(_DTYPES)}."
            )
        itemsize = _DTYPES[dtype].itemsize if dtype in _DTYPES else _OTHER_DTYPE_BYTES[dtype]
        start, end = offsets
        if end - start != prod(shape) * itemsize:
            self._damaged(
                f"the tensor {shorten(name)}, {dtype} of the shape {shorten(shape)}, "
                f"has {shorten(end - start)} bytes"
            )
        return _Entry(self, dtype, tuple(shape), data_start + start, data_start + end)

    def _damaged(self, reason: str) -> NoReturn:
        raise ModelLoadError(f"The safetensors file {self.path} is damaged: {reason}.")


def _are_sizes(value: object, lengths: Collection[int]) -> TypeGuard[list[int]]:
    return (
        isinstance(value, list)
        and len(value) in lengths
        and all(type(number) is int and 0 <= number < 1 << 63 for number in value)
    )


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", ":", "\0"))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ModelLoadError(f"The file {path} is above the limit of {_MAX_JSON_BYTES} bytes.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise ModelLoadError(f"The model folder {path.parent} has no {path.name}.") from None
    except OSError as error:
        raise ModelLoadError(f"The file {path} cannot be read: {error.strerror or error}.") from None
    return _parse_json(text, f"The file {path}")


def _parse_json(text: bytes, what: str) -> dict[str, Any]:
    """Parse one JSON object, without the repeated keys that Python's parser would let pass."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ModelLoadError(f"{what} is damaged: {shorten(repeated)} occurs twice.")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    # Too deep, not UTF-8, not JSON, or a number of thousands of digits.
    except (RecursionError, ValueError):
        raise ModelLoadError(f"{what} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what} is not a JSON object.")
    return value


def _refuse_quantized(config: dict[str, Any], folder: Path) -> None:
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if settings:
            method = settings.get("quant_method", "unknown") if isinstance(settings, dict) else settings
            raise ModelLoadError(
                f"The weights of {folder} are quantised ({key}: {shorten(method)}), which is not supported; "
                "use the model's plain safetensors or a GGUF file of it."
            )


def _no_weights(folder: Path) -> ModelLoadError:
    try:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLE_SUFFIXES)
    except OSError:
        pickles = []
    found = f"{WEIGHTS_FILE} and no {INDEX_FILE}"
    if pickles:
        return ModelLoadError(
            f"The model folder {folder} has no {found}; pickled weights such as {pickles[0]} are never "
            "loaded, since opening them can run code."
        )
    return ModelLoadError(f"The model folder {folder} has no {found}.")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ``ModelLoadError`` where there is none."""
    return _read_json(path)


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that ``text`` is. Raises ``ModelLoadError``, of ``what``, where it is none."""
    return _parse_json(text, what)


def read_tensors(path: Path, content: mmap.mmap) -> dict[str, Tensor]:
    """Every tensor of a safetensors file; they keep its ``content`` alive.

    Raises:
        ModelLoadError: it is damaged, or has a tensor of another type than F32, F16 and BF16.
    """
    file = _SafetensorsFile(path, content)
    found: dict[str, Tensor] = {}
    for name, entry in file.entries().items():
        if entry.dtype not in _DTYPES:
            raise ModelLoadError(
                f"The tensor {shorten(name)} of {path} has the type {entry.dtype}; "
                f"supported are {', '.join(_DTYPES)}."
            )
        found[name] = file.tensor(entry, _DTYPES[entry.dtype])
    return found
