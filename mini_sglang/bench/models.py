"""One model in the forms that peers read: the GGUF as it is, and a folder of the same weights."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang.bench.process import PeerError, Process
from mini_sglang.config import Settings
from mini_sglang.errors import MiniSglangError

if TYPE_CHECKING:
    from mini_sglang.backend.loading.source import ModelFiles
    from mini_sglang.text.tokenizer import Tokenizer

DTYPE_BYTES = {"bf16": 2, "fp32": 4}
_WORK_PREFIX = ".making-"
_SECONDS = 3600.0
"""What dequantising may take; the largest models that a CPU runs at all need minutes."""


@dataclass(frozen=True)
class BenchModel:
    """A model that is on disk, with its tokenizer.

    Attributes:
        name: what to show.
        path: the folder or ``.gguf`` file that was found.
        tokenizer: makes the ids that every peer gets.
        context: tokens the model was made for; None where its files do not say.
        blocks: of a GGUF, the type that most of its weights have, ``Q4_1``; None for a folder.
    """

    name: str
    path: Path
    tokenizer: Tokenizer
    context: int | None
    blocks: str | None

    @property
    def gguf(self) -> Path | None:
        return self.path if self.blocks is not None else None

    def folder(self, dtype: str, settings: Settings, python: str, notify: Callable[[str], None]) -> Path:
        """A folder of the weights: the model's own, or its GGUF dequantised to ``dtype`` and kept.

        Args:
            dtype: ``bf16`` or ``fp32``.
            python: an interpreter that has transformers and gguf.
            notify: is given a line where it has to be made first.

        Raises:
            PeerError: it cannot be made.
        """
        if self.gguf is None:
            return self.path
        return dequantized(self.gguf, dtype, settings.cache_path, python, notify)


def find_bench_model(settings: Settings, notify: Callable[[str], None]) -> BenchModel:
    """The model that ``settings`` ask for, as ``Engine`` would take it.

    Raises:
        InvalidValueError: a name that is none.
        ModelNotFoundError: no source has the model.
        ModelLoadError: its files are damaged, incomplete or of a kind that is not supported.
    """
    from mini_sglang.api.loading import find_model

    found = find_model(settings, notify)
    files: ModelFiles = found.files
    # Workers have this process's folder, but need not for ever.
    path = files.path.resolve()
    if path.is_dir():
        context = _folder_context(path)
        return BenchModel(files.name, path, found.tokenizer, context, None)
    context, blocks = _gguf_facts(path)
    return BenchModel(files.name, path, found.tokenizer, context, blocks)


def dequantized(gguf: Path, dtype: str, cache_path: Path, python: str, notify: Callable[[str], None]) -> Path:
    """A Hugging Face folder of a GGUF's weights in the cache, made by transformers where it is not there.

    It is there whole or not at all, and under a name that another file's weights cannot have. Of several
    processes one makes it and the others wait.

    Raises:
        PeerError: transformers cannot read the file, or there is no room for the folder.
    """
    from filelock import FileLock

    from mini_sglang.backend.loading.fingerprint import weights_fingerprint

    digest = weights_fingerprint(gguf)
    place = cache_path / "bench"
    folder = place / f"{gguf.stem}-{dtype}-{digest[:16]}"
    if folder.is_dir():
        return folder
    try:
        place.mkdir(parents=True, exist_ok=True)
        with FileLock(place / "folders.lock"):
            if not folder.is_dir():
                _make(gguf, dtype, folder, python, digest, notify)
    except OSError as error:
        why = error.strerror or error
        raise PeerError(f"the {dtype} folder of {gguf.name} cannot be kept at {place}: {why}") from None
    return folder


def _make(
    gguf: Path, dtype: str, folder: Path, python: str, digest: str, notify: Callable[[str], None]
) -> None:
    from mini_sglang.backend.loading.progress import size_text

    for left_over in folder.parent.glob(f"{_WORK_PREFIX}*"):
        # Of a process that was killed; the lock says that no living one works here.
        shutil.rmtree(left_over, ignore_errors=True)
    needed = int(1.1 * _weights(gguf) * DTYPE_BYTES[dtype]) + (64 << 20)
    free = shutil.disk_usage(folder.parent).free
    if free < needed:
        raise PeerError(
            f"the {dtype} folder of {gguf.name} needs {size_text(needed)} in {folder.parent}, "
            f"where {size_text(free)} are free"
        )
    notify(f"Dequantising {gguf.name} to a {dtype} folder of {size_text(needed)} at most, once …")
    with tempfile.TemporaryDirectory(prefix=_WORK_PREFIX, dir=folder.parent) as name:
        work = Path(name, "folder")
        process = Process("dequantize", python, {"model": str(gguf)}, seconds=_SECONDS)
        try:
            process.ask(_SECONDS, do="write", folder=str(work), dtype=dtype)
            made = {"gguf": gguf.name, "fingerprint": digest, "by": process.about["versions"]}
        finally:
            process.close()
        (work / "made_from.json").write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
        work.rename(folder)


def _weights(gguf: Path) -> int:
    from mini_sglang.backend.loading.gguf import read_gguf

    with read_gguf(gguf) as content:
        return sum(prod(tensor.shape) for tensor in content.tensors.values())


def _gguf_facts(path: Path) -> tuple[int | None, str]:
    from mini_sglang.backend.loading.gguf import read_gguf

    with read_gguf(path) as content:
        context = content.metadata.get(f"{content.metadata.get('general.architecture')}.context_length")
        sizes: Counter[str] = Counter()
        for tensor in content.tensors.values():
            sizes[tensor.type.name] += prod(tensor.shape)
    if not sizes:
        raise MiniSglangError(f"The GGUF file {path} holds no weights.")
    return (context if type(context) is int else None), sizes.most_common(1)[0][0]


def _folder_context(folder: Path) -> int | None:
    try:
        config: Any = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    text = config.get("text_config")
    found = config.get("max_position_embeddings") or (
        text.get("max_position_embeddings") if isinstance(text, dict) else None
    )
    return found if type(found) is int else None
