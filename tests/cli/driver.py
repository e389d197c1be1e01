"""Runs a command in a process of its own on the fake engine: ``python -m tests.cli.driver DOOR args…``."""

from __future__ import annotations

import fcntl
import os
import signal
import sys
import termios

from mini_sglang.cli import main
from mini_sglang.cli.doors import demo, smoke_test
from tests.cli.fake_engine import FakeEngine

if __name__ == "__main__":
    # A test run in the background hands down an ignored SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if os.environ.pop("CLI_TEST_PTY", ""):
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
    door = {"main": main, "demo": demo, "smoke": smoke_test}[sys.argv[1]]
    sys.exit(door(sys.argv[2:], FakeEngine))
