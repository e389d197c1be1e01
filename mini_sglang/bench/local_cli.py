"""The command line of ``local_bench.py``."""

from __future__ import annotations

import shutil
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from mini_sglang.bench.local import Bench, Plan, record, report, status
from mini_sglang.bench.machine import usable_cores
from mini_sglang.bench.models import find_bench_model
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers, chosen_peers
from mini_sglang.bench.sides import OURS
from mini_sglang.cli import app
from mini_sglang.cli.args import Parser, check_text
from mini_sglang.cli.face import EngineFace
from mini_sglang.cli.terminal import Terminal
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

DEFAULT_PEERS = "sglang,hf"
SUITE_NEW, PROMPT_NEW = 512, 64


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 where ours ran and counts, 1 where it does not, 2 for what is refused."""
    parser = Parser(
        prog="local_bench.py",
        usage="python local_bench.py [options] [PROMPT]",
        description="The real sglang, Hugging Face and others beside mini-sglang, each in a process of its "
        "own, on the same model, dtype, token ids and counts. Without a prompt: 3 turns of one conversation.",
    )
    add_options(parser, new=f"{SUITE_NEW} by default, {PROMPT_NEW} with a prompt", peers=DEFAULT_PEERS)
    return app.run(parser, argv, None, lambda options: _run)


def add_options(parser: Parser, *, new: str, peers: str) -> None:
    """What ``server_bench.py`` takes too; ``new`` and ``peers`` tell the defaults."""
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="one chat turn, in place of the three")
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="N",
        help=f"new tokens of each answer, exactly; {new}",
    )
    parser.add_argument(
        "--model", help="a repository, folder or .gguf file; what the engine takes by default"
    )
    parser.add_argument(
        "--peers",
        default=peers,
        metavar="A,B",
        help=f"whom to compare with, or all; {peers} by default; `mini-sglang bench peers` lists",
    )
    parser.add_argument("--rounds", type=int, default=3, metavar="R", help="measured rounds; 3 by default")
    parser.add_argument(
        "--dtype",
        choices=("bf16", "fp32"),
        default="bf16",
        help="of peers that read a folder; bf16 by default. Those that read GGUF take the file as it is",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="CPU threads of each; all by default")
    parser.add_argument(
        "--no-reference", action="store_true", help="do not let float32 transformers judge the ids"
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="how long an answer may take; by default 120 + 5 a token",
    )
    parser.add_argument(
        "--wait", type=float, default=0.0, metavar="SECONDS", help="before each answer, for a quiet machine"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="every single run, with all that it takes to check"
    )


def _run(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    settings = Settings.resolve({"model": options.model} if options.model is not None else {})
    plan = plan_of(options, settings, _peers(options.peers))

    def notify(line: str) -> None:
        if terminal.errors_are_terminal:
            terminal.notice(line)

    model = find_bench_model(settings, notify)
    with progress() as step:
        outcome = Bench(plan, model, settings, step).run()
    terminal.write("\n".join(report(plan, model, outcome)) + "\n")
    if options.json is not None:
        record(plan, model, outcome).write(options.json)
    return status(outcome.rows)


def plan_of(options: Namespace, settings: Settings, peers: Sequence[Peer]) -> Plan:
    """The options, checked before anything is started.

    Raises:
        InvalidValueError: a value that is not allowed.
        PeerError: a name that no peer has.
    """
    prompt = options.prompt
    if prompt is not None:
        if not prompt.strip():
            raise InvalidValueError("prompt", prompt, "a text that is not empty")
        prompt = check_text("prompt", prompt)
    new = options.max_new_tokens
    if new is None:
        new = SUITE_NEW if prompt is None else PROMPT_NEW
    if new < 2:
        raise InvalidValueError(
            "max_new_tokens", new, "at least 2, so that there is a time between two of them"
        )
    if options.rounds < 1:
        raise InvalidValueError("rounds", options.rounds, "at least 1")
    cores = usable_cores()
    threads = options.threads if options.threads is not None else settings.num_threads or cores
    if not 1 <= threads <= cores:
        raise InvalidValueError("threads", threads, f"from 1 to {cores}, the cores that this process may use")
    for name, low in (("limit", 1.0), ("wait", 0.0)):
        value = getattr(options, name)
        # Not a number compares as false.
        if value is not None and not low <= value <= 86400:
            raise InvalidValueError(name, value, f"from {low:g} to 86400 seconds")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise InvalidValueError("json", str(options.json), "a file in a folder that exists")
    return Plan(
        prompt=prompt,
        new=new,
        rounds=options.rounds,
        dtype=options.dtype,
        threads=threads,
        peers=peers,
        reference=not options.no_reference,
        limit=options.limit or 120 + 5.0 * new,
        wait=options.wait,
    )


def _peers(text: str) -> list[Peer]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidValueError("peers", text, "names of peers with commas between, or all")
    if names == ["all"]:
        return [peer for peer in all_peers().values() if peer.worker is not None]
    names = [OURS if name == "mini-sglang" else name for name in names]
    return chosen_peers(list(dict.fromkeys(names)))


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on stderr that says what runs and for how long; nothing where that is no terminal."""
    if not sys.stderr.isatty():
        yield lambda line: None
        return
    from tqdm import tqdm

    # A terminal that does not tell its size says 0, for which tqdm would draw nothing.
    columns = shutil.get_terminal_size().columns
    line = "{desc} [{elapsed}]"
    with tqdm(file=sys.stderr, leave=False, bar_format=line, ncols=columns, nrows=2) as bar:

        def step(what: str) -> None:
            bar.set_description_str(what)

        yield step
