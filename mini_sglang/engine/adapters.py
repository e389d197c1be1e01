"""The LoRA adapters of one engine: which are loaded, and who uses them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable
from typing import Protocol

from mini_sglang.errors import InvalidValueError
from mini_sglang.types import Adapter

logger = logging.getLogger(__name__)


class AdapterStore(Protocol):
    """Where a backend that takes adapters keeps them: its attribute ``adapters``."""

    def read(self, adapter: Adapter) -> object:
        """Read and check an adapter for ``attach``; any thread may call it."""

    def attach(self, prepared: object) -> int:
        """Its id in steps, at least 1. Raises InvalidValueError where there is no room."""

    def detach(self, adapter_id: int) -> None:
        """Free it: no step names it any more."""


class NoAdapterError(InvalidValueError):
    """An engine has not the adapter that a request names."""


class LoadedAdapters:
    """The adapters of one engine. Its thread alone uses it, but for ``read``.

    One that is unloaded while requests run with it goes with the last of them.

    Args:
        quiet: called before ``store`` changes: it waits until no step is under way.
    """

    def __init__(self, store: AdapterStore | None, quiet: Callable[[], None] = lambda: None) -> None:
        self._store = store
        self._quiet = quiet
        self._ids: dict[str, int] = {}
        self._users: Counter[str] = Counter()
        self._leaving: set[str] = set()

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, adapter: Adapter) -> object:
        """What ``attach`` takes.

        Raises:
            ModelLoadError: it is damaged, or made for another model.
            InvalidValueError: it asks for what is not supported, or the model takes no adapters.
        """
        if self._store is None:
            allowed = "left out: adapters work with the natively served model families only"
            raise InvalidValueError("lora", adapter.name, allowed)
        return self._store.read(adapter)

    def attach(self, adapter: Adapter, prepared: object) -> None:
        """Have requests that name it run with it. Raises InvalidValueError where there is no room."""
        assert self._store is not None
        self._leaving.discard(adapter.key)
        if adapter.key not in self._ids:
            self._quiet()
            self._ids[adapter.key] = self._store.attach(prepared)
            logger.info("loaded adapter=%s fingerprint=%.12s", adapter.name, adapter.fingerprint)

    def load(self, adapter: Adapter) -> None:
        """``read`` and ``attach``, in the engine's thread."""
        if adapter.key not in self._ids:
            self.attach(adapter, self.read(adapter))

    def unload(self, key: str) -> None:
        """Take no more requests with it. Does nothing where it is not loaded."""
        if key in self._ids:
            self._leaving.add(key)
            self._free(key)

    def enter(self, key: str) -> int:
        """The id for a new request; ``leave`` must follow.

        Raises:
            NoAdapterError: it is not loaded.
        """
        if not key:
            return 0
        if key not in self._ids or key in self._leaving:
            raise NoAdapterError("lora", Adapter.name_in(key), "an adapter that this engine has loaded")
        self._users[key] += 1
        return self._ids[key]

    def leave(self, key: str) -> None:
        """A request with it has ended."""
        if key:
            self._users[key] -= 1
            self._free(key)

    def _free(self, key: str) -> None:
        if key in self._leaving and not self._users[key]:
            assert self._store is not None
            self._leaving.discard(key)
            del self._users[key]
            self._quiet()
            self._store.detach(self._ids.pop(key))
            logger.info("unloaded adapter=%s", Adapter.name_in(key))
