"""What a process takes together with those it has begun, and how to hold them still."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import psutil


class Usage:
    """A process and its descendants, as they are at each call. One that has ended counts for nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu_seconds(self) -> float:
        """Worked so far, by descendants that have ended too."""
        total = 0.0
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
                # Of those waited for; absent on some systems.
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return total

    def peak_bytes(self) -> int:
        """The most memory each has had resident, added up; what they share is in it once for each."""
        return sum(_peak(process) for process in self._all())

    def hold(self) -> None:
        """Stop them all where they are; one that waits by spinning would slow down who is measured."""
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        for process in self._all():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def _all(self) -> Iterator[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            yield from (process, *process.children(recursive=True))


def _peak(process: psutil.Process) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0
