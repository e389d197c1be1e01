"""Reader of the GGUF container, versions 2 and 3, little-endian.

The layout is that of the ggml project's specification (docs/gguf.md): a header of key-value metadata, a
table of tensors, then the tensors' bytes, each at an aligned offset. A file is not trusted: every count,
length and offset is checked against the file's real length before anything is allocated from it. Reading
the metadata needs neither torch nor numpy.
"""

from __future__ import annotations

import contextlib
import mmap
import struct
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from mini_sglang.backend.loading.ggml_types import GGML_TYPES, UNSUPPORTED_TYPE_NAMES, GGMLType
from mini_sglang.backend.loading.mapped import map_file, release_read
from mini_sglang.errors import ModelLoadError, shorten

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

MAGIC = b"GGUF"
VERSIONS = (2, 3)

# Far above any real file's; they bound what a hostile header makes us allocate.
_MAX_KEYS = 1 << 16
_MAX_TENSORS = 1 << 20
_MAX_ARRAY = 1 << 22
_MAX_STRING_BYTES = 1 << 24
_MAX_NAME_BYTES = (1 << 16) - 1
_MAX_DIMS = 4
_MAX_ALIGNMENT = 1 << 20

_DEFAULT_ALIGNMENT = 32
_ALIGNMENT_KEY = "general.alignment"

