"""What chats and responses share: checked fields to a prompt that can run, and its answers' parsers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mini_sglang.api.openai.answer import AnswerParser
from mini_sglang.api.openai.models import Traits
from mini_sglang.api.openai.params import response_constraint, sampling_params
from mini_sglang.api.openai.reasoning import CLOSE_TAG, OPEN_TAG, ThinkParser
from mini_sglang.api.openai.tools import Tools
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import SamplingParams

if TYPE_CHECKING:
    from mini_sglang.api.service import Service

_LAST_TOKENS = 16


@dataclass(frozen=True, slots=True)
class Conversation:
    """A checked chat.

    Attributes:
        template: further arguments of ``Tokenizer.encode_chat``.
        params: with ``max_new_tokens`` still open where the client named none.
        begun: the text of the last message, which the answer goes on with; ``None`` where it begins anew.
    """

    messages: Sequence[Mapping[str, Any]]
    tools: Tools
    template: Mapping[str, Any]
    params: SamplingParams
    separate: bool
    traits: Traits
    begun: str | None = None

    async def encode(self, service: Service) -> list[int]:
        return await service.encode(self.messages, template=self.template)

    def parser(self, service: Service, ids: Sequence[int]) -> AnswerParser:
        """A parser for one answer to the prompt ``ids``."""
        thinking = None
        # A grammar leaves no room for thoughts.
        if self.traits.thinks and self.separate and self.params.grammar is None:
            thinking = self._think_parser(service, ids)
        return AnswerParser(thinking, self.tools.parser(self.traits.formats))

    def _think_parser(self, service: Service, ids: Sequence[int]) -> ThinkParser | None:
        begun = (self.begun or "").strip()
        if begun and not begun.endswith(OPEN_TAG):
            _, opened, thought = begun.rpartition(OPEN_TAG)
            return ThinkParser(continues=True) if opened and CLOSE_TAG not in thought else None
        end = service.tokenizer.decode(ids[-_LAST_TOKENS:], skip_special=False)
        return ThinkParser(starts_inside=end.rstrip().endswith(OPEN_TAG))


async def reasoning_tokens(service: Service, thoughts: Sequence[str]) -> int:
    """How many tokens the thoughts take, counted from their text: without the tags, and the same however
    the answers were streamed."""
    texts = [text for text in thoughts if text]
    if not texts:
        return 0
    return await service.in_thread(
        lambda: sum(len(service.tokenizer.encode(text, add_special=False)) for text in texts)
    )


def make_conversation(
    messages: Sequence[Mapping[str, Any]],
    values: Mapping[str, Any],
    tools: Tools,
    traits: Traits,
    *,
    format: Mapping[str, Any] | None,
    format_field: str,
    effort: str | None,
    max_tokens: int | None,
    logprobs: bool,
) -> Conversation:
    """Bring the checked parts together.

    Raises:
        InvalidValueError: parts that do not go together, or that this model cannot do.
    """
    if tools.shown is not None and not traits.takes_tools:
        raise InvalidValueError(
            "tools", list(tools.names), "left out: this model's chat template shows it no tools"
        )
    constraint = response_constraint(format, format_field)
    schema = tools.schema()
    if schema is not None:
        if constraint:
            raise InvalidValueError(
                format_field, dict(format or {}), "left out where tool_choice demands a call"
            )
        constraint = {"json_schema": schema}
    top = values.get("top_logprobs", 0)
    if top and not logprobs:
        raise InvalidValueError("top_logprobs", top, "0 unless logprobs is true")
    begun = _begun(messages, values)
    template = {
        "tools": tools.shown,
        "template_kwargs": traits.template_kwargs(values, effort),
        "add_generation_prompt": values.get("add_generation_prompt", begun is None),
        "continue_final_message": begun is not None,
    }
    params = sampling_params(
        values, max_tokens=max_tokens, constraint=constraint, logprobs=logprobs, top_logprobs=top
    )
    separate = values.get("separate_reasoning", True)
    return Conversation(messages, tools, template, params, separate, traits, begun)


def _begun(messages: Sequence[Mapping[str, Any]], values: Mapping[str, Any]) -> str | None:
    """The text that the answer goes on with, where ``continue_final_message`` asks for that."""
    if not values.get("continue_final_message"):
        return None
    last = messages[-1]
    text = last.get("content")
    if last["role"] != "assistant" or "tool_calls" in last or not isinstance(text, str):
        allowed = "left out unless the last message is the assistant's, with a text and no calls"
        raise InvalidValueError("continue_final_message", True, allowed)
    if values.get("add_generation_prompt"):
        allowed = "false where add_generation_prompt is true: an answer goes on or begins anew"
        raise InvalidValueError("continue_final_message", True, allowed)
    return text
