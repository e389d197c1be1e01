"""ModelScope, by its plain HTTP interface: its clients are large or slow to give up, and not needed."""

from __future__ import annotations

import json
import os
import urllib.error
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from mini_sglang.backend.loading.download import (
    HubError,
    HubUnreachable,
    RemoteFile,
    content_checksum,
    fetch_json,
)
from mini_sglang.backend.loading.hub import (
    NOT_A_LISTING,
    Hub,
    Listing,
    Wanted,
    has_size,
    listed_file,
    replace_text,
)
from mini_sglang.errors import shorten

_RECORD = ".mini-sglang.json"


class ModelScope(Hub):
    """Models of ModelScope.

    Read as its own client does: MODELSCOPE_ENDPOINT (or the older MODELSCOPE_DOMAIN), MODELSCOPE_CACHE
    and MODELSCOPE_API_TOKEN.
    """

    title = "ModelScope"
    source = "modelscope"

    def __init__(self, env: Mapping[str, str] = os.environ) -> None:
        endpoint = env.get("MODELSCOPE_ENDPOINT", "").strip() or env.get("MODELSCOPE_DOMAIN", "").strip()
        endpoint = endpoint or "https://modelscope.cn"
        self._endpoint = (endpoint if "://" in endpoint else f"https://{endpoint}").rstrip("/")
        self._cache = Path(env.get("MODELSCOPE_CACHE") or "~/.cache/modelscope").expanduser()
        token = env.get("MODELSCOPE_API_TOKEN")
        self._headers = (
            {"Authorization": f"Bearer {token}", "Cookie": f"m_session_id={token}"} if token else {}
        )

    def _probe_url(self, wanted: Wanted) -> str:
        return f"{self._endpoint}/api/v1/models/{wanted.repo}"

    def _list(self, wanted: Wanted, timeout: float) -> Listing:
        base = f"{self._endpoint}/api/v1/models/{wanted.repo}/repo"
        revision = _revision(wanted)
        query = urlencode({"Revision": revision, "Recursive": "True"})
        try:
            answer = fetch_json(f"{base}/files?{query}", self._headers, timeout)
        except urllib.error.HTTPError as error:
            if error.code in (401, 403, 404):
                raise HubError(f"has no repository {wanted.repo} at {revision!r}, or it is private") from None
            raise HubError(f"answers with status {error.code} for {wanted.repo}") from None
        files: dict[str, RemoteFile] = {}
        for name, size, sha256 in _entries(answer, wanted):
            url = f"{base}?{urlencode({'Revision': revision, 'FilePath': name})}"
            if file := listed_file(name, size, url, "sha256", sha256, self._headers):
                files[file.name] = file
        return Listing(revision, files)

    def _folder(self, wanted: Wanted, commit: str) -> Path:
        for folder in self._old_folders(wanted):
            if folder.is_dir():
                return folder
        return self._cache / "models" / wanted.repo.replace("/", "--") / "snapshots" / commit

    def _old_folders(self, wanted: Wanted) -> list[Path]:
        """Where clients before 1.38 kept the default branch; today's still go on with it there."""
        if _revision(wanted) != "master":
            return []
        owner, _, name = wanted.repo.partition("/")
        tail = Path("models", owner, name.replace(".", "___"))
        return [self._cache / tail, self._cache / "hub" / tail]

    def _cached_folders(self, wanted: Wanted) -> Iterable[Path]:
        return [self._folder(wanted, _revision(wanted))]

    def _lock_path(self, wanted: Wanted) -> Path:
        return self._cache / ".lock" / f"mini-sglang--{wanted.repo.replace('/', '--')}.lock"

    def holds(self, folder: Path, file: RemoteFile) -> bool:
        path = folder / file.name
        if not has_size(path, file.size):
            return False
        # A branch moves on in the same folder, and a new version may have the old size.
        if not file.checksum or _read_record(folder).get(file.name) == file.checksum:
            return True
        if content_checksum(file, path) != file.checksum:
            return False
        _note(folder, file)
        return True

    def place(self, folder: Path, file: RemoteFile, fetch: Callable[[Path], None]) -> None:
        part = folder / f".{file.name}.part"
        fetch(part)
        part.replace(folder / file.name)
        _note(folder, file)

    def _seal(self, wanted: Wanted, commit: str) -> None:
        """Nothing to do: the folder bears the branch's name."""


def _revision(wanted: Wanted) -> str:
    # What Hugging Face calls main is ModelScope's master.
    return "master" if wanted.revision == "main" else wanted.revision


def _entries(answer: Any, wanted: Wanted) -> list[tuple[Any, Any, Any]]:
    """Name, size and sha256 of each listed file, not yet checked."""
    try:
        if not answer.get("Success", True):
            raise HubError(f"refuses {wanted.repo}: {shorten(answer.get('Message'))}")
        entries = [entry for entry in answer["Data"]["Files"] if entry.get("Type") != "tree"]
        return [(entry["Path"], entry["Size"], entry.get("Sha256")) for entry in entries]
    except (KeyError, TypeError, AttributeError):
        raise HubUnreachable(NOT_A_LISTING) from None


def _read_record(folder: Path) -> dict[str, str]:
    """Checksums that files of ``folder`` were found to have; empty where there is no such record."""
    try:
        record = json.loads((folder / _RECORD).read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def _note(folder: Path, file: RemoteFile) -> None:
    replace_text(folder / _RECORD, json.dumps(_read_record(folder) | {file.name: file.checksum}, indent=1))
