"""Prefill and decode end to end on the default model; the exit status tells."""

import sys

from mini_sglang.cli.doors import smoke_test

if __name__ == "__main__":
    sys.exit(smoke_test())
