"""The draft model that ``DRAFT_MODEL_NAME`` asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import zip_longest
from typing import TYPE_CHECKING

from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, shorten

if TYPE_CHECKING:
    from mini_sglang.backend.step import LoadedBackend
    from mini_sglang.text.tokenizer import Tokenizer


def load_draft_model(
    tokenizer: Tokenizer, settings: Settings, notify: Callable[[str], None], sharing: int
) -> LoadedBackend | None:
    """Load the draft model of ``settings``; None where they name none.

    Args:
        tokenizer: the large model's; each of its ids must mean the same in the small one.
        sharing: engines that are loaded side by side.

    Raises:
        InvalidValueError: it is wanted and not named, has another vocabulary, or keeps no pages.
        ModelNotFoundError, ModelLoadError: as for the large model.
    """
    name = settings.draft_model_name
    if name is None:
        if settings.speculation == "draft_model":
            raise InvalidValueError("DRAFT_MODEL_NAME", None, "given where SPECULATIVE is draft_model")
        return None
    from mini_sglang.backend.device import choose_threads
    from mini_sglang.backend.loader import load_backend
    from mini_sglang.backend.loading.source import resolve_model
    from mini_sglang.backend.parallel.choice import threads_per_rank
    from mini_sglang.text.tokenizer import load_tokenizer

    # Its context may be shorter than the one asked for, and no revision is meant for it.
    own = replace(
        settings,
        model=name,
        model_local_dir=None,
        modelscope_model_name=None,
        model_revision="main",
        context_length=0,
        engine_fast_decode=False,
        tensor_parallel_size=1,
        num_threads=threads_per_rank(choose_threads(settings.num_threads), settings),
        chosen=(settings.chosen | {"model"}) - {"model_local_dir", "modelscope_model_name"},
    )
    path = resolve_model(own, notify=notify).path
    other = load_tokenizer(
        path,
        cache_dir=own.cache_path,
        trust_remote_code=own.trust_remote_code,
        stand_in=own.load_format == "dummy",
    )
    _check_vocabulary(name, tokenizer, other)
    notify(f"Loading {path.name} as draft model …")
    backend = load_backend(path, own, notify=notify, sharing=sharing)
    if not backend.shares_prefixes:
        # A wrong guess could not be taken back.
        raise InvalidValueError(
            "DRAFT_MODEL_NAME", name, "a model that is not served with one cache per request"
        )
    return backend


def _check_vocabulary(name: str, large: Tokenizer, small: Tokenizer) -> None:
    pairs = zip_longest(large.vocabulary().tokens, small.vocabulary().tokens, fillvalue=b"")
    for token_id, (ours, theirs) in enumerate(pairs):
        if ours != theirs:
            what = f"token {token_id} is {shorten(repr(ours))} there and {shorten(repr(theirs))} here"
            raise InvalidValueError(
                "DRAFT_MODEL_NAME", name, f"a model with the vocabulary of the one it drafts for: {what}"
            )
