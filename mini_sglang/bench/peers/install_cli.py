"""``mini-sglang bench install NAME …``."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence

from mini_sglang.bench.peers.install import Install
from mini_sglang.bench.peers.registry import chosen_peers, environment, version
from mini_sglang.cli.args import Parser


class Progress:
    """What is going on: a line for each thing done, and on a terminal one that changes with what pip says."""

    def __init__(self) -> None:
        self.out = sys.stderr
        self.live = self.out.isatty()
        self.start = time.monotonic()

    def say(self, line: str) -> None:
        self.clear()
        print(line, file=self.out, flush=True)

    def show(self, line: str) -> None:
        if not self.live:
            return
        self.clear()
        width = max(20, shutil.get_terminal_size().columns - 1)
        seconds = time.monotonic() - self.start
        plain = "".join(char if char.isprintable() else " " for char in line)
        print(f"  {seconds:4.0f} s  {plain}"[:width], end="", file=self.out, flush=True)

    def clear(self) -> None:
        if self.live:
            print("\r\x1b[K", end="", file=self.out)


def main(argv: Sequence[str]) -> int:
    """Install each peer that is named; returns 0.

    Raises:
        PeerError: the first that cannot be installed.
    """
    parser = Parser(
        prog="mini-sglang bench install",
        usage="mini-sglang bench install NAME … [options]",
        description="Make a virtual environment for a peer under the cache folder, with the packages it "
        "needs and none of anyone else's. What is there and whole is left as it is; what was interrupted is "
        "begun anew.",
    )
    parser.add_argument("names", nargs="+", metavar="NAME", help="as `mini-sglang bench peers` lists them")
    parser.add_argument("--again", action="store_true", help="make it anew even where it is there")
    parser.add_argument(
        "--python",
        default=sys.executable,
        metavar="PATH",
        help="the Python it is made of; by default this one",
    )
    options = parser.parse(argv)
    progress = Progress()
    installs = [
        Install(peer, python=options.python, say=progress.say, show=progress.show)
        for peer in chosen_peers(options.names)
    ]
    for install in installs:
        peer = install.peer
        try:
            made = install.run(again=options.again)
        finally:
            progress.clear()
        what = "is installed" if made else "was installed already"
        print(f"{peer.name} {version(peer)} {what} in {environment(peer)}")
    return 0
