"""The command line that ``bench serve`` and ``bench sweep`` have in common."""

from __future__ import annotations

import json
import math
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_sglang.bench.load.datasets import (
    KINDS,
    Lengths,
    Session,
    Shape,
    ids_below,
    made,
    words,
)
from mini_sglang.bench.load.figures import goals
from mini_sglang.bench.load.files import read_sessions
from mini_sglang.bench.wire.base import Dialect
from mini_sglang.bench.wire.dialects import DIALECTS
from mini_sglang.cli.args import Parser
from mini_sglang.errors import InvalidValueError

VOCAB = 8192
MOST_TOKENS = 1 << 24
MOST_REQUESTS = 1 << 24


def add_options(parser: Parser) -> None:
    """Server, dataset and request; how fast is each command's own."""
    server = parser.add_argument_group("the server")
    server.add_argument(
        "--url", help="of the server or its endpoint; without it mini-sglang serve is started, and ended"
    )
    server.add_argument(
        "--dialect", default="auto", help=f"what it speaks: auto (the default), {', '.join(DIALECTS)}"
    )
    server.add_argument("--model", help="the name to ask for; for a server started here, what it serves")
    server.add_argument("--api-key", metavar="KEY", help="sent as a bearer token")
    server.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of one answer; 600")
    server.add_argument(
        "--no-keep-alive", action="store_true", help="a connection of its own for each request"
    )
    data = parser.add_argument_group("the dataset")
    data.add_argument(
        "--dataset",
        default="random",
        metavar="D",
        help=f"{', '.join(KINDS)}, a .jsonl file, or ShareGPT's .json; random by default",
    )
    data.add_argument("--input-len", default="256", metavar="N[:M]", help="tokens of a prompt; 256")
    data.add_argument("--output-len", default="128", metavar="N[:M]", help="new tokens; 128")
    data.add_argument(
        "--range-ratio", type=float, metavar="R", help="lengths of one number N are from R*N to N; 1"
    )
    data.add_argument("--prefix-len", type=int, default=512, metavar="N", help="of shared-prefix; 512")
    data.add_argument("--prefixes", type=int, default=1, metavar="N", help="how many of them; 1")
    data.add_argument("--distinct", type=int, default=1, metavar="N", help="prompts of repeat; 1")
    data.add_argument(
        "--turns", type=int, default=3, metavar="N", help="of a multi-turn session or conversation; 3"
    )
    data.add_argument("--think", type=float, default=0.0, metavar="S", help="seconds between turns; 0")
    data.add_argument(
        "--vocab", type=int, default=VOCAB, metavar="N", help=f"prompts are ids below N; {VOCAB}"
    )
    data.add_argument("--seed", type=int, default=0, help="of prompts and arrivals; 0")
    asked = parser.add_argument_group("each request")
    asked.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0, greedy, by default")
    asked.add_argument("--sampling-seed", type=int, metavar="N", help="of each request's sampling")
    asked.add_argument("--priority", type=int, metavar="N", help="of each request, where the server has one")
    asked.add_argument("--stop-at-eos", action="store_true", help="let answers end early, where they do")
    asked.add_argument("--extra", metavar="JSON", help="an object of further fields of the body")
    parser.add_argument(
        "--goodput",
        metavar="GOALS",
        help="count answers that are in time, in ms: ttft:500,tpot:50,e2e:5000",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="every request, and what it takes to check")


