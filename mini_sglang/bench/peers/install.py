"""Makes a peer's own virtual environment under the cache folder, whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import inspect
import json
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType
from typing import IO

from mini_sglang.bench.peers.base import Peer, Recipe
from mini_sglang.bench.peers.registry import MARK, environment, mark_of, python_of
from mini_sglang.bench.process import PeerError
from mini_sglang.config import Settings

PIP = (sys.executable, "-m", "pip")
KEPT_LINES = 200
SHOWN_WORDS = 4


class Install:
    """One environment in the making.

    Args:
        peer: whose it is.
        settings: where the cache folder is.
        python: the interpreter it is made of.
        pip: the command that is pip; it is told which environment to install into.
        say: is told what was done, a sentence at a time.
        show: is told what pip says, a line at a time.

    Raises:
        PeerError: there is nothing to install for this peer, or it cannot run here.
    """

    def __init__(
        self,
        peer: Peer,
        settings: Settings | None = None,
        *,
        python: str = sys.executable,
        pip: Sequence[str] = PIP,
        say: Callable[[str], None] = lambda line: None,
        show: Callable[[str], None] = lambda line: None,
    ) -> None:
        if peer.recipe is None:
            raise PeerError(f"{peer.name}: there is nothing to install; it is only reached by its URL.")
        if reason := peer.runs_here():
            raise PeerError(f"{peer.name} cannot run here: {reason}")
        self.peer, self.recipe = peer, peer.recipe
        self.python, self.pip, self.say, self.show = python, pip, say, show
        self.settings = settings or Settings.resolve()
        self.folder = environment(peer, self.settings)
        self.log = self.folder.with_name(self.folder.name + ".log")

    def run(self, again: bool = False) -> bool:
        """Make the environment, unless it is there, whole and by the same recipe.

        A folder that an interrupted run left is removed and begun anew.

        Args:
            again: make it anew in any case.

        Returns:
            whether it had to be made.

        Raises:
            PeerError: the Python is of the wrong version, the disk is too full, another process is at it, or
                a step failed.
        """
        mark = mark_of(self.peer, self.settings)
        digest = recipe_digest(self.recipe)
        if mark and mark.get("recipe") == digest and python_of(self.folder).exists() and not again:
            return False
        check_python(self.peer, self.recipe, self.python)
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with locked(self.folder.with_name(self.folder.name + ".lock"), self.peer.name) as lock:
            if self.folder.exists():
                # The mark goes first: from here on nobody may take the folder for whole.
                (self.folder / MARK).unlink(missing_ok=True)
                self.say(f"{self.peer.name}: removing what is in {self.folder}")
                shutil.rmtree(self.folder)
            check_disk(self.peer, self.recipe, self.folder.parent)
            try:
                with self.log.open("w", encoding="utf-8") as log:
                    self._make(lock, log)
                self._mark(digest)
            except BaseException:
                shutil.rmtree(self.folder, ignore_errors=True)
                raise
        return True

    def _make(self, lock: int, log: IO[str]) -> None:
        self.say(f"{self.peer.name}: a virtual environment in {self.folder}")
        # Without pip of its own: ours installs into it, and nothing of ensurepip need be there.
        self._do([self.python, "-m", "venv", "--without-pip", str(self.folder)], "making it", lock, log)
        inside = str(python_of(self.folder))
        for number, step in enumerate(self.recipe.steps, 1):
            what = "pip install " + " ".join(step[:SHOWN_WORDS])
            if len(step) > SHOWN_WORDS:
                what += f" … ({len(step) - SHOWN_WORDS} more)"
            self.say(f"{self.peer.name}: {number} of {len(self.recipe.steps)}: {what}")
            variables = {**self.recipe.variables, **os.environ}
            self._do([*self.pip, "--python", inside, "install", *step], what, lock, log, variables)
        packages = site_packages(self.folder)
        if self.recipe.finish is not None:
            try:
                done = self.recipe.finish(packages)
            except OSError as error:
                raise PeerError(f"{self.peer.name}: what pip left could not be mended: {error}") from None
            for line in done:
                self.say(f"{self.peer.name}: {line}")
        if self.recipe.module:
            self.say(f"{self.peer.name}: importing {self.recipe.module}")
            script = f"import {self.recipe.module}"
            of_server = self.peer.launch.env(1) if self.peer.launch else {}
            self._do([inside, "-I", "-c", script], script, lock, log, of_server)

    def _do(
        self,
        command: list[str],
        what: str,
        lock: int,
        log: IO[str],
        variables: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Run a command to its end, its words into ``log`` and ``show``."""
        log.write(f"$ {what}\n")
        try:
            # A command that outlives this process holds the lock for as long as it writes into the folder.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                env=clean_variables({**os.environ, **variables}),
                pass_fds=[lock],
            )
        except OSError as error:
            raise PeerError(f"{self.peer.name}: {what}: {command[0]!r} cannot be run: {error}") from None
        said: deque[str] = deque(maxlen=KEPT_LINES)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                log.write(line)
                if line.strip():
                    said.append(line.strip())
                    self.show(line.strip())
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()
            log.flush()
        if status:
            raise PeerError(
                f"{self.peer.name}: {what} failed with status {status}: {reason_of(said)} (all of it is in "
                f"{self.log})"
            )

    def _mark(self, digest: str) -> None:
        found = importlib.metadata.distributions(path=[str(site_packages(self.folder))])
        mark = {
            "peer": self.peer.name,
            "recipe": digest,
            "steps": self.recipe.steps,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
            "packages": dict(sorted((one.metadata["Name"], one.version) for one in found)),
        }
        part = self.folder / (MARK + ".part")
        part.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
        # Last of all, and at once: whoever finds it may use the folder.
        part.replace(self.folder / MARK)


