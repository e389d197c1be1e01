"""What a model can be asked: the checks of a request that need no engine, only what it said of itself."""

from __future__ import annotations

import logging
import math
import secrets
from collections.abc import Sequence

from mini_sglang.config import Settings
from mini_sglang.engine.handle import EngineInfo, Work
from mini_sglang.errors import ContextLengthError, InvalidValueError
from mini_sglang.types import Adapter, SamplingParams

logger = logging.getLogger(__name__)

# Values of ``Work.capped_by``.
BY_LOAD, BY_CONTEXT = "load", "context"


def make_work(
    info: EngineInfo,
    settings: Settings,
    request_id: str,
    prompt_ids: Sequence[int],
    params: SamplingParams,
    *,
    prefill_only: bool = False,
    namespace: str = "",
    adapter: Adapter | None = None,
    inflight: int = 0,
) -> Work:
    """Check a prompt against the model, cap its ``max_new_tokens`` and draw its seed.

    Args:
        inflight: requests in flight with this one, waiting ones too, for ADAPTIVE_MAX_NEW_TOKENS.

    Raises:
        InvalidValueError: an empty prompt, or an id outside the vocabulary.
        ContextLengthError: the prompt leaves no room for a token, or for ``prefill_only`` is longer than
            the context.
    """
    _check_ids("prompt", prompt_ids, info.vocab_size)
    if not prompt_ids:
        raise InvalidValueError("prompt", prompt_ids, "at least one token long")
    _check_ids("stop_token_ids", params.stop_token_ids, info.vocab_size)
    _check_ids("logit_bias", list(params.logit_bias), info.vocab_size)
    if params.speculative == "draft_model" and settings.draft_model_name is None:
        raise InvalidValueError(
            "speculative", "draft_model", "on, off or prompt_lookup: there is no DRAFT_MODEL_NAME"
        )
    room = _cap_new_tokens(info, settings, len(prompt_ids), params, prefill_only)
    given = room if prefill_only else min(room, _under_load(settings, params.max_new_tokens, inflight))
    capped_by = None
    if not prefill_only and given < params.max_new_tokens:
        capped_by = BY_LOAD if given < room else BY_CONTEXT
        logger.info(
            "cap request=%s asked=%d max_new_tokens=%d by=%s inflight=%d",
            request_id, params.max_new_tokens, given, capped_by, inflight,
        )  # fmt: skip
    return Work(
        request_id=request_id,
        prompt_ids=tuple(prompt_ids),
        params=params,
        max_new_tokens=given,
        prefill_only=prefill_only,
        namespace=namespace if adapter is None else adapter.namespace(namespace),
        lora="" if adapter is None else adapter.key,
        seed=secrets.randbits(63) if params.seed is None else params.seed,
        capped_by=capped_by,
    )


def make_prefix_work(
    info: EngineInfo,
    settings: Settings,
    request_id: str,
    prompt_ids: Sequence[int],
    namespace: str = "",
    adapter: Adapter | None = None,
) -> Work:
    """Work that only puts its prompt in the prefix cache.

    Raises:
        InvalidValueError: as ``make_work``, or the cache is off or it takes none of this length.
    """
    if not settings.prefix_cache:
        raise InvalidValueError("PREFIX_CACHE", int(settings.prefix_cache), "1 for insert_prefix")
    if not info.shares_prefixes:
        allowed = "left out: this model is served with one cache per request, which shares no prefix"
        raise InvalidValueError("prefix", f"{len(prompt_ids)} tokens", allowed)
    if len(prompt_ids) > settings.prefix_cache_max_tokens:
        allowed = f"at most {settings.prefix_cache_max_tokens} tokens (PREFIX_CACHE_MAX_TOKENS)"
        raise InvalidValueError("prefix", f"{len(prompt_ids)} tokens", allowed)
    if 0 < len(prompt_ids) < info.page_size:
        allowed = f"at least {info.page_size} tokens, a page, which is what the cache keeps"
        raise InvalidValueError("prefix", f"{len(prompt_ids)} tokens", allowed)
    return make_work(
        info,
        settings,
        request_id,
        prompt_ids,
        SamplingParams(),
        prefill_only=True,
        namespace=namespace,
        adapter=adapter,
    )


def _cap_new_tokens(
    info: EngineInfo, settings: Settings, num_prompt: int, params: SamplingParams, prefill_only: bool
) -> int:
    limit = info.max_sequence_tokens
    room = limit - num_prompt
    if room < (0 if prefill_only else 1):
        allowed = f"{'at most' if prefill_only else 'shorter than'} the context, {limit} tokens"
        raise ContextLengthError("prompt", f"{num_prompt} tokens", allowed)
    if prefill_only:
        return 0
    if params.max_new_tokens <= room - (
        settings.max_context_margin if settings.aggressive_max_new_tokens else 0
    ):
        return params.max_new_tokens
    if not settings.aggressive_max_new_tokens:
        allowed = f"at most {room}, what a context of {limit} tokens leaves after {num_prompt} of prompt"
        raise ContextLengthError("max_new_tokens", params.max_new_tokens, allowed)
    return max(1, min(params.max_new_tokens, room - settings.max_context_margin))


def _under_load(settings: Settings, asked: int, inflight: int) -> int:
    """What ADAPTIVE_MAX_NEW_TOKENS leaves of the tokens asked for."""
    threshold = settings.adaptive_max_inflight_threshold or max(1, settings.num_engines)
    if not settings.adaptive_max_new_tokens or inflight <= threshold:
        return asked
    # A product like 100 * 0.29 is a hair below the whole number that is meant.
    return max(1, math.floor(asked * settings.adaptive_max_new_tokens_factor + 1e-6))


def _check_ids(field: str, ids: Sequence[int], vocab_size: int) -> None:
    # In C for the many that are as they should be.
    if not ids or (set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab_size):
        return
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise InvalidValueError(field, token_id, f"made of token ids from 0 to {vocab_size - 1}")
