"""What an engine's caches hold before its first request: a saved cache, and prefixes known to be wanted."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from mini_sglang.config import Settings
from mini_sglang.errors import CacheFileError, InvalidValueError

if TYPE_CHECKING:
    from mini_sglang.engine.engine import EngineCore
    from mini_sglang.text.tokenizer import Tokenizer

SEPARATOR = "||"


def fill_caches(
    core: EngineCore, tokenizer: Tokenizer, settings: Settings, notify: Callable[[str], None], index: int = 0
) -> None:
    """Load PREFIX_CACHE_FILE and compute WARM_PREFIXES, or queue them with ASYNC_PREFILL_QUEUE.

    A file that cannot be used costs a line for the user: the engine starts without it, and one of another
    model or other settings is replaced at the end.

    Args:
        core: not running yet.
        index: of the engine, which has a file of its own.

    Raises:
        InvalidValueError: a warm prefix that is empty or too long, or a file that could not be saved.
    """
    path = cache_file(settings, index)
    if path is not None:
        if not core.info.shares_prefixes:
            allowed = "unset for this model, which is served with one cache per request"
            raise InvalidValueError("PREFIX_CACHE_FILE", str(path), allowed)
        core.saved_cache = path
        if path.exists():
            try:
                notify(f"The prefix cache begins with {core.cache.load(path)} tokens of {path}.")
            except CacheFileError as error:
                notify(f"{error} The prefix cache begins empty.")
    for ids in warm_prefixes(tokenizer, settings):
        try:
            core.insert_prefix(ids)
        except InvalidValueError as error:
            raise InvalidValueError("A prefix of WARM_PREFIXES", error.value, error.allowed) from None
    if not settings.async_prefill_queue:
        while core.has_work:
            core.step()
        if core.warming.failed:
            notify(f"{core.warming.failed} of {core.warming.total} warm prefixes had no room in the cache.")


def warm_prefixes(tokenizer: Tokenizer, settings: Settings) -> list[list[int]]:
    """The ids of WARM_PREFIXES.

    Raises:
        InvalidValueError: one of them is empty, or the prefix cache is off.
    """
    if settings.warm_prefixes is None:
        return []
    if not settings.prefix_cache:
        raise InvalidValueError("WARM_PREFIXES", settings.warm_prefixes, "unset where PREFIX_CACHE is off")
    texts = settings.warm_prefixes.split(SEPARATOR)
    if not all(text.strip() for text in texts):
        allowed = f"texts with {SEPARATOR} between, none of them empty"
        raise InvalidValueError("WARM_PREFIXES", settings.warm_prefixes, allowed)
    return [tokenizer.encode(text) for text in texts]


def cache_file(settings: Settings, index: int) -> Path | None:
    """The file of engine ``index``: ``cache.safetensors``, then ``cache.1.safetensors``, and so on.

    Raises:
        InvalidValueError: its folder is none that can be written to.
    """
    path = settings.prefix_cache_file
    if path is None:
        return None
    path = path.expanduser()
    if not settings.prefix_cache:
        raise InvalidValueError("PREFIX_CACHE_FILE", str(path), "unset where PREFIX_CACHE is off")
    if path.is_dir() or not os.access(path.parent, os.W_OK | os.X_OK):
        raise InvalidValueError("PREFIX_CACHE_FILE", str(path), "a file in a folder that can be written to")
    return path if index == 0 else path.with_name(f"{path.stem}.{index}{path.suffix}")
