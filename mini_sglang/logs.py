"""Where log lines go: one handler on the ``mini_sglang`` logger, to standard error."""

from __future__ import annotations

import logging
import sys

LOGGER_NAME = "mini_sglang"


def configure(level: str, who: str = "") -> None:
    """Send this package's log lines of ``level`` and above to standard error, as time, level, message.

    Calling it again only changes the level. ``level`` is one of ``Settings.log_level``'s choices; ``who`` is
    put before the message in brackets, for a process that shares standard error with others.
    """
    logger = logging.getLogger(LOGGER_NAME)
    logger.setLevel(level.upper())
    if any(isinstance(handler, _StderrHandler) for handler in logger.handlers):
        return
    handler = _StderrHandler()
    said_by = f"[{who}] " if who else ""
    handler.setFormatter(logging.Formatter(f"%(asctime)s %(levelname)s {said_by}%(message)s", "%H:%M:%S"))
    logger.addHandler(handler)
    # A library that sets up the root logger would print every line a second time.
    logger.propagate = False


class _StderrHandler(logging.Handler):
    """Writes to whatever ``sys.stderr`` is at the time; a reader that has gone away is not an error."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            line = self.format(record)
        except Exception:
            self.handleError(record)
            return
        try:
            if sys.stderr is not None:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except (OSError, ValueError):
            pass
