"""Reader of a Hugging Face folder: ``config.json`` and safetensors, in one file or in shards.

Pickled weights (``.bin``) are never opened.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.loading.fp8_blocks import SCALE_SUFFIX, dequantize_blocks, fp8_block, is_fp8
from mini_sglang.backend.loading.json_files import read_json
from mini_sglang.backend.loading.mapped import release_read
from mini_sglang.backend.loading.parts import Part
from mini_sglang.backend.loading.safetensors_file import DTYPES, Entry, SafetensorsFile
from mini_sglang.backend.weights import DenseWeight, Weight
from mini_sglang.errors import ModelLoadError, shorten

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

_PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")


class SafetensorsCheckpoint:
    """The checkpoint of a folder; see ``checkpoint.Checkpoint``.

    Raises:
        ModelLoadError: on opening, for anything missing, damaged or unsupported.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder
        self.config = read_json(folder / "config.json")
        self._fp8_block: tuple[int, int] | None = None
        if is_fp8(self.config):
            self._fp8_block = fp8_block(self.config, folder)
        else:
            _refuse_quantized(self.config, folder)
        has_generation_config = (folder / "generation_config.json").is_file()
        self.generation_config = read_json(folder / "generation_config.json") if has_generation_config else {}
        self._entries: dict[str, Entry] = {}
        self._files: list[SafetensorsFile] = []
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
        if entry.dtype not in DTYPES:
            raise ModelLoadError(
                f"The tensor {name} of {entry.file.path} has the type {entry.dtype}; "
                f"supported are {', '.join(DTYPES)}."
            )
        stored = entry.file.tensor(entry, DTYPES[entry.dtype])
        if part is not None:
            stored = stored.narrow(part.dim, part.start, part.stop - part.start).contiguous()
        return stored if dtype is None else stored.to(dtype)

    def _from_fp8(
        self, name: str, entry: Entry, block: tuple[int, int], part: Part | None, dtype: torch.dtype
    ) -> Tensor:
        scales = self._entry(name + SCALE_SUFFIX)
        if scales.dtype not in DTYPES:
            raise ModelLoadError(
                f"The tensor {name}{SCALE_SUFFIX} of {scales.file.path} has the type {scales.dtype}; "
                f"supported are {', '.join(DTYPES)}."
            )
        codes = entry.file.tensor(entry, torch.float8_e4m3fn)
        try:
            return dequantize_blocks(
                codes, scales.file.tensor(scales, DTYPES[scales.dtype]), block, part, dtype
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

    def _entry(self, name: str) -> Entry:
        try:
            return self._entries[name]
        except KeyError:
            raise ModelLoadError(f"The model {self.path} has no tensor {shorten(name)}.") from None

    def _add(self, path: Path) -> dict[str, Entry]:
        file = SafetensorsFile(path)
        self._files.append(file)
        entries = file.entries()
        for name in entries:
            if name in self._entries:
                other = self._entries[name].file.path.name
                raise ModelLoadError(f"The tensor {shorten(name)} is in both {other} and {path.name}.")
        self._entries |= entries
        return entries

    def _add_shards(self, index_path: Path) -> None:
        weight_map = read_json(index_path).get("weight_map")
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


def _is_plain_name(name: str) -> bool:
    return name.endswith(".safetensors") and not any(mark in name for mark in ("/", "\\", ":", "\0"))


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
