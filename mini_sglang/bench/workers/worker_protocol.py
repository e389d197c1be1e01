"""The worker's end: an engine in a process of its own, asked over a pipe.

Standard library only: each worker runs as a script, by the interpreter of its engine's own environment.

The process is started with one argument, its options as a JSON object. Once it has loaded it writes
``{"about": …}``: ``versions``, and ``notes``, sentences that belong beside its figures. Then it answers each
line of its input with one line: ``{"ids": [[…], …], "new": n, "cold": true}`` with what ``Answer`` has,
``cpu_seconds`` and ``peak_bytes``, which are those of the process and of all it started. ``"do"`` names
another method than ``run``. A request that fails is answered with ``{"error": …}``. Between requests the
process waits in a read.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Ids = list[list[int]]
PR_SET_PDEATHSIG = 1


@dataclasses.dataclass
class Answer:
    """``ids``: the new ids of each prompt. ``seconds``: from the request to the last id of all.

    ``first``: seconds to the first id, where the engine shows it. ``firsts`` and ``ends``: the same of each
    prompt, where it was asked for. ``times``: of each prompt, seconds from the request to each of its ids as
    the engine hands them over (ids that come together have one time); None where it only shows the end.
    """

    ids: Ids
    seconds: float
    first: float | None = None
    firsts: list[float] | None = None
    ends: list[float] | None = None
    times: list[list[float]] | None = None


class Stream:
    """Gathers ids as an engine hands them over, and when; its clock starts as it is made.

    Args:
        prompts: how many answers there are.
    """

    def __init__(self, prompts: int) -> None:
        self.ids: Ids = [[] for _ in range(prompts)]
        self.times: list[list[float]] = [[] for _ in range(prompts)]
        self.start = time.perf_counter()

    def add(self, prompt: int, ids: list[int]) -> None:
        """More ids of an answer, which have come now."""
        self.ids[prompt] += ids
        self.times[prompt] += [time.perf_counter() - self.start] * len(ids)

    def answer(self) -> Answer:
        """What came, until now."""
        seconds = time.perf_counter() - self.start
        firsts = [times[0] for times in self.times if times]
        ends = [times[-1] for times in self.times if times]
        return Answer(self.ids, seconds, min(firsts, default=None), firsts, ends, self.times)


class Engine(Protocol):
    """``about`` says what runs."""

    about: dict[str, Any]

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        """Greedy answers of ``new`` ids each, end-of-text ignored; ``cold`` forgets every prefix before."""
        ...


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Load an engine with the options given and answer requests until the input ends."""
    end_with_parent()
    out = os.fdopen(os.dup(1), "w", buffering=1)
    # What a library prints must not be taken for an answer.
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps({**reply, "peak_bytes": peak_bytes()}, default=str) + "\n")

    engine = load(json.loads(sys.argv[1]))
    say({"about": engine.about})
    for line in sys.stdin:
        request = json.loads(line)
        cpu = cpu_seconds()
        try:
            answer = getattr(engine, request.pop("do", "run"))(**request)
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            continue
        reply = dataclasses.asdict(answer) if isinstance(answer, Answer) else {"answer": answer}
        say({**reply, "cpu_seconds": cpu_seconds() - cpu})
    # What would keep the process from ending, where there is such a thing.
    getattr(engine, "close", lambda: None)()


def end_with_parent() -> None:
    """On Linux: a process that is held still does not see its input end when its parent is killed."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def tree() -> list[int]:
    """The ids of this process and of those that descend from it; only its own where there is no /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        # The name in the second field may hold anything, a parenthesis too.
        with contextlib.suppress(OSError, ValueError, IndexError):
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
    found = [os.getpid()]
    for parent in found:
        found += [pid for pid, its_parent in parents.items() if its_parent == parent]
    return found


def cpu_seconds() -> float:
    """What this process and those it started have worked so far."""
    total = time.process_time() + sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    ticks = os.sysconf("SC_CLK_TCK")
    for pid in tree()[1:]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += sum(map(int, fields[11:15])) / ticks
    return total


def peak_bytes() -> int:
    """The most memory that this process, and each of those it started, has had resident."""
    peaks = [peak for pid in tree() if (peak := peak_of(pid))]
    if peaks:
        return sum(peaks)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def peak_of(pid: int) -> int:
    """The most memory a process has had resident, in bytes; 0 where nothing says so."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
