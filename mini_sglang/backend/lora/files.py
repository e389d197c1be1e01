"""An adapter's folder as PEFT writes it, known by its content. Needs neither torch nor peft."""

from __future__ import annotations

import hashlib
import mmap
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.types import Adapter

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

MAX_NAME_CHARS = 128
_PART = r"[A-Za-z0-9_][A-Za-z0-9._-]*"
_NAME = re.compile(rf"{_PART}(?:/{_PART})*")
_PICKLES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
_MAX_CONFIG_BYTES = 1 << 20


def open_adapter(name: str, path: Path) -> Adapter:
    """The adapter in the folder ``path``, to be called ``name``.

    Raises:
        InvalidValueError: ``name`` is no name.
        ModelLoadError: the folder has not the files of an adapter.
    """
    check_name(name)
    return Adapter(name, str(path), fingerprint_of(path))


def check_name(name: str) -> None:
    """Raises InvalidValueError for what cannot be an adapter's name."""
    if not isinstance(name, str) or len(name) > MAX_NAME_CHARS or not _NAME.fullmatch(name):
        allowed = (
            f"a name of at most {MAX_NAME_CHARS} letters, digits, dots, dashes and underscores, "
            "in parts with slashes between"
        )
        raise InvalidValueError("lora_name", name, allowed)


@dataclass(frozen=True, slots=True)
class Contents:
    """An adapter's files in memory, where nobody can change them any more."""

    config: bytes
    weights: mmap.mmap
    fingerprint: str


def read_contents(folder: Path) -> Contents:
    """Read an adapter's files whole. Raises as ``fingerprint_of``."""
    _check_folder(folder)
    try:
        if (folder / CONFIG_FILE).stat().st_size > _MAX_CONFIG_BYTES:
            raise ModelLoadError(f"The adapter {folder} has a {CONFIG_FILE} above {_MAX_CONFIG_BYTES} bytes.")
        config = (folder / CONFIG_FILE).read_bytes()
        with (folder / WEIGHTS_FILE).open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            weights = mmap.mmap(-1, max(size, 1))
            file.readinto(weights)
    except OSError as error:
        raise ModelLoadError(f"The adapter {folder} cannot be read: {error.strerror or error}.") from None
    digest = hashlib.sha256(b"%d\n" % len(config) + config)
    digest.update(weights)
    return Contents(config, weights, digest.hexdigest())


def fingerprint_of(folder: Path) -> str:
    """SHA-256 of an adapter's files.

    Raises:
        ModelLoadError: they are not there or cannot be read.
    """
    return read_contents(folder).fingerprint


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise ModelLoadError(f"The adapter {folder} is not a folder that exists.")
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if (folder / name).is_file():
            continue
        pickle = next((other for other in _PICKLES if (folder / other).exists()), None)
        if name == WEIGHTS_FILE and pickle is not None:
            raise ModelLoadError(
                f"The adapter {folder} has {pickle} and no {name}; pickled weights are never loaded, "
                "since opening them can run code."
            )
        raise ModelLoadError(f"The adapter {folder} has no {name}.")


def parse_adapters(text: str | None) -> Sequence[tuple[str, str]]:
    """Names and places from ``LORA_ADAPTERS``: ``name=place,name=place``; a place alone gives its last part.

    Raises:
        InvalidValueError: an entry without a place, a name that is none, or one that comes twice.
    """
    found: dict[str, str] = {}
    for entry in (text or "").split(","):
        if not entry.strip():
            continue
        name, given, place = (part.strip() for part in entry.partition("="))
        if not given:
            name, place = name.rstrip("/").rpartition("/")[2], name
        if not place:
            raise InvalidValueError("LORA_ADAPTERS", entry, "name=folder, or several with commas between")
        check_name(name)
        if name in found:
            raise InvalidValueError("LORA_ADAPTERS", name, "a name that is given once")
        found[name] = place
    return list(found.items())