_BOOL, _STRING, _ARRAY = 7, 8, 9
_SCALAR_FORMATS = MappingProxyType(
    {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", _BOOL: "B", 10: "Q", 11: "q", 12: "d"}
)
_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One entry of the tensor table.

    Attributes:
        shape: in torch's order, so a matrix is ``(out_features, in_features)``; blocks run along the last.
        offset: of the first byte, from the start of the file.
        nbytes: length of the stored blocks.
    """

    name: str
    type: GGMLType
    shape: tuple[int, ...]
    offset: int
    nbytes: int


class GGUFFile:
    """An open GGUF file: its metadata, its tensor table and a memory map of its bytes.

    The map is private: the file cannot be changed through it. Views stay valid after ``close``; the
    memory goes back when the last of them is dropped.
    """

    def __init__(
        self,
        path: Path,
        buffer: mmap.mmap,
        version: int,
        metadata: dict[str, Any],
        tensors: dict[str, GGUFTensor],
    ) -> None:
        self.path = path
        self.version = version
        self.metadata = metadata
        self.tensors = tensors
        self._buffer = buffer

    def view(self, name: str) -> npt.NDArray[np.uint8]:
        """The stored bytes of a tensor, uint8 ``[nbytes]``, without a copy; not to be written to."""
        import numpy as np

        tensor = self.tensors[name]
        return np.frombuffer(self._buffer, np.uint8, tensor.nbytes, tensor.offset)

    def prefetch(self) -> None:
        """Ask the system to start reading the file into memory, without waiting for it."""
        if hasattr(mmap, "MADV_WILLNEED"):
            self._buffer.madvise(mmap.MADV_WILLNEED)

    def release(self) -> None:
        """Give back the memory of what was read so far."""
        release_read(self._buffer)

    def close(self) -> None:
        # A map with live views refuses to close; it goes with the last of them.
        with contextlib.suppress(BufferError):
            self._buffer.close()

    def __enter__(self) -> GGUFFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_gguf(path: Path) -> GGUFFile:
    """Open a GGUF file and read its header.

    Metadata values are ``int``, ``float``, ``bool``, ``str`` or lists of one of these.

    Raises:
        ModelLoadError: the file cannot be read, is not GGUF, is damaged or cut short, or holds a tensor
            of a type that is not in ``GGML_TYPES``.
    """
    buffer = map_file(path)
    try:
        header = _Header(path, buffer)
        version = header.version()
        tensor_count = header.count("tensors", 24, _MAX_TENSORS)
        key_count = header.count("metadata keys", 13, _MAX_KEYS)
        metadata = header.metadata(key_count)
        tensors = header.tensors(tensor_count, _alignment(path, metadata))
    except BaseException:
        buffer.close()
        raise
    return GGUFFile(path, buffer, version, metadata, tensors)


def _alignment(path: Path, metadata: dict[str, Any]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    is_power_of_two = type(value) is int and 8 <= value <= _MAX_ALIGNMENT and value & (value - 1) == 0
    if not is_power_of_two:
        raise ModelLoadError(
            f"The GGUF file {path} is damaged: {_ALIGNMENT_KEY} is {shorten(value)}; "
            "it must be a power of two from 8."
        )
    return int(value)


class _Header:
    """A cursor over the header, which never passes the end of the file."""

    def __init__(self, path: Path, buffer: mmap.mmap) -> None:
        self.path = path
        self.buffer = buffer
        self.size = len(buffer)
        self.pos = 0

    def damaged(self, reason: str) -> NoReturn:
        raise ModelLoadError(f"The GGUF file {self.path} is damaged: {reason}.")

    def cut_short(self, what: str) -> NoReturn:
        raise ModelLoadError(
            f"The GGUF file {self.path} is incomplete: it ends in the middle of {what}, "
            f"after {self.size} bytes."
        )

    def need(self, nbytes: int, what: str) -> None:
        if nbytes > self.size - self.pos:
            self.cut_short(what)

    def number(self, layout: struct.Struct, what: str) -> Any:
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.buffer, self.pos)
        self.pos += layout.size
        return value

    def version(self) -> int:
        magic = self.buffer[:4]
        if magic != MAGIC:
            raise ModelLoadError(
                f"The file {self.path} is not GGUF: it begins with {magic!r}, not {MAGIC!r}."
            )
        self.pos = 4
        version = self.number(_U32, "the version")
        if version not in VERSIONS:
            big_endian = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
            shown = "big-endian" if big_endian else f"version {version}"
            raise ModelLoadError(
                f"The GGUF file {self.path} is {shown}; supported are versions 2 and 3, little-endian."
            )
        return int(version)

    def count(self, what: str, min_bytes: int, limit: int) -> int:
        """A count of things that take at least ``min_bytes`` each in the rest of the file."""
        count = int(self.number(_U64, f"the number of {what}"))
        if count > min(limit, (self.size - self.pos) // min_bytes):
            self.damaged(f"it announces {count} {what}, more than fit in its {self.size} bytes")
        return count

    def string(self, what: str, limit: int = _MAX_STRING_BYTES) -> str:
        length = self.number(_U64, what)
        if length > limit:
            self.damaged(f"{what} is {length} bytes long, above the limit of {limit}")
        self.need(length, what)
        try:
            text = self.buffer[self.pos : self.pos + length].decode()
        except UnicodeDecodeError:
            self.damaged(f"{what} is not UTF-8 text")
        self.pos += length
        return text

    def metadata(self, count: int) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for _ in range(count):
            key = self.string("a metadata key", _MAX_NAME_BYTES)
            if key in values:
                self.damaged(f"the metadata key {shorten(key)} occurs twice")
            what = f"the value of {shorten(key)}"
            kind = self.number(_U32, what)
            values[key] = self.array(what) if kind == _ARRAY else self.value(kind, what)
        return values

    def value(self, kind: int, what: str) -> Any:
        if kind == _STRING:
            return self.string(what)
        if kind not in _SCALAR_FORMATS:
            self.damaged(f"{what} has the unknown type {kind}")
        value = self.number(struct.Struct("<" + _SCALAR_FORMATS[kind]), what)
        return bool(value) if kind == _BOOL else value

    def array(self, what: str) -> list[Any]:
        kind = self.number(_U32, what)
        if kind == _STRING:
            return self.strings(self.count(f"strings in {what}", 8, _MAX_ARRAY), what)
        if kind not in _SCALAR_FORMATS:
            self.damaged(f"{what} is an array of the unsupported type {kind}")
        layout = _SCALAR_FORMATS[kind]
        width = struct.calcsize("<" + layout)
        count = self.count(f"numbers in {what}", width, _MAX_ARRAY)
        values = list(struct.unpack_from(f"<{count}{layout}", self.buffer, self.pos))
        self.pos += count * width
        return [bool(value) for value in values] if kind == _BOOL else values

    def strings(self, count: int, what: str) -> list[str]:
        # A vocabulary has some 100,000 of these: one flat loop over local names.
        buffer, size, unpack = self.buffer, self.size, _U64.unpack_from
        texts: list[str] = []
        append: Callable[[str], None] = texts.append
        pos = self.pos
        try:
            for _ in range(count):
                start = pos + 8
                pos = start + unpack(buffer, pos)[0]
                if pos > size or pos - start > _MAX_STRING_BYTES:
                    self.cut_short(what)
                append(buffer[start:pos].decode())
        except struct.error:
            self.cut_short(what)
        except UnicodeDecodeError:
            self.damaged(f"a string in {what} is not UTF-8 text")
        self.pos = pos
        return texts

    def tensors(self, count: int, alignment: int) -> dict[str, GGUFTensor]:
        entries = [self.tensor() for _ in range(count)]
        data_start = -(-self.pos // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        end, previous = data_start, ""
        for name, kind, shape, offset in sorted(entries, key=lambda entry: entry[3]):
            if name in tensors:
                self.damaged(f"the tensor {shorten(name)} occurs twice")
            if offset % alignment:
                self.damaged(f"the tensor {shorten(name)} starts at {offset}, not a multiple of {alignment}")
            nbytes = prod(shape) // kind.block_size * kind.block_bytes
            tensor = GGUFTensor(name, kind, shape, data_start + offset, nbytes)
            if tensor.offset < end:
                self.damaged(f"the tensors {shorten(previous)} and {shorten(name)} overlap")
            end, previous = tensor.offset + nbytes, name
            if end > self.size:
                raise ModelLoadError(
                    f"The GGUF file {self.path} is incomplete: the tensor {shorten(name)} ends at "
                    f"byte {end}, and the file has {self.size}."
                )
            tensors[name] = tensor
        return tensors

    def tensor(self) -> tuple[str, GGMLType, tuple[int, ...], int]:
        name = self.string("a tensor's name", _MAX_NAME_BYTES)
        what = f"the entry of the tensor {shorten(name)}"
        num_dims = self.number(_U32, what)
        if not 1 <= num_dims <= _MAX_DIMS:
            self.damaged(
                f"the tensor {shorten(name)} has {num_dims} dimensions; 1 to {_MAX_DIMS} are possible"
            )
        shape = tuple(self.number(_U64, what) for _ in range(num_dims))[::-1]
        kind_id = self.number(_U32, what)
        offset = self.number(_U64, what)
        kind = GGML_TYPES.get(kind_id)
        if kind is None:
            shown = UNSUPPORTED_TYPE_NAMES.get(kind_id, f"number {kind_id}")
            allowed = ", ".join(known.name for known in GGML_TYPES.values())
            raise ModelLoadError(
                f"The tensor {shorten(name)} of the GGUF file {self.path} has the type {shown}; "
                f"supported are {allowed}."
            )
        if 0 in shape or shape[-1] % kind.block_size:
            self.damaged(f"the tensor {shorten(name)} of type {kind.name} has the impossible shape {shape}")
        return name, kind, shape, offset