@dataclass(frozen=True)
class Work:
    """What is asked of a server, checked; the options' values in ``settings`` for the record."""

    dataset: str
    shape: Shape
    vocab: int
    seed: int
    asked: Mapping[str, Any]
    goals: Mapping[str, float] | None

    def form(self, dialect: Dialect) -> str:
        """In which form prompts are given: ids where that allows exact lengths and real history."""
        several = self.shape.turns > 1 and self.dataset not in ("random", "shared-prefix", "repeat")
        if "messages" in dialect.takes[:1]:
            return "messages"
        if self.is_file or (several and not dialect.gives_ids) or "ids" not in dialect.takes:
            return "text"
        return "ids"

    @property
    def is_file(self) -> bool:
        return self.dataset not in KINDS

    @property
    def turns(self) -> int:
        """Requests of a made session."""
        return self.shape.turns if self.dataset == "multi-turn" else 1

    def sessions(self, form: str, seed: int | None = None) -> Iterator[Session]:
        """Endless sessions.

        Raises:
            InvalidValueError, MiniSglangError: of a dataset that is none.
        """
        seed = self.seed if seed is None else seed
        if self.is_file:
            lengths = self.shape.lengths
            return read_sessions(
                Path(self.dataset),
                lengths.output,
                self.shape.turns,
                self.shape.think,
                seed,
                form=form,
            )
        make = ids_below(self.vocab) if form == "ids" else words
        return made(self.dataset, self.shape, make, seed)


def checked(options: Namespace) -> Work:
    """The dataset and request of the command line.

    Raises:
        InvalidValueError: a value that is not allowed.
    """
    for name, low, high in (
        ("prefix_len", 1, MOST_TOKENS),
        ("prefixes", 1, 65536),
        ("distinct", 1, 65536),
        ("turns", 1, 1000),
        ("vocab", 2, 1 << 31),
    ):
        value = getattr(options, name)
        if not low <= value <= high:
            raise InvalidValueError(f"--{name.replace('_', '-')}", value, f"from {low} to {high}")
    for name, limit in (("think", 86400.0), ("timeout", 86400.0), ("temperature", 2.0)):
        number = getattr(options, name)
        # Not a number compares as false.
        if not 0 <= number <= limit or (name == "timeout" and number == 0):
            raise InvalidValueError(f"--{name}", number, f"from 0 to {limit:g}")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InvalidValueError("--json", str(options.json), "a file in a folder that exists")
    ratio = options.range_ratio
    if ratio is not None and not 0 < ratio <= 1:
        raise InvalidValueError("--range-ratio", ratio, "above 0 and at most 1")
    lengths = Lengths(
        span("--input-len", options.input_len, ratio),
        span("--output-len", options.output_len, ratio),
        options.prefix_len,
    )
    shape = Shape(lengths, options.prefixes, options.distinct, options.turns, options.think)
    asked = {
        "temperature": options.temperature,
        "ignore_eos": not options.stop_at_eos,
        "seed": options.sampling_seed,
        "priority": options.priority,
        "extra": _extra(options.extra),
    }
    if options.dataset not in KINDS and not options.dataset.endswith((".json", ".jsonl")):
        allowed = f"one of {', '.join(KINDS)}, or a .json or .jsonl file"
        raise InvalidValueError("--dataset", options.dataset, allowed)
    wanted = goals(options.goodput) if options.goodput is not None else None
    return Work(options.dataset, shape, options.vocab, options.seed, asked, wanted)


def span(name: str, text: str, ratio: float | None = None) -> tuple[int, int]:
    """``N`` or ``N:M`` as least and most.

    Raises:
        InvalidValueError: it is neither, or not from 1 up.
    """
    low, colon, high = text.partition(":")
    try:
        most = int(high) if colon else int(low)
        least = int(low) if colon else max(1, math.ceil(most * (ratio if ratio is not None else 1.0)))
    except ValueError:
        least, most = 0, 0
    if not 1 <= least <= most <= MOST_TOKENS:
        raise InvalidValueError(name, text, f"a number from 1 to {MOST_TOKENS}, or two with a colon between")
    return least, most


def rate(name: str, text: str) -> float:
    """Requests a second, or inf.

    Raises:
        InvalidValueError: not above 0.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise InvalidValueError(name, text, "a number above 0, or inf")
    return value


def _extra(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        found = json.loads(text)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise InvalidValueError("--extra", text, "a JSON object")
    return found
