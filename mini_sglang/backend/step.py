"""The step interface: what the engine asks of a backend, in plain integers, without torch.

The engine decides which tokens of which sequences run; the backend turns them into next tokens. The
backend never learns what a request is.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from mini_sglang.types import SamplingParams, TokenLogprob


class TokenGrammar(Protocol):
    """How far one answer has come in the grammar it must follow. Not thread-safe."""

    @property
    def done(self) -> bool:
        """Whether the text is complete and nothing can be added to it."""

    def accept(self, token_id: int) -> str | None:
        """Go on past a token of the answer; a sentence where the grammar cannot follow it."""

    def fill_mask(self, words: memoryview, end_ids: Sequence[int]) -> str | None:
        """Write which tokens may come next; a sentence where that cannot be said, or none may.

        Args:
            words: int32, ``ceil(vocab_size / 32)`` of them; bit ``i % 32`` of word ``i // 32`` becomes 1
                where token ``i`` may come next.
            end_ids: tokens that end the answer; they may come wherever the text may end.
        """

    def copy(self) -> TokenGrammar:
        """Another answer that has come as far."""


GrammarFactory = Callable[[SamplingParams], TokenGrammar]
"""Makes the grammar of a request whose ``params.grammar`` is set, at its start. It may take as long as a
compile does, so it is never called within a step. Raises InvalidValueError for a grammar that cannot be used,
OverloadedError where too many wait. Any thread may call it."""


@dataclass(slots=True)
class SampleSpec:
    """How to choose the token that follows one sequence's last row.

    Attributes:
        params: the caller's sampling parameters.
        seed: the resolved seed; with ``index`` it fixes the random draw, whatever else is in the batch.
        index: how many tokens the sequence has generated before this one.
        prompt_ids: prompt, read only when ``params.penalised``.
        output_ids: tokens generated so far, read only when ``params.penalised``.
        banned_ids: ids that may not be chosen now (end-of-text before ``min_new_tokens``).
        grammar: what the answer must follow; it overrules every bias.
        end_ids: with ``grammar``, ids that end the answer.
    """

    params: SamplingParams
    seed: int
    index: int
    prompt_ids: Sequence[int] = ()
    output_ids: Sequence[int] = ()
    banned_ids: tuple[int, ...] = ()
    grammar: TokenGrammar | None = None
    end_ids: tuple[int, ...] = ()


@dataclass(slots=True)
class SequenceStep:
    """One sequence's share of a step: a prefill chunk (many tokens) or a decode (one).

    Attributes:
        token_ids: tokens to run, at least one; none where ``from_logits`` is set.
        start: position of the first of them; the KV of positions before it is in ``pages`` already.
        pages: page table as int32 (``array("i")``); page ``p // page_size`` holds position ``p``. It covers
            at least ``start + len(token_ids)`` positions.
        sample: set when a token is to be chosen after the last row.
        prompt_targets: for prompt logprobs, the token that follows each row (one fewer than
            ``token_ids`` where the last row's successor is not part of the prompt); else empty.
        prompt_top: with ``prompt_targets``, how many most probable tokens to report per row.
        draft_samples: with ``sample``, how to choose after each of the last tokens, which are guesses
            (drafts) then, fewer than ``token_ids``: ``sample`` belongs to the row before the first of them.
            Not together with ``prompt_targets``.
        keep_logits: with ``sample``, keep the last row's logits under this number, for ``from_logits`` later.
        from_logits: choose the token from the logits kept under this number, as they were before this call,
            instead of running any.
        adapter: the id of the LoRA adapter the tokens run with; 0 is none.
        follows: for ``Submitter.submit``, the place of a sequence in the step submitted just before: the
            token chosen there is this one's only token, in place of the one in ``token_ids``.
    """

    token_ids: Sequence[int]
    start: int
    pages: array[int]
    sample: SampleSpec | None = None
    prompt_targets: Sequence[int] = ()
    prompt_top: int = 0
    draft_samples: Sequence[SampleSpec] = ()
    keep_logits: int | None = None
    from_logits: int | None = None
    adapter: int = 0
    follows: int | None = None


OUT_OF_MEMORY = "out_of_memory"
"""An ``error_kind``: one sequence alone does not fit the device's memory."""


@dataclass(slots=True)
class SequenceResult:
    """The outcome of one ``SequenceStep``, in the same order.

    ``error`` is set, and ``token_id`` is not, where the logits of this sequence are not finite. ``drafted``
    has what was chosen after each draft, as if the drafts before it were right. ``error_kind`` goes into
    ``TokenEvent``; of ``OUT_OF_MEMORY`` the sequence's older positions are lost too. ``revised`` says that a
    step which follows this one took another token for ``token_id``: what that gives for the sequence is void.
    """

    token_id: int | None = None
    logprob: TokenLogprob | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    error: str | None = None
    drafted: Sequence[SequenceResult] = ()
    error_kind: str | None = None
    revised: bool = False


class Flight(Protocol):
    """A step that may still be under way."""

    def wait(self) -> list[SequenceResult]:
        """Its results, once it is done. Raises what ``Backend.run`` raises. A second call does the same."""


class Submitter(Protocol):
    """Runs steps one after another, in the order they come, while its caller goes on.

    The thread that calls ``Backend.run`` calls this too; ``run`` only while no step is under way. Pages that
    a step under way reads stay as they are, and those it writes are nobody else's. Of a page that it writes
    some positions of, ``PageStore`` copies the others right.
    """

    def submit(self, steps: Sequence[SequenceStep]) -> Flight:
        """Begin a step as ``Backend.run`` would do it, its ``follows`` filled in.

        It keeps ``steps`` and what they hold until the step is done. Raises what ``run`` raises, here or from
        ``Flight.wait``; where the step before failed, and one of these follows it, that is a failure too.
        """

    def close(self) -> None:
        """End what it runs on, once what was submitted is done."""


class Transfer(Protocol):
    """A copy that may still be under way."""

    @property
    def done(self) -> bool: ...

    def wait(self) -> None:
        """Wait for its end. Raises what the copy raised."""


class PageStore(Protocol):
    """Copies whole KV pages, of all layers, between steps; the thread that calls ``run`` calls this too.

    What is not said to be a ``Transfer`` is done for whatever is called next: a page it read may be written,
    one it wrote may be read.
    """

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers."""

    def copy(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy pages of the pool to others of it."""

    def open_host(self, num_slots: int) -> None:
        """Make room in host memory for ``num_slots`` pages, ids ``0 … num_slots - 1``; once.

        Raises:
            InvalidValueError: there is not that much memory.
        """

    def spill(self, pages: Sequence[int], slots: Sequence[int]) -> None:
        """Copy pages of the pool to slots of the host's."""

    def restore(self, slots: Sequence[int], pages: Sequence[int], *, background: bool) -> Transfer:
        """Copy slots of the host's to pages of the pool.

        With ``background`` steps may run meanwhile that use neither; else it is done on return.
        """

    def read(self, pages: Sequence[int], slots: Sequence[int]) -> Iterator[bytes]:
        """What pages of the pool, then slots of the host's, hold: ``page_bytes`` each, in order."""

    def write(self, page: int, data: bytes) -> None:
        """Fill a page of the pool with what ``read`` gave."""

    def write_host(self, slot: int, data: bytes) -> None:
        """Fill a slot of the host's with what ``read`` gave."""

    def identity(self) -> dict[str, str]:
        """What a page's bytes depend on beside its tokens: the model's weights, types and layout."""


def page_store(backend: Backend) -> PageStore | None:
    """The backend's ``store``; None where it has none, hence no exact-prompt cache and no host tier."""
    store: PageStore | None = getattr(backend, "store", None)
    return store


def submitter_of(backend: Backend) -> Submitter | None:
    """The backend's ``submitter``; None where it has none, hence runs one step at a time."""
    submitter: Submitter | None = getattr(backend, "submitter", None)
    return submitter


def release(backend: Backend) -> None:
    """End what the backend has beyond this process; it runs no step after that."""
    submitter = submitter_of(backend)
    if submitter is not None:
        submitter.close()
    close: Callable[[], None] | None = getattr(backend, "close", None)
    if close is not None:
        close()


def free_memory(backend: Backend) -> None:
    """Give back the device's memory that the backend holds and does not use."""
    free: Callable[[], None] | None = getattr(backend, "free_memory", None)
    if free is not None:
        free()


class Backend(Protocol):
    """A model with its KV pool. Not thread-safe: one thread calls ``run``.

    One that can copy pages and keep logits has a ``store`` beside these, a ``PageStore``; one whose steps are
    to run while the engine goes on has a ``submitter``. One that is more than this process has ``check``,
    which raises ``BackendLostError`` where the rest of it is gone, and ``close``, which ends that. One that
    keeps memory it does not use has ``free_memory``.
    """

    @property
    def page_size(self) -> int:
        """Tokens per KV page."""

    @property
    def num_pages(self) -> int:
        """Pages in the KV pool, ids ``0 … num_pages - 1``."""

    @property
    def vocab_size(self) -> int: ...

    @property
    def context_length(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""

    @property
    def shares_prefixes(self) -> bool:
        """Whether a sequence may start from pages that another one has written."""

    @property
    def chunks_prompts(self) -> bool:
        """Whether a prompt may be run in several steps."""

    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        """Write the KV of every step's tokens into its pages and choose the tokens asked for.

        Rows of one call must not write the same page position; pages may be shared between sequences for
        reading. Raises ``BackendLostError`` where no step will run any more, ``OutOfMemoryError`` where
        fewer tokens may fit, else whatever the device raises: nothing about the KV of these steps' new
        positions, and the logits they were to keep, may then be assumed; older positions are intact, unless
        an ``OutOfMemoryError`` says ``past_lost``.
        """


class LoadedBackend(Backend, Protocol):
    """A backend that knows what it has loaded."""

    submitter: Submitter | None

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
