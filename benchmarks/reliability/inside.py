"""``mini-sglang`` with a probe: at SIGUSR2 it writes down what the HTTP process holds.

    python -m benchmarks.reliability.inside FILE serve …

Everything else is the command as it is. The counts are of what no metric shows: asyncio tasks, requests that
the HTTP floor and the pool still know, connections in a request, threads beside those of bounded pools.
"""

from __future__ import annotations

import asyncio
import gc
import json
import signal
import sys
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from mini_sglang.api.connections import Connections
from mini_sglang.api.served import ServedStream
from mini_sglang.api.service import Service
from mini_sglang.cli import main
from mini_sglang.engine.flights import Flight

# Starts a process that tries grammars and ends; as the timers of those do, it comes and goes.
HELPER = "mini-sglang-grammar-helper"
# Pools of threads that grow to their bound when they are first needed, and stay.
POOLS = ("mini-sglang-text", "mini-sglang-grammars", "asyncio_")


def count() -> dict[str, int]:
    """What there is now, after a collection, so that nothing counts that only waits for one."""
    gc.collect()
    found = gc.get_objects()
    kinds: dict[str, type[Any]] = {"streams": ServedStream, "flights": Flight, "tasks": asyncio.Task}
    counts = {
        name: sum(1 for one in found if type(one) is kind and not (kind is asyncio.Task and one.done()))
        for name, kind in kinds.items()
    }
    counts["services"] = sum(type(one) is Service for one in found)
    counts["in_flight"] = sum(one.in_flight for one in found if type(one) is Service)
    counts["connections"] = sum(len(one) for one in found if type(one) is Connections)
    threads = threading.enumerate()
    counts["workers"] = sum(one.name.startswith(POOLS) for one in threads)
    counts["passing"] = sum(isinstance(one, threading.Timer) or one.name == HELPER for one in threads)
    counts["threads"] = len(threads) - counts["workers"] - counts["passing"]
    counts["objects"] = len(found)
    return counts


def install(target: Path) -> None:
    def write(number: int, frame: FrameType | None) -> None:
        part = target.with_suffix(".part")
        part.write_text(json.dumps(count()))
        part.replace(target)

    signal.signal(signal.SIGUSR2, write)


if __name__ == "__main__":
    install(Path(sys.argv.pop(1)))
    sys.exit(main())
