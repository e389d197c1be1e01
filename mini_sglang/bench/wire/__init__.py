"""What servers speak: how each is asked over HTTP, and what its stream says."""

from mini_sglang.bench.wire.base import Ask, Dialect, Event, WireError
from mini_sglang.bench.wire.dialects import DIALECTS, dialect

__all__ = ["DIALECTS", "Ask", "Dialect", "Event", "WireError", "dialect"]
