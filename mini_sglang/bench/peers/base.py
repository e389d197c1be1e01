"""What a peer is to the benchmarks: a few facts. To add one, add its ``Peer`` and, if need be, a worker."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Launch:
    """How a peer's server is started on the loopback.

    Attributes:
        command: from the interpreter, model path, port and threads to the argument list.
        env: variables from the number of threads, beside those of this process.
        ready: the path that answers 200 once requests are taken.
        seconds: how long the start may take.
    """

    command: Callable[[str, Path, int, int], list[str]]
    env: Callable[[int], Mapping[str, str]] = lambda threads: {"OMP_NUM_THREADS": str(threads)}
    ready: str = "/health"
    seconds: float = 300.0


@dataclass(frozen=True)
class Recipe:
    """How ``mini-sglang bench install`` makes a peer's environment.

    Attributes:
        steps: arguments of ``pip install`` one call after the other; empty where it needs nothing more.
        module: what must be importable at the end.
        variables: for pip, where this process has none of that name.
        finish: mends what pip leaves wrong, given the environment's site-packages; says what it did.
        note: what is unusual about it, in one sentence; shown by ``bench peers`` and under results.
        disk_gb: the space it takes, pip's own passing files included.
        python: the oldest and the newest minor version of CPython 3 that its wheels are for.
    """

    steps: tuple[tuple[str, ...], ...]
    module: str = ""
    variables: Mapping[str, str] = field(default_factory=dict)
    finish: Callable[[Path], list[str]] | None = None
    note: str = ""
    disk_gb: float = 1.0
    python: tuple[int, int] = (10, 14)


@dataclass(frozen=True)
class Peer:
    """One stack.

    Attributes:
        name: on the command line, ``--peers sglang,llama``.
        title: in tables.
        distribution: whose installed version is reported; None for one that is only reached by URL.
        weights: ``folder`` (safetensors, in the dtype asked for), ``gguf`` (the file as it is), or ``any``.
        worker: ``sglang`` for ``workers/run_sglang.py``; None where it only runs as a server.
        options: of the worker, beside model, threads, dtype, requests, tokens and prefix_cache.
        launch: how its server is started; None where it has none, or only a URL reaches it.
        wire: the name of the dialect its server speaks, see ``bench/wire.py``.
        recipe: None where there is nothing to install.
        environment: the peer whose environment it shares; by default it has its own.
        runs_here: a sentence why it cannot run on this machine, or None where it may.
    """

    name: str
    title: str
    distribution: str | None
    weights: str
    worker: str | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    launch: Launch | None = None
    wire: str = "openai"
    recipe: Recipe | None = None
    environment: str = ""
    runs_here: Callable[[], str | None] = lambda: None
