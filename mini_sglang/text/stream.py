"""The text side of one request: token events in, text out, ended by a stop string where one comes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mini_sglang.text.stops import StopMatcher
from mini_sglang.types import SamplingParams, TokenEvent

if TYPE_CHECKING:
    from mini_sglang.text.tokenizer import Tokenizer


class TextStream:
    """Turns the events of one request into the pieces of its text.

    The pieces join to the decoded answer, cut before the first stop string; nothing given is ever taken
    back. Token ids and logprobs are the caller's to pass on with the event they came in, even where their
    text is held back for a while.

    Attributes:
        matched_stop: what ended the answer: a stop string, or the token id of end-of-text or of
            ``stop_token_ids``. ``None`` while it goes on and for every other end.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._detokenizer = tokenizer.detokenizer()
        self._matcher = StopMatcher(params.stop)
        self._ended = False
        self.matched_stop: str | int | None = None

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found: the answer is over, the engine's request can be aborted."""
        return isinstance(self.matched_stop, str)

    def push(self, event: TokenEvent) -> str:
        """The text that is certain after this event; the event with ``finish`` gives all that was held.

        The token that ended the answer (``event.matched_token_id``, the last of its event) gives no text.
        After the end, by event or by stop string, every event gives none.
        """
        if self._ended:
            return ""
        ids = event.token_ids
        if event.matched_token_id is not None and ids and ids[-1] == event.matched_token_id:
            ids = ids[:-1]
        text = self._detokenizer.push(ids)
        if event.finish is not None:
            text += self._detokenizer.finish()
        text, matched = self._matcher.push(text)
        if matched is None and event.finish is not None:
            text += self._matcher.finish()
        self.matched_stop = event.matched_token_id if matched is None else matched
        self._ended = matched is not None or event.finish is not None
        return text
