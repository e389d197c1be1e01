"""What tells one model's weights from another's, without reading all of them."""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator
from pathlib import Path

from mini_sglang.backend.loading.gguf import read_gguf
from mini_sglang.backend.loading.mapped import map_file

# Tensors up to so many bytes (norms, biases) are read whole, of others so many pieces.
_WHOLE_BYTES = 64 << 10
_PIECES, _PIECE_BYTES = 16, 4 << 10


def weights_fingerprint(path: Path) -> str:
    """A digest over a model's config, the headers of its weight files and a part of every tensor in them.

    Training changes nearly all numbers of the matrices it changes at all, and 16 pieces of each are read;
    small tensors are read whole. Names of files and times do not count: a copy of a model is the same model.

    Raises:
        ModelLoadError: a file is damaged or gone.
    """
    digest = hashlib.sha256()
    if path.is_dir() and (path / "config.json").is_file():
        digest.update((path / "config.json").read_bytes())
    files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
    for file in files:
        buffer = map_file(file)
        try:
            extents = _gguf(file) if path.is_file() else _safetensors(buffer)
            first = min((start for start, _ in extents), default=len(buffer))
            digest.update(len(buffer).to_bytes(8, "little"))
            digest.update(buffer[:first])
            for start, stop in extents:
                for piece in _pieces(start, min(stop, len(buffer))):
                    digest.update(buffer[piece])
        finally:
            buffer.close()
    return digest.hexdigest()


def _pieces(start: int, stop: int) -> Iterator[slice]:
    if stop - start <= _WHOLE_BYTES:
        yield slice(start, stop)
        return
    for index in range(_PIECES):
        at = start + (stop - start - _PIECE_BYTES) * index // (_PIECES - 1)
        yield slice(at, at + _PIECE_BYTES)


def _gguf(file: Path) -> list[tuple[int, int]]:
    with read_gguf(file) as content:
        return sorted((tensor.offset, tensor.offset + tensor.nbytes) for tensor in content.tensors.values())


def _safetensors(buffer: mmap.mmap) -> list[tuple[int, int]]:
    length = int.from_bytes(buffer[:8], "little")
    header = json.loads(buffer[8 : 8 + length])
    offsets = (entry["data_offsets"] for name, entry in header.items() if name != "__metadata__")
    return sorted((8 + length + start, 8 + length + stop) for start, stop in offsets)
