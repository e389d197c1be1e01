"""``python -m mini_sglang``: the same as the ``mini-sglang`` command."""

from __future__ import annotations

import sys

from mini_sglang.cli import main

if __name__ == "__main__":
    sys.exit(main())
