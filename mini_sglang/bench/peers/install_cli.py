"""``mini-sglang bench install NAME …``."""

from __future__ import annotations

import shutil
import sys
import threading
import time
from collections.abc import Sequence

from mini_sglang.bench.peers.install import Install
from mini_sglang.bench.peers.registry import chosen_peers, environment, version
from mini_sglang.cli.args import Parser

CLEAR = "\r\x1b[K"


class Progress:
    """What is going on: a line for each thing done, and on a terminal one that goes on with what pip says.

    Used as a context, it keeps that line's clock going, as a compiler may be silent for minutes.
    """

    def __init__(self) -> None:
        self.out = sys.stderr
        self.live = self.out.isatty()
        self.line = ""
        self.start = time.monotonic()
        self.ended = threading.Event()
        self.lock = threading.Lock()
        self.ticker = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        if self.live:
            self.ticker.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        if self.live:
            self.ticker.join()
            self.out.write(CLEAR)
            self.out.flush()

    def say(self, line: str) -> None:
        """A line that stays."""
        with self.lock:
            self.line = ""
            print((CLEAR if self.live else "") + line, file=self.out, flush=True)

    def show(self, line: str) -> None:
        """A line that the next one takes the place of; only on a terminal."""
        with self.lock:
            self.line = "".join(char if char.isprintable() else " " for char in line)
            self._draw()

    def _tick(self) -> None:
        while not self.ended.wait(1.0):
            with self.lock:
                self._draw()

    def _draw(self) -> None:
        if self.live and self.line:
            width = max(20, shutil.get_terminal_size().columns - 1)
            seconds = time.monotonic() - self.start
            print(CLEAR + f"  {seconds:4.0f} s  {self.line}"[:width], end="", file=self.out, flush=True)


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
    peers = chosen_peers(options.names)
    with Progress() as progress:
        installs = [
            Install(peer, python=options.python, say=progress.say, show=progress.show) for peer in peers
        ]
        made = [install.run(again=options.again) for install in installs]
    for peer, was_made in zip(peers, made, strict=True):
        what = "is installed" if was_made else "was installed already"
        print(f"{peer.name} {version(peer)} {what} in {environment(peer)}")
    return 0
