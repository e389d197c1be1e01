"""The JSON file of a benchmark: every single run, and whatever is needed to believe it."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

from mini_sglang.bench.machine import Limits, machine
from mini_sglang.config import VERSION
from mini_sglang.errors import MiniSglangError

FORMAT = 1
KINDS = ("local", "server", "serve", "sweep", "kernels")


@dataclass
class Record:
    """What a benchmark writes.

    Attributes:
        kind: one of ``KINDS``; says what ``rows`` and ``runs`` hold.
        settings: what was asked for: model, counts, rounds, seed, peers.
        rows: the table as printed, a row per peer (or rate, or kernel), figures as numbers.
        runs: every single run that the rows were made of.
        versions: of each peer and library, by name.
        limits: what the machine can do, measured in the same run.
    """

    kind: str
    settings: dict[str, Any]
    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    limits: Limits | None = None
    argv: Sequence[str] = field(default_factory=lambda: tuple(sys.argv))

    def as_json(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "kind": self.kind,
            "command": _command(self.argv),
            # Of the process: a record is made when the runs are over.
            "started": datetime.fromtimestamp(psutil.Process().create_time(), UTC).isoformat(
                timespec="seconds"
            ),
            "commit": commit(),
            "machine": machine(),
            "limits": self.limits.as_json() if self.limits else None,
            "versions": {"mini-sglang": VERSION, **self.versions},
            "settings": self.settings,
            "rows": self.rows,
            "runs": self.runs,
        }

    def write(self, path: Path) -> None:
        """Raises: MiniSglangError, where the file cannot be written."""
        try:
            path.write_text(json.dumps(self.as_json(), indent=1, default=str) + "\n", encoding="utf-8")
        except OSError as error:
            raise MiniSglangError(f"--json: {str(path)!r} cannot be written: {error.strerror}.") from None


def read_record(path: Path) -> dict[str, Any]:
    """A file that ``Record.write`` wrote, checked for its kind and format.

    Raises:
        MiniSglangError: it cannot be read, or is not one.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise MiniSglangError(f"{str(path)!r} cannot be read as a benchmark's JSON: {error}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT or found.get("kind") not in KINDS:
        raise MiniSglangError(
            f"{str(path)!r} is not a benchmark's JSON of format {FORMAT} and kind {', '.join(KINDS)}."
        )
    return found


def _command(argv: Sequence[str]) -> str:
    """What to type to run it again."""
    name = Path(argv[0]).name
    program = ["python", "-m", "mini_sglang"] if name == "__main__.py" else [name]
    return shlex.join([*program, *argv[1:]])


def commit() -> str | None:
    """The revision of the source tree, ``-dirty`` where it was changed since; None outside of one."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
            cwd=root,
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
