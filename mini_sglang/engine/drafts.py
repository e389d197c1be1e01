"""Guesses of the next tokens of one request, each with how to choose the token after it."""

from __future__ import annotations

from collections.abc import Iterable

from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.engine.request import Request


class Drafts:
    """At most ``limit`` guesses, fewer where the answer would end within them.

    Attributes:
        tokens: the guesses; none of them ends the answer.
        samples: for each, how to choose the token that follows it.
        request: whose tokens they are.
        kind: what they come from, for the statistics.
    """

    __slots__ = ("_grammar", "kind", "limit", "request", "samples", "tokens")

    def __init__(self, request: Request, limit: int, kind: str) -> None:
        self.request = request
        self._grammar = request.grammar
        # The last token of an answer is chosen after a draft, so that none is wasted on it.
        self.limit = min(limit, request.max_new_tokens - request.num_output - 1)
        self.kind = kind
        self.tokens: list[int] = []
        self.samples: list[SampleSpec] = []

    def add(self, token_id: int) -> bool:
        """Guess one more token; False where it cannot be one, and nothing can follow."""
        request = self.request
        if len(self.tokens) >= self.limit or token_id in request.end_ids:
            return False
        if self._grammar is not None:
            grammar = self._grammar.copy()
            if grammar.accept(token_id) is not None or grammar.done:
                return False
            self._grammar = grammar
        self.tokens.append(token_id)
        self.samples.append(request.spec_after(self.tokens, self._grammar))
        return True

    def fill(self, token_ids: Iterable[int]) -> None:
        """Guess ``token_ids`` as far as they can be guessed."""
        for token_id in token_ids:
            if not self.add(token_id):
                return

    def accept(self, result: SequenceResult) -> tuple[list[SequenceResult], int, str | None]:
        """Append what was chosen to the request, up to the first token that was guessed otherwise.

        Returns:
            what was appended, how many guesses were right, and a sentence where what came next cannot be.
        """
        chosen = [result]
        for draft, after in zip(self.tokens, result.drafted, strict=True):
            if chosen[-1].token_id != draft:
                break
            chosen.append(after)
        request = self.request
        taken: list[SequenceResult] = []
        error: str | None = None
        for one in chosen:
            if one.token_id is None:
                error = one.error or "no token was chosen"
            else:
                request.num_computed += 1
                error = request.append(one.token_id)
            if error is not None:
                break
            taken.append(one)
            if request.finish is not None:
                break
        return taken, len(chosen) - 1, error

    def cut(self, count: int) -> None:
        """Keep the first ``count`` guesses."""
        del self.tokens[count:], self.samples[count:]
