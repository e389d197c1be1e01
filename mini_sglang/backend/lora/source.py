"""Where adapters come from: folders, and repositories of the hubs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from mini_sglang.backend.loading.source import find_adapter_files
from mini_sglang.backend.lora.files import open_adapter, parse_adapters
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.types import Adapter


def find_adapters(settings: Settings, notify: Callable[[str], None]) -> list[Adapter]:
    """The adapters that ``LORA_ADAPTERS`` names, downloaded where they are not on disk.

    Raises:
        InvalidValueError: what it says cannot be read, or there are more than ``MAX_LORAS``.
        ModelNotFoundError: no source has one of them.
        ModelLoadError: one has not the files of an adapter.
    """
    named = parse_adapters(settings.lora_adapters)
    if len(named) > settings.max_loras:
        allowed = f"at most {settings.max_loras} adapters (MAX_LORAS)"
        raise InvalidValueError("LORA_ADAPTERS", settings.lora_adapters, allowed)
    return [open_adapter(name, find_adapter_files(settings, place, notify)) for name, place in named]


def adapter_in(root: Path, name: str, place: str) -> Adapter:
    """The adapter at ``place`` within the folder ``root``, wherever links in it lead.

    Raises:
        InvalidValueError: ``place`` leads out of ``root``.
        ModelLoadError: it has not the files of an adapter.
    """
    allowed = "the path of a folder within LORA_ROOT"
    try:
        top = root.expanduser().resolve()
        path = (top / place).resolve()
        inside = path.is_relative_to(top) and path.is_dir()
    except (OSError, ValueError, RuntimeError):
        raise InvalidValueError("lora_path", place, allowed) from None
    if not inside:
        raise InvalidValueError("lora_path", place, allowed)
    try:
        return open_adapter(name, path)
    except ModelLoadError as error:
        # Clients need not know where the folder is.
        raise ModelLoadError(str(error).replace(str(path), place)) from None
