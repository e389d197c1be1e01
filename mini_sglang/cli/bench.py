"""``mini-sglang bench VERB …``: each verb is a module that is imported when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from typing import Any, cast

from mini_sglang.cli.terminal import OutputClosedError, Terminal, point_at_nothing

VERBS = {
    "peers": (
        "mini_sglang.bench.peers.cli",
        "list the stacks that can be compared with, and how to get each",
    ),
    "install": ("mini_sglang.bench.peers.install_cli", "make a peer's own environment"),
    "serve": ("mini_sglang.bench.load.serve_cli", "put load on a server and measure what it takes"),
    "sweep": ("mini_sglang.bench.load.sweep_cli", "the same over rates, until the server is full"),
    "kernels": ("mini_sglang.bench.kernels", "time the CPU kernels beside what the machine can do"),
    "report": ("mini_sglang.bench.report.cli", "make an HTML page and pictures from JSON files"),
}
"""The module of each verb, whose ``main(argv) -> int`` does it, and what it does."""


def add_options(parser: Any) -> None:
    """``verb`` and ``rest``, everything that stands after it."""
    parser.add_argument("verb", choices=VERBS, metavar="VERB", help=argparse.SUPPRESS)
    # With REMAINDER what follows the verb is its own, --help too.
    parser.add_argument("rest", nargs="...", metavar="options", help=argparse.SUPPRESS)


def description() -> str:
    width = max(map(len, VERBS))
    verbs = "\n".join(f"  {verb:<{width}}  {does}" for verb, (_, does) in VERBS.items())
    return (
        f"Compare with other stacks, and measure.\n\n{verbs}\n\n"
        "`mini-sglang bench VERB --help` lists a verb's options."
    )


def run(options: Namespace, terminal: Terminal, open_engine: object) -> int:
    """Do what the verb says; returns its exit status.

    Raises:
        MiniSglangError: whatever it refuses.
        OutputClosedError: the reader of standard output has gone away.
    """
    main = cast("Callable[[Sequence[str]], int]", importlib.import_module(VERBS[options.verb][0]).main)
    try:
        status = main(options.rest)
        sys.stdout.flush()
        return status
    except SystemExit as done:
        terminal.write("")
        return int(done.code or 0)
    except BrokenPipeError:
        point_at_nothing(sys.stdout)
        raise OutputClosedError from None
