"""What the caches of an engine may hold."""

from __future__ import annotations

from dataclasses import dataclass

from mini_sglang.backend.step import Backend, page_store
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

# Of ``KVCacheManager.stats``: what only grows.
CACHE_TOTALS = (
    "prefill_cache_evictions",
    "prefix_loaded_tokens",
    "host_hits",
    "host_spilled_tokens",
    "host_restored_tokens",
    "host_dropped_tokens",
)


@dataclass(frozen=True, slots=True)
class CacheLimits:
    """What the prefix cache may hold; see the settings of the same names.

    ``max_leaves`` 0 is no bound. ``token_budget`` counts cached tokens that no running request uses.
    ``max_prompts`` and ``prompt_token_budget`` are of the exact-prompt cache, ``host_tokens`` of the host
    tier; both need a ``PageStore``.
    """

    enabled: bool = True
    max_leaves: int = 0
    max_prompt_tokens: int = 4096
    token_budget: int = 65536
    policy: str = "lru"
    max_prompts: int = 0
    prompt_token_budget: int = 65536
    host_tokens: int = 0

    @classmethod
    def of(cls, settings: Settings, backend: Backend) -> CacheLimits:
        """What the settings say, for this backend."""
        return cls(
            enabled=settings.prefix_cache and backend.shares_prefixes,
            max_leaves=settings.prefix_cache_size,
            max_prompt_tokens=settings.prefix_cache_max_tokens,
            token_budget=settings.prefix_cache_token_budget,
            policy=settings.prefix_cache_policy,
            max_prompts=settings.prefill_cache_size,
            prompt_token_budget=settings.prefill_cache_token_budget,
            host_tokens=settings.page_token_budget,
        )


def check_limits(limits: CacheLimits, backend: Backend) -> None:
    """Refuse what this backend cannot do.

    Raises:
        InvalidValueError: a host tier without a prefix cache, or for a backend that cannot copy pages.
    """
    if limits.host_tokens and page_store(backend) is None:
        raise InvalidValueError(
            "PAGE_TOKEN_BUDGET", limits.host_tokens, "0 for a model whose KV is not in pages"
        )
    if limits.host_tokens and not limits.enabled:
        raise InvalidValueError("PAGE_TOKEN_BUDGET", limits.host_tokens, "0 where PREFIX_CACHE is off")
    if 0 < limits.host_tokens < backend.page_size:
        raise InvalidValueError(
            "PAGE_TOKEN_BUDGET", limits.host_tokens, f"at least {backend.page_size}, one page"
        )
