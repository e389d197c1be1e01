"""What every peer is asked: turns of one conversation, as the same ids for all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from mini_sglang.errors import ContextLengthError, InvalidValueError

if TYPE_CHECKING:
    from mini_sglang.text.tokenizer import Tokenizer

SUITE = (
    "Explain to a curious twelve-year-old, step by step, how a bicycle stays upright while it rolls.",
    "Now tell a story of two friends who win a race because one of them has understood your explanation.",
    "List the ten most important words of our conversation, and say of each in one sentence why it matters.",
)
"""The turns where no prompt is given."""

SCRIPT = (
    "A rolling bicycle falls a little to one side all the time, and each time its front wheel steers to "
    "that side. The wheels roll back under the rider's weight, and the bicycle stands again. You can see it "
    "in the track of a wet wheel: it is never straight, but swings gently from left to right and back again.",
    "Ada and Tom had trained all summer. On the day of the race the road was wet, and most riders held "
    "their handlebars as if they were made of stone. Ada had learned to let the wheel find its way. She "
    "leaned, the wheel followed, Tom stayed close behind her, and they crossed the line before anyone else.",
)
"""The answers that turns after the first build on, where no reference gives its own."""

MARGIN = 16
"""Tokens of the context that are left free: some engines, ours among them, keep a few."""


@dataclass(frozen=True)
class Conversation:
    """The user's turns, and the answers that later turns have before them; the same for all peers.

    Every round begins with an opening of its own, so that no prefix cache helps from one round to the next.
    """

    turns: tuple[str, ...]
    answers: tuple[str, ...] = SCRIPT

    def with_answers(self, tokenizer: Tokenizer, ids: Sequence[Sequence[int]]) -> Conversation:
        """The same turns after these answers, each up to its first end-of-text."""
        return replace(self, answers=tuple(answer_text(tokenizer, one) for one in ids))

    def prompt(self, tokenizer: Tokenizer, number: int, turn: int) -> list[int]:
        """Ids of turn ``turn`` (from 0) of round ``number``, with all before it.

        Raises:
            InvalidValueError: a text that has no UTF-8 form, or that the model's chat template refuses.
        """
        opening = f"{number}. conversation. You are a helpful assistant who answers at length."
        if tokenizer.chat_template is None:
            return tokenizer.encode(self._plain(opening, turn))
        said = self._messages(turn)
        try:
            return tokenizer.encode_chat([{"role": "system", "content": opening}, *said])
        except InvalidValueError:
            # Some templates know no system message.
            first = {"role": "user", "content": f"{opening}\n\n{said[0]['content']}"}
            return tokenizer.encode_chat([first, *said[1:]])

    def _messages(self, turn: int) -> list[dict[str, str]]:
        messages = []
        for asked, answered in zip(self.turns[:turn], self.answers, strict=False):
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": answered})
        return [*messages, {"role": "user", "content": self.turns[turn]}]

    def _plain(self, opening: str, turn: int) -> str:
        if len(self.turns) == 1:
            return f"{opening}\n\n{self.turns[0]}"
        names = {"user": "User", "assistant": "Assistant"}
        lines = [f"{names[message['role']]}: {message['content']}" for message in self._messages(turn)]
        return "\n\n".join([opening, *lines, "Assistant:"])


def answer_text(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    end = next((place for place, token in enumerate(ids) if token in tokenizer.eos_ids), len(ids))
    return tokenizer.decode(ids[:end]).strip()


def check_room(conversation: Conversation, tokenizer: Tokenizer, new: int, context: int | None) -> int:
    """The most tokens that a turn can come to, its answer too, where every answer before it has ``new``.

    Raises:
        ContextLengthError: that is more than the model's context of ``context`` tokens.
        InvalidValueError: as ``Conversation.prompt``.
    """
    bare = replace(conversation, answers=("",) * len(conversation.turns))
    last = len(conversation.turns) - 1
    history = max(new, *(len(tokenizer.encode(text)) for text in SCRIPT)) if last else 0
    # An answer's text can come to more ids than it was made of, though hardly ever.
    needed = len(bare.prompt(tokenizer, 1000, last)) + last * history + new
    if context is None or needed + MARGIN <= context:
        return needed
    room = context - MARGIN
    if last or new >= room:
        turns = f"{last + 1} turns" if last else "the prompt"
        allowed = f"so small that {turns} and the answers fit the model's context of {context} tokens"
        raise ContextLengthError("max_new_tokens", new, allowed)
    allowed = (
        f"at most {room - new}, what the model's context of {context} tokens leaves beside {new} new ones"
    )
    raise ContextLengthError("the prompt's length in tokens", needed - new, allowed)
