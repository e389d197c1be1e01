"""Keeps the last responses, so that a conversation can go on with ``previous_response_id``."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import msgspec

MAX_BYTES = 64 << 20


class ResponseStore:
    """The last ``size`` responses within ``max_bytes``, the least recently used dropped first.

    It is memory of this process: a restart forgets all. Entries are bytes, so that what is kept is what is
    counted, and nobody can change it.

    Args:
        size: most responses; 0 keeps none.
        max_bytes: most bytes of all entries together.
    """

    def __init__(self, size: int, max_bytes: int = MAX_BYTES) -> None:
        self.size = size
        self._max_bytes = max_bytes
        self._entries: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._bytes = 0

    @property
    def on(self) -> bool:
        return self.size > 0

    def put(self, tenant: str, response: dict[str, Any], messages: list[dict[str, Any]]) -> None:
        """Keep a response and the conversation it ends, for this tenant only."""
        if not self.on:
            return
        entry = msgspec.msgpack.encode((response, messages))
        if len(entry) > self._max_bytes:
            return
        self._drop((tenant, response["id"]))
        self._entries[tenant, response["id"]] = entry
        self._bytes += len(entry)
        while len(self._entries) > self.size or self._bytes > self._max_bytes:
            self._drop(next(iter(self._entries)))

    def get(self, tenant: str, response_id: str) -> tuple[dict[str, Any], list[dict[str, Any]]] | None:
        """A response and its conversation; ``None`` where it was never kept, is gone, or is another's."""
        entry = self._entries.get((tenant, response_id))
        if entry is None:
            return None
        self._entries.move_to_end((tenant, response_id))
        response, messages = msgspec.msgpack.decode(entry)
        return response, messages

    def delete(self, tenant: str, response_id: str) -> bool:
        return self._drop((tenant, response_id))

    def _drop(self, key: tuple[str, str]) -> bool:
        entry = self._entries.pop(key, None)
        self._bytes -= len(entry or b"")
        return entry is not None
