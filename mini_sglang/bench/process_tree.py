"""A process together with those it has begun: what they take, holding them still, ending them."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import psutil


class ProcessTree:
    """A process and its descendants, as they are at each call. One that has ended counts for nothing."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def cpu_seconds(self) -> float:
        """Worked so far, by descendants that have ended too."""
        total = 0.0
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
                # Of those waited for; absent on some systems.
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return total

    def peak_bytes(self) -> int:
        """The most memory each has had resident, added up; what they share is in it once for each."""
        return sum(_peak(process) for process in self.members())

    def hold(self) -> None:
        """Stop them all where they are; one that waits by spinning would slow down who is measured."""
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.suspend()

    def resume(self) -> None:
        for process in self.members():
            with contextlib.suppress(psutil.Error):
                process.resume()

    def kill(self, also: Iterable[psutil.Process] = ()) -> None:
        """End them at once, and what is left of the process group that it leads, and ``also``.

        Args:
            also: ``members`` of earlier; one whose parent has ended since is not found any more.
        """
        members = [*self.members(), *also]
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.pid, signal.SIGKILL)
        for process in members:
            # By object: psutil knows a number that the system gave to another process since.
            with contextlib.suppress(psutil.Error):
                process.kill()

    def members(self) -> list[psutil.Process]:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(self.pid)
            return [process, *process.children(recursive=True)]
        return []


def _peak(process: psutil.Process) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        for line in Path(f"/proc/{process.pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    with contextlib.suppress(psutil.Error):
        return int(process.memory_info().rss)
    return 0
