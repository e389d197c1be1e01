"""``mini-sglang bench peers``: what can be compared with, and how to get it."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers, interpreter, version
from mini_sglang.bench.process import PeerError
from mini_sglang.cli.args import Parser

READS = {"folder": "folder", "gguf": "GGUF", "any": "folder, GGUF"}


def main(argv: Sequence[str]) -> int:
    """Print the table; returns 0."""
    parser = Parser(
        prog="mini-sglang bench peers",
        usage="mini-sglang bench peers",
        description="List the stacks that mini-sglang can be compared with: what each reads, whether it runs "
        "in process (local_bench.py) or as a server (server_bench.py), its version or how to install it.",
    )
    parser.parse(argv)
    peers = all_peers().values()
    rows = [("NAME", "STACK", "READS", "RUNS", "VERSION")]
    rows += [(peer.name, peer.title, READS[peer.weights], runs(peer), state(peer)) for peer in peers]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    notes = [f"{peer.name}: {peer.recipe.note}." for peer in peers if peer.recipe and peer.recipe.note]
    print("\n" + "\n".join(notes))
    return 0


def runs(peer: Peer) -> str:
    """In process, as a server that is started, or only where a URL says."""
    ways = [way for way, there in (("local", peer.worker), ("server", peer.launch)) if there]
    return ", ".join(ways) or "by URL"


def state(peer: Peer) -> str:
    """The version that is installed, or why there is none and what to do about it."""
    if found := version(peer):
        return found
    if peer.recipe is None:
        return "not started from here: give its URL"
    if reason := peer.runs_here():
        return reason
    try:
        python = interpreter(peer)
    except PeerError as error:
        return str(error).removeprefix(f"{peer.name} is ")
    where = "this Python" if python == sys.executable else python
    return f"{where} has no {peer.distribution}"
