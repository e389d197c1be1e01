"""From settings to an engine's core: find the model, load its tokenizer, then its weights."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mini_sglang.config import Settings

if TYPE_CHECKING:
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.backend.loading.source import ModelFiles
    from mini_sglang.engine.engine import EngineCore
    from mini_sglang.text.tokenizer import Tokenizer
    from mini_sglang.types import Adapter

logger = logging.getLogger(__name__)

Notify = Callable[[str], None]
"""Takes lines for the user."""


@dataclass(frozen=True, slots=True)
class FoundModel:
    """A model on disk whose tokenizer is loaded and whose weights are not."""

    files: ModelFiles
    tokenizer: Tokenizer


def find_model(settings: Settings, notify: Notify) -> FoundModel:
    """Find the model that ``settings`` ask for, downloading what is missing, and load its tokenizer.

    Raises:
        InvalidValueError: a name that is none.
        ModelNotFoundError: no source has the model.
        ModelLoadError: its files are damaged, incomplete or of a kind that is not supported.
    """
    from mini_sglang.backend.loading.source import resolve_model

    return read_model(resolve_model(settings, notify=notify), settings)


def named_adapters(settings: Settings, notify: Notify) -> list[Adapter]:
    """The adapters that ``settings`` name, on disk. Raises as ``find_adapters``."""
    if settings.lora_adapters is None:
        return []
    from mini_sglang.backend.lora.source import find_adapters

    return find_adapters(settings, notify)


def read_model(files: ModelFiles, settings: Settings) -> FoundModel:
    """A model whose files are known, with its tokenizer. Raises ``ModelLoadError`` as ``find_model``."""
    from mini_sglang.text.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(
        files.path,
        cache_dir=settings.cache_path,
        trust_remote_code=settings.trust_remote_code,
        stand_in=settings.load_format == "dummy",
    )
    return FoundModel(files, tokenizer)


def prepare_quietly(grammars: GrammarCompiler) -> None:
    """Prepare for the first grammar; what is wrong then is for the request that has one to tell."""
    try:
        grammars.prepare()
    except Exception as error:
        logger.info("no grammar can be followed: %s", error)


def load_core(
    model: FoundModel,
    settings: Settings,
    notify: Notify,
    *,
    sharing: int = 1,
    check_grammars: bool = True,
) -> tuple[EngineCore, GrammarCompiler]:
    """Load a model's weights into an engine; also gives what compiles its grammars, for closing.

    Args:
        sharing: engines that are loaded side by side and share the device's free memory.
        check_grammars: try each grammar in a helper process first; not needed where another process has.

    Raises:
        ModelLoadError: the weights are damaged, incomplete or of a kind that is not supported.
        InvalidValueError: a setting that this model or machine cannot honour.
    """
    from mini_sglang.api.drafting import load_draft_model
    from mini_sglang.backend.grammar import GrammarCompiler
    from mini_sglang.backend.openmp import sleeping_openmp
    from mini_sglang.engine.engine import EngineCore

    # torch takes a second or more to import: only once the model is found and its tokenizer reads.
    with sleeping_openmp():
        from mini_sglang.backend.loader import load_backend
        from mini_sglang.backend.step import release

    files, tokenizer = model.files, model.tokenizer
    backend = load_backend(files.path, settings, notify=notify, sharing=sharing)
    eos_ids = frozenset(backend.eos_ids) | tokenizer.eos_ids
    description = {"model": files.name, "source": files.source, **backend.describe()}
    logger.info(
        "set up %s eos_ids=%s",
        " ".join(f"{name}={value}" for name, value in description.items()),
        sorted(eos_ids),
    )
    grammars = GrammarCompiler(tokenizer.vocabulary, backend.vocab_size, eos_ids, check=check_grammars)
    try:
        draft_backend = load_draft_model(tokenizer, settings, notify, sharing)
        core = EngineCore(
            backend, settings, eos_ids, description, grammars=grammars.new, draft_backend=draft_backend
        )
    except BaseException:
        release(backend)
        raise
    return core, grammars
