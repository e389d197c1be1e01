"""What the hubs have in common: list a repository, fetch what makes a model, find it in the cache.

Each hub writes into the cache folder of its own client, in that client's layout, so that a model is
kept once whoever fetched it. A file gets its name only when it is whole and checked.
"""

from __future__ import annotations

import re
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from pathlib import Path

from mini_sglang.backend.loading.download import HubError, RemoteFile, download, probe
from mini_sglang.backend.loading.files import (
    WEIGHTS,
    WEIGHTS_INDEX,
    choose_gguf,
    is_plain_name,
    no_weights_reason,
    shard_names,
    small_files,
    whole_model,
)
from mini_sglang.backend.loading.progress import Progress, progress_bar, size_text
from mini_sglang.backend.lora.files import CONFIG_FILE, WEIGHTS_FILE
from mini_sglang.errors import ModelLoadError, shorten

COMMIT = re.compile(r"[0-9a-f]{40}")
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)
NOT_A_LISTING = "answers with something that is not its list of files"

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_FILE_BYTES = 1 << 44


@dataclass(frozen=True, slots=True)
class Wanted:
    """A repository ``repo`` at ``revision``, and one ``.gguf`` of it where one was named.

    ``adapter`` asks for a LoRA adapter's files rather than a model's.
    """

    repo: str
    revision: str
    gguf: str | None = None
    adapter: bool = False


@dataclass(frozen=True, slots=True)
class Listing:
    """The commit (or branch, where the hub tells no commit) that was listed, and its files by name."""

    commit: str
    files: dict[str, RemoteFile]


class Hub(ABC):
    """One place that models come from. The message of a HubError goes on after ``title``."""

    title: str
    source: str

    def obtain(
        self, wanted: Wanted, *, remote_code: bool, timeout: float, notify: Callable[[str], None]
    ) -> Path:
        """The model's folder or ``.gguf`` file, downloaded where it is not in the cache.

        Raises:
            HubUnreachable: the hub does not answer, stalls or breaks off.
            HubError: the hub has no such model, or sends what it does not list.
            ModelLoadError: the cache cannot be written, or the repository has nothing that is loaded.
        """
        probe(self._probe_url(wanted))
        listing = self._list(wanted, timeout)
        fetch = _Fetch(self, wanted, self._folder(wanted, listing.commit), listing.files, timeout, notify)
        try:
            model = self._fetch_model(fetch, remote_code)
            self._seal(wanted, listing.commit)
        except OSError as error:
            where = error.filename or fetch.folder
            raise ModelLoadError(f"The cache cannot be written at {where}: {error.strerror}.") from None
        return model

    def _fetch_model(self, fetch: _Fetch, remote_code: bool) -> Path:
        files, repo = fetch.files, fetch.wanted.repo
        if fetch.wanted.adapter:
            for name in ADAPTER_FILES:
                if name not in files:
                    raise HubError(f"has no file {name} in {repo}")
            fetch(ADAPTER_FILES, repo)
            return fetch.folder
        if fetch.wanted.gguf:
            return fetch.one(fetch.wanted.gguf)
        names = small_files(files, remote_code=remote_code)
        if WEIGHTS in files:
            weights = [WEIGHTS]
        elif WEIGHTS_INDEX in files:
            # The index before the shards: it says which there must be.
            names.append(WEIGHTS_INDEX)
            fetch(names, f"the configuration of {repo}")
            weights = shard_names(fetch.folder / WEIGHTS_INDEX)
        elif gguf := choose_gguf(files):
            return fetch.one(gguf)
        else:
            raise ModelLoadError(f"{repo} on {self.title} {no_weights_reason(files)}.")
        for name in weights:
            if name not in files:
                raise HubError(f"lacks {name}, which the weight index of {repo} names")
        fetch([*names, *weights], repo)
        return fetch.folder

    def cached(self, wanted: Wanted) -> Path | None:
        """The model, whole in this hub's cache, found without the network; None where it is not."""
        for folder in self._cached_folders(wanted):
            if wanted.adapter:
                if all((folder / name).is_file() for name in ADAPTER_FILES):
                    return folder
            elif model := whole_model(folder, wanted.gguf):
                return model
        return None

    @abstractmethod
    def _probe_url(self, wanted: Wanted) -> str: ...

    @abstractmethod
    def _list(self, wanted: Wanted, timeout: float) -> Listing: ...

    @abstractmethod
    def _folder(self, wanted: Wanted, commit: str) -> Path: ...

    @abstractmethod
    def _cached_folders(self, wanted: Wanted) -> Iterable[Path]: ...

    @abstractmethod
    def _lock_path(self, wanted: Wanted) -> Path: ...

    @abstractmethod
    def holds(self, folder: Path, file: RemoteFile) -> bool:
        """Whether ``folder`` has this very file, whole."""

    @abstractmethod
    def place(self, folder: Path, file: RemoteFile, fetch: Callable[[Path], None]) -> None:
        """Let ``fetch`` fill a file under a temporary name, then give it its own."""

    @abstractmethod
    def _seal(self, wanted: Wanted, commit: str) -> None:
        """Every file is there: note it where the hub's own client looks for it offline."""


