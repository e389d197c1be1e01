"""What an engine counts."""

from __future__ import annotations

from dataclasses import dataclass, fields


@dataclass(slots=True)
class EngineCounters:
    """Totals since the start. Tokens are counted where they are computed or saved."""

    requests: int = 0
    finished: int = 0
    aborted: int = 0
    failed: int = 0
    steps: int = 0
    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_hit_tokens: int = 0
    capped_by_load: int = 0
    capped_by_context: int = 0
    draft_tokens: int = 0
    draft_tokens_accepted: int = 0
    draft_steps: int = 0
    prefix_miss_tokens: int = 0
    prefill_cache_hits: int = 0
    prefill_cache_misses: int = 0
    prefill_cache_hit_tokens: int = 0
    prefill_cache_miss_tokens: int = 0
    lora_requests: int = 0
    out_of_memory: int = 0
    overlapped_steps: int = 0
    overlap_dropped: int = 0

    def figures(self) -> dict[str, int]:
        """Each total by its name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def note_start(self, num_prompt: int, cached: int) -> None:
        """Count what the caches gave to a request of ``num_prompt`` tokens whose first step has run."""
        if cached == num_prompt:  # else the last token, at least, is computed
            self.prefill_cache_hits += 1
            self.prefill_cache_hit_tokens += cached
            return
        # The prefix cache is asked for what the exact-prompt cache has not.
        self.prefill_cache_misses += 1
        self.prefill_cache_miss_tokens += num_prompt
        self.prefix_hits += cached > 0
        self.prefix_misses += cached == 0
        self.prefix_hit_tokens += cached
        self.prefix_miss_tokens += num_prompt - cached
