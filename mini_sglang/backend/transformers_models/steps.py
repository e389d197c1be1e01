"""The contract of ``SequenceStep`` for backends that keep a sequence's past in an object of its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import Backend, SequenceStep, Submitter
from mini_sglang.backend.transformers_models.decoder import TransformersConfig
from mini_sglang.errors import InvalidValueError


class OwnCacheBackend:
    """What such backends have in common.

    Args:
        num_pages, page_size: how many tokens the sequences may have together, in what portions.
        about: what ``describe`` adds.
    """

    shares_prefixes = False

    def __init__(
        self, config: TransformersConfig, num_pages: int, page_size: int, about: Mapping[str, str | int]
    ) -> None:
        self._config = config
        self._num_pages = num_pages
        self._page_size = page_size
        self._about = dict(about)
        self._sampler = Sampler(config.vocab_size)
        self.submitter: Submitter | None = None

    @property
    def page_size(self) -> int:
        return self._page_size

    @property
    def num_pages(self) -> int:
        return self._num_pages

    @property
    def vocab_size(self) -> int:
        return self._config.vocab_size

    @property
    def context_length(self) -> int:
        return self._config.context_length

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return self._config.eos_ids

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
        return {
            **self._about,
            "context_length": self.context_length,
            "vocab_size": self.vocab_size,
            "page_size": self.page_size,
            "kv_tokens": self.num_pages * self.page_size,
        }


def check_steps(
    steps: Sequence[SequenceStep], backend: Backend, reached: Callable[[SequenceStep], int | None]
) -> None:
    """Refuse a step that no sequence can have.

    Args:
        reached: how many positions of a step's sequence are held; ``None`` for none of that name.

    Raises:
        InvalidValueError: it names the field.
    """
    taken: set[int] = set()
    for step in steps:
        count, end = len(step.token_ids), step.start + len(step.token_ids)
        if count < 1:
            raise InvalidValueError("token_ids", count, "at least one token")
        if step.start < 0 or end > backend.context_length:
            raise InvalidValueError("positions", (step.start, end), f"from 0 to {backend.context_length}")
        if min(step.token_ids) < 0 or max(step.token_ids) >= backend.vocab_size:
            bad = min(step.token_ids) if min(step.token_ids) < 0 else max(step.token_ids)
            raise InvalidValueError("token id", bad, f"from 0 to {backend.vocab_size - 1}")
        needed = -(-end // backend.page_size)
        pages = step.pages[:needed]
        if len(pages) < needed:
            raise InvalidValueError("pages", f"{len(pages)} pages", f"at least {needed} pages here")
        if min(pages) < 0 or max(pages) >= backend.num_pages:
            raise InvalidValueError("page", pages.tolist(), f"from 0 to {backend.num_pages - 1}")
        if len(step.prompt_targets) > count:
            raise InvalidValueError(
                "prompt_targets", len(step.prompt_targets), f"at most one per token, {count}"
            )
        if taken.intersection(pages):
            raise InvalidValueError("pages", "shared by two writers", "written by one sequence at a time")
        taken.update(pages)
        if step.start and (held := reached(step)) != step.start:
            raise InvalidValueError("start", step.start, f"{held}, where this sequence's cache ends")
