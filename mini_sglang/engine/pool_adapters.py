"""The LoRA adapters of a pool's engines: each has every one."""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future

from mini_sglang.engine.handle import EngineHandle
from mini_sglang.engine.slots import EngineSlots
from mini_sglang.errors import EngineError, InvalidValueError, MiniSglangError, UnavailableError
from mini_sglang.types import Adapter

logger = logging.getLogger(__name__)

_LOAD_SECONDS = 300.0


class PoolAdapters:
    """The adapters of all engines of a pool.

    Every engine has every one, so that any may serve any request. ``load``, ``unload``, ``find`` and ``all``
    are for any thread; the rest is the pool's, under its lock.

    Args:
        lock: the pool's.
        capacity: adapters at a time.
    """

    def __init__(self, lock: threading.Lock, slots: EngineSlots, capacity: int) -> None:
        self._lock = lock
        self._slots = slots
        self._capacity = capacity
        self._changing = threading.Lock()  # one load at a time
        self._loaded: dict[str, Adapter] = {}  # by name
        # By key: what engines have, or are being given, without its name being taken.
        self._loading: dict[str, Adapter] = {}
        self._leaving: dict[str, Adapter] = {}
        self._users: Counter[str] = Counter()

    def find(self, name: str) -> Adapter | None:
        return self._loaded.get(name)

    def all(self) -> Sequence[Adapter]:
        """In the order in which they were loaded."""
        return tuple(self._loaded.values())

    def load(self, adapter: Adapter) -> None:
        """Load an adapter into every engine, or into none; engines that start later load it too.

        Raises:
            InvalidValueError: its name is taken, there is no room, or it asks for what is not supported.
            ModelLoadError: it is damaged, or made for another model.
            UnavailableError: no engine is ready.
        """
        with self._changing:
            with self._lock:
                handles = self._begin(adapter)
            failure: MiniSglangError | None = None
            loaded = 0
            for future in [handle.load_adapter(adapter) for handle in handles]:
                try:
                    future.result(_LOAD_SECONDS)
                    loaded += 1
                except EngineError as error:
                    # It is started again and then loads what there is by then.
                    logger.warning("an engine ended while it loaded adapter %s: %s", adapter.name, error)
                except TimeoutError:
                    failure = EngineError(f"An engine did not load the adapter within {_LOAD_SECONDS:g} s.")
                except MiniSglangError as error:
                    failure = error
                except Exception as error:
                    logger.exception("adapter %s was not loaded", adapter.name)
                    failure = EngineError(f"The adapter was not loaded: {error!r:.200}")
            if failure is None and not loaded:
                failure = UnavailableError("No engine is ready to load the adapter.", retry_after=5.0)
            with self._lock:
                del self._loading[adapter.key]
                if failure is None:
                    self._loaded[adapter.name] = adapter
                    return
                self._unload_everywhere(adapter.key)
            raise failure

    def unload(self, name: str) -> int:
        """Take an adapter's name away; its requests go on to their end, and the last takes it along.

        Returns how many there are.

        Raises:
            InvalidValueError: there is no adapter of that name.
        """
        with self._lock:
            adapter = self._loaded.pop(name, None)
            if adapter is None:
                known = ", ".join(self._loaded) or "there is none"
                raise InvalidValueError("lora_name", name, f"the name of a loaded adapter ({known})")
            self._leaving[adapter.key] = adapter
            users = self._users[adapter.key]
            self._free(adapter.key)
            return users

    def enter(self, key: str) -> None:
        """A request takes its place. Raises InvalidValueError where its adapter was unloaded since."""
        if not key:
            return
        adapter = self._loaded.get(Adapter.name_in(key))
        if adapter is None or adapter.key != key:
            raise InvalidValueError("lora", Adapter.name_in(key), "an adapter that is loaded still")
        self._users[key] += 1

    def leave(self, key: str) -> None:
        """A request has ended."""
        if key:
            self._users[key] -= 1
            self._free(key)

    def opened(self, handle: EngineHandle) -> None:
        """An engine is newly ready: it loads what there is before any request reaches it."""
        for adapter in (*self._loaded.values(), *self._loading.values(), *self._leaving.values()):
            handle.load_adapter(adapter, at_once=True).add_done_callback(_tell_failure)

    def _begin(self, adapter: Adapter) -> list[EngineHandle]:
        if adapter.name in self._loaded:
            allowed = "a name that no loaded adapter has; that one must be unloaded first"
            raise InvalidValueError("lora_name", adapter.name, allowed)
        self._leaving.pop(adapter.key, None)
        if len(self._loaded) + len(self._leaving) >= self._capacity:
            allowed = f"loaded when there is room: there are {self._capacity} adapters already (MAX_LORAS)"
            raise InvalidValueError("lora_name", adapter.name, allowed)
        self._loading[adapter.key] = adapter
        return [slot.handle for slot in self._slots if slot.usable and slot.handle is not None]

    def _free(self, key: str) -> None:
        if not self._users[key]:
            del self._users[key]
            if self._leaving.pop(key, None) is not None:
                self._unload_everywhere(key)

    def _unload_everywhere(self, key: str) -> None:
        for slot in self._slots:
            if slot.opened and slot.handle is not None:
                slot.handle.unload_adapter(key)


def _tell_failure(future: Future[None]) -> None:
    error = future.exception()
    if error is not None:
        logger.error("an engine goes on without an adapter: %s", error)
