"""The command line of ``server_bench.py``."""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable, Sequence

from mini_sglang.bench import local_cli
from mini_sglang.bench.local import status
from mini_sglang.bench.models import find_bench_model
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers, chosen_peers
from mini_sglang.bench.server import ServerBench, ServerPlan, record, report
from mini_sglang.bench.sides import OURS
from mini_sglang.cli import app
from mini_sglang.cli.args import Parser
from mini_sglang.cli.face import EngineFace
from mini_sglang.cli.terminal import Terminal
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

DEFAULT_PEERS = "sglang,hf-serve"
NEW, CONCURRENCY = 128, 8
URLS = {"sglang": "sglang", "vllm": "vllm", "llama": "llama-server", "ollama": "ollama"}
"""Options, as ``--vllm-url``, and the peers whose servers they name."""
_BASES = 1_000_000


def main(argv: Sequence[str] | None = None) -> int:
    """Compare and print; 0 where ours ran and counts, 1 where it does not, 2 for what is refused."""
    parser = Parser(
        prog="server_bench.py",
        usage="python server_bench.py [options] [PROMPT]",
        description="The real sglang's server, transformers serve and others beside mini-sglang over HTTP: "
        "the same model, dtype, token ids and counts, one stream of 3 chat turns and several at once. "
        "Servers are started and ended here, but for those whose URL is given.",
    )
    _add_options(parser)
    return app.run(parser, argv, None, lambda options: _run)


def _add_options(parser: Parser) -> None:
    local_cli.add_options(parser, new=f"{NEW} by default", peers=DEFAULT_PEERS)
    parser.add_argument(
        "--concurrency",
        type=int,
        default=CONCURRENCY,
        metavar="N",
        help=f"requests at once after the turns; {CONCURRENCY} by default, 0 for none",
    )
    for option, name in URLS.items():
        parser.add_argument(
            f"--{option}-url", metavar="URL", help=f"a server of {name} that runs already, with this model"
        )


def _run(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    settings = Settings.resolve({"model": options.model} if options.model is not None else {})
    plan = _plan(options, settings)

    def notify(line: str) -> None:
        if terminal.errors_are_terminal:
            terminal.notice(line)

    model = find_bench_model(settings, notify)
    with local_cli.progress() as step:
        outcome = ServerBench(plan, model, settings, step).run()
    terminal.write("\n".join(report(plan, model, outcome)) + "\n")
    if options.json is not None:
        record(plan, model, outcome).write(options.json)
    return status(outcome.rows)


def _plan(options: Namespace, settings: Settings) -> ServerPlan:
    """The options, checked before anything is started.

    Raises:
        InvalidValueError: a value that is not allowed.
        PeerError: a name that no peer has.
    """
    if options.max_new_tokens is None:
        options.max_new_tokens = NEW
    if not 0 <= options.concurrency <= 999:
        raise InvalidValueError("concurrency", options.concurrency, "from 0 to 999")
    urls = {name: getattr(options, f"{option}_url") for option, name in URLS.items()}
    urls = {name: url for name, url in urls.items() if url is not None}
    plan = local_cli.plan_of(options, settings, _peers(options.peers, list(urls)))
    return ServerPlan(
        **vars(plan),
        concurrency=options.concurrency,
        urls=urls,
        # A server that was there before may have seen the openings of another run.
        base=int(time.time()) % _BASES if urls else 0,
    )


def _peers(text: str, named: Sequence[str]) -> list[Peer]:
    if text.strip() == "all":
        names = [name for name, peer in all_peers().items() if peer.launch is not None]
    else:
        names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InvalidValueError("peers", text, "names of peers with commas between, or all")
    names = [OURS if name == "mini-sglang" else name for name in names]
    return chosen_peers(list(dict.fromkeys([*names, *named])))
