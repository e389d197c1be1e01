"""The worker's end: an engine in a process of its own, asked over a pipe.

Standard library only: each worker runs as a script, by the interpreter of its engine's own environment.

The process is started with one argument, its options as a JSON object. Once it has loaded it writes
``{"about": …}``, then answers each line of its input with one line: ``{"ids": [[…], …], "new": n, "cold":
true}`` with what ``Answer`` has, ``cpu_seconds`` and ``peak_bytes``. ``"do"`` names another method than
``run``. A request that fails is answered with ``{"error": …}``, as is an engine that does not load. Between
requests the process waits in a read.
"""

from __future__ import annotations

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

Ids = list[list[int]]


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


class Engine(Protocol):
    """``about`` says what runs: ``versions``, and whatever else belongs to a figure."""

    about: dict[str, Any]

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        """Greedy answers of ``new`` ids each, end-of-text ignored; ``cold`` forgets every prefix before."""
        ...


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Load an engine with the options given and answer requests until the input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    # What a library prints must not be taken for an answer.
    os.dup2(2, 1)

    def say(reply: dict[str, Any]) -> None:
        out.write(json.dumps({**reply, "peak_bytes": peak_bytes()}, default=str) + "\n")

    engine = load(json.loads(sys.argv[1]))
    say({"about": engine.about})
    for line in sys.stdin:
        request = json.loads(line)
        cpu = time.process_time()
        try:
            answer = getattr(engine, request.pop("do", "run"))(**request)
        except Exception as error:
            say({"error": f"{type(error).__name__}: {error}"})
            continue
        reply = dataclasses.asdict(answer) if isinstance(answer, Answer) else {"answer": answer}
        say({**reply, "cpu_seconds": time.process_time() - cpu})


def peak_bytes() -> int:
    """The most memory this process has had resident."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
