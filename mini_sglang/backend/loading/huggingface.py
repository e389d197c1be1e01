"""The Hugging Face hub, by way of huggingface_hub's settings, listing and cache layout."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from urllib.parse import quote

from mini_sglang.backend.loading.download import HubError, HubUnreachable, RemoteFile, unreachable
from mini_sglang.backend.loading.hub import (
    COMMIT,
    NOT_A_LISTING,
    Hub,
    Listing,
    Wanted,
    has_size,
    listed_file,
    replace_text,
)
from mini_sglang.errors import shorten


def offline_reason() -> str | None:
    """Why no hub may be asked, as a clause; None where it may."""
    from huggingface_hub import constants

    return "is not asked because HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else None


class HuggingFace(Hub):
    """Models of the Hugging Face hub; HF_ENDPOINT, HF_HOME and HF_TOKEN as huggingface_hub reads them."""

    title = "the Hugging Face hub"
    source = "huggingface"

    def __init__(self) -> None:
        from huggingface_hub import constants

        self._endpoint = constants.ENDPOINT
        self._cache = Path(constants.HF_HUB_CACHE)

    def _probe_url(self, wanted: Wanted) -> str:
        return f"{self._endpoint}/{wanted.repo}/resolve/main/config.json"

    def _list(self, wanted: Wanted, timeout: float) -> Listing:
        from huggingface_hub import HfApi, constants, get_token

        try:
            info = HfApi(endpoint=self._endpoint, library_name="mini-sglang").model_info(
                wanted.repo, revision=wanted.revision, files_metadata=True, timeout=timeout
            )
            siblings = [(s.rfilename, s.size, s.blob_id, s.lfs and s.lfs.sha256) for s in info.siblings or ()]
        except Exception as error:
            # Its HTTP library, and with it the class of a network error, differs between versions.
            raise _listing_error(error, wanted, timeout) from None
        commit = info.sha or ""
        if not COMMIT.fullmatch(commit):
            raise HubUnreachable(NOT_A_LISTING)
        token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        files: dict[str, RemoteFile] = {}
        for name, size, blob_id, sha256 in siblings:
            kind, checksum = ("sha256", sha256) if sha256 else ("git", blob_id)
            url = f"{self._endpoint}/{wanted.repo}/resolve/{commit}/{quote(str(name))}"
            if file := listed_file(name, size, url, kind, checksum, headers):
                if not file.checksum:
                    raise HubError(f"lists no checksum for {name}")
                files[file.name] = file
        return Listing(commit, files)

    def _repo_folder(self, wanted: Wanted) -> Path:
        return self._cache / _folder_name(wanted)

    def _folder(self, wanted: Wanted, commit: str) -> Path:
        return self._repo_folder(wanted) / "snapshots" / commit

    def _lock_path(self, wanted: Wanted) -> Path:
        return self._cache / ".locks" / _folder_name(wanted) / "mini-sglang.lock"

    def _cached_folders(self, wanted: Wanted) -> Iterable[Path]:
        commit = wanted.revision
        if not COMMIT.fullmatch(commit):
            try:
                commit = (self._repo_folder(wanted) / "refs" / commit).read_text().strip()
            except (OSError, ValueError):
                return []
        return [self._folder(wanted, commit)] if COMMIT.fullmatch(commit) else []

    def holds(self, folder: Path, file: RemoteFile) -> bool:
        # A snapshot is of one commit and never changes, so name and size will do.
        return has_size(folder / file.name, file.size)

    def place(self, folder: Path, file: RemoteFile, fetch: Callable[[Path], None]) -> None:
        blob = folder.parent.parent / "blobs" / file.checksum
        blob.parent.mkdir(exist_ok=True)
        if not has_size(blob, file.size):
            part = blob.with_name(f"{blob.name}.part")
            fetch(part)
            part.replace(blob)
        link = folder / f".{file.name}.link"
        link.unlink(missing_ok=True)
        try:
            link.symlink_to(os.path.relpath(blob, folder))
        except OSError:
            # No symbolic links here: like huggingface_hub, keep the file itself in the snapshot.
            blob.replace(link)
        link.replace(folder / file.name)

    def _seal(self, wanted: Wanted, commit: str) -> None:
        ref = self._repo_folder(wanted) / "refs" / wanted.revision
        # A cache that cannot be written but is up to date is as good as any.
        if wanted.revision != commit and not (ref.is_file() and ref.read_text() == commit):
            replace_text(ref, commit)


def _folder_name(wanted: Wanted) -> str:
    return f"models--{wanted.repo.replace('/', '--')}"


def _listing_error(error: Exception, wanted: Wanted, timeout: float) -> HubError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return HubError(f"gives {wanted.repo} only to accounts that accepted its terms (set HF_TOKEN)")
    if isinstance(error, errors.RevisionNotFoundError):
        return HubError(f"has no revision {wanted.revision!r} of {wanted.repo}")
    if isinstance(error, errors.RepositoryNotFoundError):
        return HubError(f"has no repository {wanted.repo}, or it is private and HF_TOKEN does not open it")
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status >= 500:
            return HubUnreachable(f"answers with status {status}")
        return HubError(f"answers with status {status} for {wanted.repo}")
    if isinstance(error, errors.HFValidationError):
        return HubError(f"takes no such name: {shorten(str(error))}")
    if isinstance(error, (ValueError, TypeError, KeyError, AttributeError)):
        return HubUnreachable(NOT_A_LISTING)
    return unreachable(error, timeout)
