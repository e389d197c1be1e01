"""The file of a saved prefix cache: safetensors, whose metadata says what it belongs to.

Tensors, for N pages, those above in the tree before those below: ``tokens`` ``[N, page_size]`` I32;
``parents`` ``[N]`` I32, the page before or -1; ``namespaces`` ``[N]`` I32, into the metadata's list; ``hits``
and ``used`` ``[N]`` I64, which rank them; ``kv`` ``[N, bytes of a page]`` U8.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import zlib
from array import array
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from mini_sglang.errors import CacheFileError

FORMAT = "mini-sglang prefix cache"
VERSION = "1"
_LARGEST_HEADER = 16 << 20
_CHUNK_BYTES = 8 << 20
_NO_CHECKSUM = "0" * 8
_COLUMNS = (("tokens", "I32", "i"), ("parents", "I32", "i"), ("namespaces", "I32", "i"), ("hits", "I64", "q"),
            ("used", "I64", "q"))  # fmt: skip


@dataclass(frozen=True, slots=True)
class SavedPages:
    """What the pages of a prefix cache hold and how they hang together; the columns of the file."""

    page_size: int
    names: list[str]
    tokens: array[int]
    parents: array[int]
    namespaces: array[int]
    hits: array[int]
    used: array[int]

    def __len__(self) -> int:
        return len(self.parents)

    def page_tokens(self, page: int) -> array[int]:
        return self.tokens[page * self.page_size : (page + 1) * self.page_size]


def write_cache(
    path: Path, identity: Mapping[str, str], saved: SavedPages, page_bytes: int, kv: Iterable[bytes]
) -> None:
    """Write a cache to ``path``, all of it or nothing: what was there before stays until then.

    Only this user can read it: it tells what was asked of the model.

    Args:
        identity: what the bytes in ``kv`` depend on beside the tokens.
        kv: the bytes of each page, in order.

    Raises:
        CacheFileError: it cannot be written, or there is a file that is no prefix cache.
    """
    if path.exists():
        # Somebody's file under a mistaken name must outlive this.
        _Reader(path).close()
    columns = [getattr(saved, name).tobytes() for name, _, _ in _COLUMNS]
    header: dict[str, Any] = {
        "__metadata__": {
            "format": FORMAT,
            "version": VERSION,
            "byteorder": sys.byteorder,
            "identity": json.dumps(dict(identity)),
            "page_size": str(saved.page_size),
            "names": json.dumps(saved.names),
            "checksum": _NO_CHECKSUM,
        }
    }
    at = 0
    for (name, kind, _), data in zip(_COLUMNS, columns, strict=True):
        shape = [len(saved), saved.page_size] if name == "tokens" else [len(saved)]
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [at, at + len(data)]}
        at += len(data)
    size = len(saved) * page_bytes
    header["kv"] = {"dtype": "U8", "shape": [len(saved), page_bytes], "data_offsets": [at, at + size]}
    partial = path.with_name(path.name + ".partial")
    try:
        with suppress(FileNotFoundError):
            partial.unlink()
        partial.touch(mode=0o600, exist_ok=False)
        with partial.open("r+b") as file:
            file.write(_header(header))
            checksum = 0
            for chunk in chain(columns, kv):
                checksum = zlib.crc32(chunk, checksum)
                file.write(chunk)
            # Of the header too, as it was before; of the same length, so that nothing moves.
            header["__metadata__"]["checksum"] = f"{zlib.crc32(_header(header), checksum):08x}"
            file.seek(0)
            file.write(_header(header))
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with suppress(OSError):
            partial.unlink()
        raise CacheFileError(
            f"The prefix cache cannot be saved to {path}: {error.strerror or error}."
        ) from None


class CacheFile:
    """A saved prefix cache, open and checked from end to end. Close it after use.

    Args:
        identity: what the running model's pages depend on.

    Raises:
        CacheFileError: there is no such file, it is none of these, is damaged or belongs to something else.
    """

    def __init__(self, path: Path, identity: Mapping[str, str], page_bytes: int) -> None:
        self._reader = _Reader(path)
        try:
            self._reader.check(identity, page_bytes)
            self.pages = self._reader.pages()
        except (ValueError, KeyError, TypeError, AttributeError, IndexError):
            self._reader.close()
            raise self._reader.damaged("its header cannot be read") from None
        except BaseException:
            self._reader.close()
            raise
        self._page_bytes = page_bytes

    def kv(self, page: int) -> bytes:
        """The bytes of a page."""
        start = self._reader.extents["kv"][0] + page * self._page_bytes
        return self._reader.buffer[start : start + self._page_bytes]

    def close(self) -> None:
        self._reader.close()

    def __enter__(self) -> CacheFile:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Reader:
    """A mapped file whose header says that it is a prefix cache."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError:
            raise self._none("it is empty") from None
        except OSError as error:
            raise CacheFileError(
                f"The prefix cache {path} cannot be read: {error.strerror or error}."
            ) from None
        try:
            self._read_header()
        except BaseException:
            self.buffer.close()
            raise

    def close(self) -> None:
        self.buffer.close()

    def check(self, identity: Mapping[str, str], page_bytes: int) -> None:
        """Compare what it belongs to, then the checksum of all that it holds."""
        theirs = json.loads(self.metadata["identity"])
        for name, value in {**identity, "byteorder": sys.byteorder}.items():
            other = self.metadata["byteorder"] if name == "byteorder" else theirs.get(name)
            if other != value:
                raise CacheFileError(
                    f"The prefix cache {self.path} belongs to another model or other settings: its {name} is "
                    f"{_short(other)}, here it is {_short(value)}."
                )
        count = self.shapes["parents"][0]
        shapes: dict[str, list[int]] = {column: [count] for column, _, _ in _COLUMNS}
        shapes["tokens"], shapes["kv"] = [count, int(self.metadata["page_size"])], [count, page_bytes]
        if shapes != self.shapes:
            raise self.damaged("its tensors do not fit each other")
        checksum, told = 0, self.metadata["checksum"]
        for start in range(self._data, len(self.buffer), _CHUNK_BYTES):
            checksum = zlib.crc32(self.buffer[start : start + _CHUNK_BYTES], checksum)
        header = self.buffer[: self._data].replace(told.encode(), _NO_CHECKSUM.encode(), 1)
        if f"{zlib.crc32(header, checksum):08x}" != told:
            raise self.damaged("its checksum is wrong")

    def pages(self) -> SavedPages:
        columns: dict[str, array[int]] = {}
        for name, _, code in _COLUMNS:
            start, stop = self.extents[name]
            columns[name] = array(code)
            columns[name].frombytes(self.buffer[start:stop])
        names = json.loads(self.metadata["names"])
        for page, (parent, place) in enumerate(zip(columns["parents"], columns["namespaces"], strict=True)):
            if not -1 <= parent < page or not 0 <= place < len(names):
                raise self.damaged("its pages do not hang together")
        return SavedPages(int(self.metadata["page_size"]), names, **columns)

    def _read_header(self) -> None:
        length = int.from_bytes(self.buffer[:8], "little")
        self._data = 8 + length
        if not 2 <= length <= min(_LARGEST_HEADER, len(self.buffer) - 8):
            raise self._none("it has no header")
        try:
            header = json.loads(self.buffer[8 : self._data])
            self.metadata: dict[str, str] = header.pop("__metadata__")
            found = self.metadata["format"], self.metadata["version"]
        except (ValueError, KeyError, AttributeError, TypeError):
            raise self._none("its header does not say so") from None
        if found != (FORMAT, VERSION):
            raise self._none(f"its header says {_short(found)}")
        self.extents: dict[str, tuple[int, int]] = {}
        self.shapes: dict[str, list[int]] = {}
        try:
            for name, entry in header.items():
                start, stop = entry["data_offsets"]
                self.extents[name] = self._data + start, self._data + stop
                self.shapes[name] = entry["shape"]
            end = max(stop for _, stop in self.extents.values())
        except (ValueError, KeyError, TypeError, AttributeError):
            raise self.damaged("its header cannot be read") from None
        if end != len(self.buffer):
            raise self.damaged(f"it has {len(self.buffer)} bytes of {end}")

    def _none(self, why: str) -> CacheFileError:
        return CacheFileError(f"The file {self.path} is not a saved prefix cache: {why}.")

    def damaged(self, why: str) -> CacheFileError:
        return CacheFileError(f"The prefix cache {self.path} is damaged: {why}.")


def _header(header: Mapping[str, Any]) -> bytes:
    data = json.dumps(header, separators=(",", ":")).encode()
    data += b" " * (-len(data) % 8)
    return len(data).to_bytes(8, "little") + data


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:60] + "…"