@contextlib.contextmanager
def locked(path: Path, name: str) -> Iterator[int]:
    """Hold the lock file; its descriptor may be handed to a child, which then holds it too.

    Raises:
        PeerError: another process holds it.
    """
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise PeerError(f"{name} is being installed by another process.") from None
        yield file.fileno()


def check_python(peer: Peer, recipe: Recipe, python: str) -> None:
    """Raises: PeerError, where the interpreter cannot be run or is of a version without wheels."""
    script = "import sys; print(*sys.version_info[:2])"
    try:
        done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True)
        major, minor = map(int, done.stdout.split())
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise PeerError(f"{peer.name}: {python!r} cannot be run as a Python interpreter: {error}") from None
    low, high = recipe.python
    if not (3, low) <= (major, minor) <= (3, high):
        raise PeerError(
            f"{peer.name} is installed with Python 3.{low} to 3.{high}, and {python!r} is {major}.{minor}; "
            "--python names another."
        )


def check_disk(peer: Peer, recipe: Recipe, folder: Path) -> None:
    """Raises: PeerError, where the disk has less space than the environment takes."""
    free = shutil.disk_usage(folder).free / 1e9
    if free < recipe.disk_gb:
        raise PeerError(
            f"{peer.name} takes {recipe.disk_gb:g} GB on disk, and {folder} has {free:.1f} GB left; "
            "MINI_SGLANG_CACHE names another place."
        )


def recipe_digest(recipe: Recipe) -> str:
    """Tells recipes apart: what pip is given, and what is done after it."""
    finish = inspect.getsource(recipe.finish) if recipe.finish else ""
    return hashlib.sha256(json.dumps([recipe.steps, finish]).encode()).hexdigest()[:16]


def site_packages(folder: Path) -> Path:
    """Where an environment keeps its packages.

    Raises:
        PeerError: it has no such folder.
    """
    found = sorted(folder.glob("lib/python3.*/site-packages"))
    if not found:
        raise PeerError(f"{folder} has no site-packages.")
    return found[0]


def clean_variables(given: Mapping[str, str]) -> dict[str, str]:
    """Variables without those that would let packages of ours be seen, and pip made quiet."""
    mine = {name: value for name, value in given.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    pip = {
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_USER": "0",
    }
    return {**mine, **pip, "PYTHONUNBUFFERED": "1"}


def reason_of(said: Sequence[str]) -> str:
    """The line that tells why pip gave up: its last error, or the last of all."""
    errors = [line for line in said if line.lower().startswith("error: ")]
    return (errors or list(said) or ["it said nothing"])[-1]
