"""The ``mini-sglang`` command.

Nothing here imports torch: it is imported when an engine is made, after the arguments and the prompt
were found to be good.
"""

from __future__ import annotations

from mini_sglang.cli.app import main

__all__ = ["main"]