@dataclass(slots=True)
class _Fetch:
    """Brings named files of one repository into its folder, one process at a time."""

    hub: Hub
    wanted: Wanted
    folder: Path
    files: dict[str, RemoteFile]
    timeout: float
    notify: Callable[[str], None]

    def one(self, name: str) -> Path:
        if name not in self.files:
            raise HubError(f"has no file {name} in {self.wanted.repo}")
        self([name], f"{self.wanted.repo}/{name}")
        return self.folder / name

    def __call__(self, names: Collection[str], what: str) -> None:
        from filelock import FileLock, Timeout

        if not self._missing(names):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        lock_path = self.hub._lock_path(self.wanted)
        lock_path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            self.notify(f"Another process is downloading {self.wanted.repo}; waiting for it.")
            lock.acquire()
        try:
            self._download(self._missing(names), what)
        finally:
            lock.release()

    def _missing(self, names: Collection[str]) -> list[RemoteFile]:
        return [self.files[name] for name in names if not self.hub.holds(self.folder, self.files[name])]

    def _download(self, missing: list[RemoteFile], what: str) -> None:
        total = sum(file.size for file in missing)
        free = shutil.disk_usage(self.folder).free
        if total > free:
            raise ModelLoadError(
                f"{what} needs {size_text(total)} in {self.folder}, where {size_text(free)} are free."
            )
        if missing:
            self.notify(f"Downloading {what} from {self.hub.title} ({size_text(total)}).")
        with progress_bar(total, what) as progress:
            for file in missing:
                self._download_one(file, progress)

    def _download_one(self, file: RemoteFile, progress: Progress) -> None:
        def fetch(part: Path) -> None:
            download(file, part, timeout=self.timeout, progress=progress)

        self.hub.place(self.folder, file, fetch)


def listed_file(
    name: object, size: object, url: str, kind: str, checksum: object, headers: dict[str, str]
) -> RemoteFile | None:
    """A file as a hub lists it, checked, since it becomes paths and bounds; None where it is never wanted.

    Raises:
        HubError: the name would leave its folder, or size or checksum are no such things.
    """
    if not isinstance(name, str) or name.startswith("/") or "\\" in name or ".." in name.split("/"):
        raise HubError(f"lists a file named {shorten(name)}, which would leave its folder")
    if not is_plain_name(name):
        return None
    if isinstance(size, bool) or not isinstance(size, int) or not 0 <= size <= _MAX_FILE_BYTES:
        raise HubError(f"lists no size for {name}")
    if not checksum:
        return RemoteFile(name, size, url, headers=headers)
    pattern = COMMIT if kind == "git" else _SHA256
    if not isinstance(checksum, str) or not pattern.fullmatch(checksum):
        raise HubError(f"lists {shorten(checksum)} as the checksum of {name}")
    return RemoteFile(name, size, url, kind, checksum, headers)


def has_size(path: Path, size: int) -> bool:
    """Whether ``path`` is a file of ``size`` bytes."""
    try:
        return path.is_file() and path.stat().st_size == size
    except OSError:
        return False


def replace_text(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that no reader ever sees half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(text)
    temporary.replace(path)
