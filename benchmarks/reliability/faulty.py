"""``mini-sglang`` whose engines' processes fail when they are told to.

    RELIABILITY_FAULT=FILE python -m benchmarks.reliability.faulty serve …

Everything else is the command as it is. An engine looks for the file before each step; see ``Fault``.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.engine.wire import Setup

VARIABLE = "RELIABILITY_FAULT"


@dataclass(frozen=True, slots=True)
class Fault:
    """What goes wrong, and when.

    Attributes:
        kind: "raise", "memory" (torch's own out-of-memory error), "host memory" or "hang"; "broken" raises in
            this step and every later one of the same process.
        step: the step it happens in; 1 is the first one after the engine has seen this.
        engine: which engine.
        stays: for every process of this engine that starts while the file is there, and not once.
    """

    kind: str
    step: int = 1
    engine: int = 0
    stays: bool = False

    def put(self, file: Path) -> None:
        """Have it happen."""
        part = file.with_suffix(".part")
        part.write_text(json.dumps(asdict(self)))
        part.replace(file)


class FaultyBackend:
    """A backend in front of the real one."""

    def __init__(self, backend: Any, index: int) -> None:
        self._backend = backend
        self._index = index
        self._file = Path(os.environ[VARIABLE])
        self._fault: Fault | None = None
        self._left = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._backend, name)

    def run(self, steps: Sequence[Any]) -> Any:
        if self._fault is None and self._file.exists():
            fault = Fault(**json.loads(self._file.read_text()))
            if fault.engine == self._index:
                self._fault, self._left = fault, fault.step
                if not fault.stays:
                    self._file.unlink()
        if self._fault is not None:
            self._left -= 1
            if self._left <= 0:
                self._happen(self._fault)
        return self._backend.run(steps)

    def _happen(self, fault: Fault) -> None:
        import torch

        if fault.kind == "hang":
            time.sleep(3600)
        if fault.kind != "broken":
            self._fault = None
        if fault.kind in ("memory", "host memory"):
            from mini_sglang.backend.memory import says_out_of_memory

            # As the backend behind this one would say it.
            torchs = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
            says_out_of_memory()(FaultyBackend._raise)(
                self, torchs if fault.kind == "memory" else MemoryError()
            )
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    def _raise(self, error: Exception) -> None:
        raise error


def make_core(settings: Settings, setup: Setup, notify: Callable[[str], None]) -> EngineCore:
    """What the engine's process loads."""
    from mini_sglang.api import starting

    core = starting.make_core(settings, setup, notify)
    core._backend = core.recovery._backend = FaultyBackend(core._backend, setup.index)
    return core


def main() -> int:
    from mini_sglang import cli
    from mini_sglang.api import starting

    starting.CHILD = "benchmarks.reliability.faulty:make_core"
    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
