"""Stream an answer in the terminal; ``--multi-turn`` keeps the conversation."""

import sys

from mini_sglang.cli.doors import demo

if __name__ == "__main__":
    sys.exit(demo())
