"""One request from arrival to its terminal event."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import InitVar, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING

from mini_sglang.backend.step import SampleSpec, TokenGrammar
from mini_sglang.engine.order import Order
from mini_sglang.engine.radix import RadixNode
from mini_sglang.types import FinishReason, SamplingParams, TokenLogprob

if TYPE_CHECKING:
    from mini_sglang.engine.speculation import Speculation


class Phase(Enum):
    """WAITING ⇄ RUNNING (retraction goes back), then FINISHED, once and for good."""

    WAITING = "waiting"
    RUNNING = "running"
    FINISHED = "finished"


@dataclass(slots=True, eq=False)
class Request:
    """The engine's view of a request: token ids, pages and progress, no text.

    Prefill and decode are one thing here: a step computes some of ``tokens[num_computed:]``, and when
    it computes the last of them a token is sampled and appended.

    Attributes:
        tokens: the prompt followed by the tokens generated so far.
        num_prompt: how many of ``tokens`` are the prompt.
        max_new_tokens: ``params.max_new_tokens`` after the caps of context and pool.
        prefill_only: end after the prompt is computed, without a token (``insert_prefix``).
        namespace: requests share prefixes only within one.
        pages: page table; the first ``num_tree_pages`` belong to the radix tree, the rest to us.
        num_computed: leading tokens whose KV is in ``pages``; below ``len(tokens)`` until finished.
        num_cached: prompt tokens taken from the prefix cache when it was first admitted.
        started: whether a step of it has run.
        internal: nobody waits for it: it fills the cache.
        node: the radix node locked for the tree's pages.
        arrival: ``time.monotonic`` seconds, from when on it ages.
        capped_by: why ``max_new_tokens`` is less than was asked for, "load" or "context"; else None.
        order: its place in the scheduler, set when it is added there.
        speculation: what is known for guessing its tokens ahead; None where that is off.
        from_logits: kept logits that its first token is chosen from, in the step it is admitted to.
        tail_page: with ``from_logits``, the page to be copied into its own first one.
        memory_refusals: how often the device had no memory for a single token of it.
        keep_logits: where the logits of its prompt's last token are kept in the step that computes it.
        grammar: what the answer must follow, as far as its tokens have come; retraction does not touch it.
        flights: submitted steps that it is in and that are not done.
        lora: ``Adapter.key`` of its adapter, and ``adapter`` the backend's id of it; none without.
        end_ids: ids that end the answer.
    """

    request_id: str
    tokens: list[int]
    num_prompt: int
    params: SamplingParams
    max_new_tokens: int
    seed: int
    eos_ids: InitVar[frozenset[int]]
    prefill_only: bool = False
    namespace: str = ""
    arrival: float = 0.0
    grammar: TokenGrammar | None = None
    lora: str = ""
    adapter: int = 0
    capped_by: str | None = None

    order: Order = (0.0, 0.0, 0)
    phase: Phase = Phase.WAITING
    pages: array[int] = field(default_factory=lambda: array("i"))
    num_tree_pages: int = 0
    num_computed: int = 0
    num_cached: int | None = None
    started: bool = False
    internal: bool = False
    flights: int = 0
    node: RadixNode | None = None
    from_logits: int | None = None
    tail_page: int | None = None
    keep_logits: int | None = None
    _prompt_key: tuple[str, tuple[int, ...]] | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs_done: bool = False
    finish: FinishReason | None = None
    matched_token_id: int | None = None
    speculation: Speculation | None = None
    memory_refusals: int = 0
    end_ids: tuple[int, ...] = field(init=False)
    _spec: SampleSpec = field(init=False)

    def __post_init__(self, eos_ids: frozenset[int]) -> None:
        eos = () if self.params.ignore_eos else tuple(sorted(eos_ids))
        self.end_ids = eos + self.params.stop_token_ids
        self._spec = SampleSpec(self.params, self.seed, 0)

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.num_prompt

    @property
    def prompt_key(self) -> tuple[str, tuple[int, ...]]:
        """Namespace and prompt."""
        if self._prompt_key is None:
            self._prompt_key = self.namespace, tuple(self.tokens[: self.num_prompt])
        return self._prompt_key

    @property
    def num_remaining(self) -> int:
        """Tokens to compute before the next one can be sampled: 1 in decode, more in prefill, 0 where the
        logits of the prompt are kept."""
        return len(self.tokens) - self.num_computed

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether every prompt position must still be computed, so that no cached KV helps."""
        return self.params.prompt_logprobs and not self.prompt_logprobs_done

    def append(self, token_id: int) -> str | None:
        """Add a generated token and decide whether the request ends with it.

        Returns a sentence where its grammar cannot follow the token.
        """
        self.tokens.append(token_id)
        if token_id in self.end_ids:
            self.finish, self.matched_token_id = FinishReason.STOP, token_id
            return None
        error = None if self.grammar is None else self.grammar.accept(token_id)
        if error is not None:
            return error
        if self.grammar is not None and self.grammar.done:
            self.finish = FinishReason.STOP
        elif self.num_output >= self.max_new_tokens:
            self.finish = FinishReason.LENGTH
        return None

    def spec_after(self, drafts: Sequence[int], grammar: TokenGrammar | None) -> SampleSpec:
        """How to choose the token that follows ``drafts``, as if they were part of the answer.

        Args:
            drafts: guesses of the next tokens; none of them ends the answer.
            grammar: the request's own, past the drafts.
        """
        params = self.params
        index = self.num_output + len(drafts)
        if (
            params.greedy
            and grammar is None
            and not params.penalised
            and self.num_output >= params.min_new_tokens
        ):
            return self._spec  # which says the same of every place
        spec = SampleSpec(params, self.seed, index)
        spec.banned_ids = self.end_ids if index < params.min_new_tokens else ()
        if params.penalised:
            spec.prompt_ids = self.tokens[: self.num_prompt]
            spec.output_ids = [*self.tokens[self.num_prompt :], *drafts]
        if grammar is not None:
            spec.grammar, spec.end_ids = grammar, self.end_ids
        return spec

    def sample_spec(self) -> SampleSpec:
        """How to choose the next token; the same object every time, as of now."""
        spec, params = self._spec, self.params
        spec.index = self.num_output
        # What would end the answer before min_new_tokens may not come.
        spec.banned_ids = self.end_ids if spec.index < params.min_new_tokens else ()
        if params.penalised:
            spec.prompt_ids = self.tokens[: self.num_prompt]
            spec.output_ids = self.tokens[self.num_prompt :]
        if self.grammar is not None:
            spec.grammar, spec.end_ids = self.grammar, self.end_ids
        return spec
