"""What the bodies of the OpenAI API may hold, which of their fields do nothing, and which are refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from mini_sglang.api.adapters import LORA_FIELDS
from mini_sglang.api.errors import RequestError
from mini_sglang.api.openai.tools import MAX_TOOLS
from mini_sglang.api.schemas import (
    CACHE_SALT,
    MAX_MESSAGES,
    AnyOf,
    Boolean,
    Field,
    Form,
    FreeObject,
    Integer,
    ListOf,
    Objects,
    Text,
    TokenIds,
    sampling_fields,
)
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import MAX_NEW_TOKENS_LIMIT, MAX_TOP_LOGPROBS

MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_NAME_CHARS = 256
MAX_SCHEMA_CHARS = 1 << 18

_TRUTH = Field(Boolean(), "", nullable=True)


@dataclass(frozen=True, slots=True)
class _Anything:
    """A value that changes nothing here."""

    def check(self, name: str, value: object) -> Any:
        return value

    def schema(self) -> dict[str, Any]:
        return {}


def _ignored(why: str) -> Field:
    return Field(_Anything(), "accepted, changes nothing: " + why, nullable=True)


IGNORED: Mapping[str, Field] = {
    "user": _ignored("a label for abuse reports, which nobody here reads"),
    "safety_identifier": _ignored("a label for abuse reports, which nobody here reads"),
    "metadata": _ignored("labels for a dashboard; /v1/responses gives them back"),
    "service_tier": _ignored("there is one tier"),
    "prompt_cache_key": _ignored("a hint for routing; the prefix cache finds what is the same by itself"),
    "prompt_cache_retention": _ignored("a hint; the prefix cache keeps what fits"),
}

REFUSED: Mapping[str, str] = {
    "best_of": "only as many answers are made as are given back; ask for n",
    "suffix": "the model continues a text and cannot fill one in",
    "functions": "it was replaced by tools",
    "function_call": "it was replaced by tool_choice",
    "audio": "the model writes text only",
    "prediction": "predicted outputs are not supported",
    "web_search_options": "the server does not search the web",
    "moderation": "the server does not moderate",
    "continue_final_message": "only /v1/chat/completions can go on with a message",
    "background": "an answer is given to who waits for it",
    "conversation": "use previous_response_id",
    "prompt": "prompt templates are not stored here; write the input out",
    "max_tool_calls": "it counts calls of built-in tools, of which there are none",
    "context_management": "the input is never compacted",
    "guided_decoding_backend": "there is one",
    "use_beam_search": "beams are not supported; use n",
    "length_penalty": "it belongs to beam search, which is not supported",
    "skip_special_tokens": "special tokens are never part of the text",
    "include_stop_str_in_output": "a stop string is never part of the text",
}


class OpenAIForm(Form):
    """A form in which null counts as not given, and a field that is not here is told why."""

    def read(self, body: object) -> dict[str, Any]:
        """The fields that were given, checked.

        Raises:
            RequestError: a field that is not supported or not known, named by ``field``.
            InvalidValueError: a field is missing or its value is not allowed.
        """
        if isinstance(body, dict):
            for name in [name for name in body if name not in self.fields]:
                _refuse(name, body.pop(name), self.fields)
        values = super().read(body)
        if "structured_outputs" in values:
            values["structured_outputs"] = STRUCTURED_OUTPUTS.read(values["structured_outputs"])
        if "stream_options" in values:
            if not values.get("stream"):
                raise InvalidValueError(
                    "stream_options", values["stream_options"], "left out unless stream is true"
                )
            values["stream_options"] = STREAM_OPTIONS.read(values["stream_options"])
        return values


def _refuse(name: str, value: object, fields: Mapping[str, Field]) -> None:
    reason = REFUSED.get(name)
    if reason is None:
        known = ", ".join(sorted(fields))
        raise RequestError(
            400,
            "unknown_parameter",
            f"There is no parameter {name[:100]!r}; there are {known}.",
            field=name[:100],
        )
    if value is not None:
        raise RequestError(400, "unsupported_parameter", f"{name} is not supported: {reason}.", field=name)


STREAM_OPTIONS = OpenAIForm(
    {
        "include_usage": Field(Boolean(), "a last chunk with the usage of the whole request"),
        "include_obfuscation": Field(Boolean(), "accepted, changes nothing: padding is never added"),
    }
)

_JSON_SCHEMA = AnyOf((FreeObject(), Text(MAX_SCHEMA_CHARS)), "a JSON schema, as an object or its text")
_PATTERN = Text(MAX_SCHEMA_CHARS, 1)
_CHOICES = ListOf(Text(4096, 1), 1024, 1)
STRUCTURED_OUTPUTS = OpenAIForm(
    {
        "json": Field(_JSON_SCHEMA, "a JSON schema the answer follows", nullable=True),
        "regex": Field(_PATTERN, "a regular expression the whole answer matches", nullable=True),
        "grammar": Field(_PATTERN, "a grammar (EBNF or Lark) the whole answer follows", nullable=True),
        "choice": Field(_CHOICES, "the answer is one of these texts", nullable=True),
        "json_object": Field(Boolean(), "the answer is a JSON object", nullable=True),
    }
)


def _sampling() -> dict[str, Field]:
    """The sampling parameters by the names OpenAI, vLLM and sglang users know, all of them nullable."""
    own = {name: replace(field, nullable=True) for name, field in sampling_fields().items()}
    kept = (
        "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias",
        "seed", "stop", "stop_token_ids", "ignore_eos", "priority", "speculative",
    )  # fmt: skip
    return {
        "temperature": replace(own["temperature"], default=1.0),
        **{name: own[name] for name in kept},
        "top_k": Field(Integer(-1, 1 << 30), own["top_k"].help + ", as is -1", nullable=True),
        "min_tokens": own["min_new_tokens"],
        "regex": Field(_PATTERN, "a regular expression the whole answer matches", nullable=True),
        "ebnf": Field(_PATTERN, "a grammar (EBNF or Lark) the whole answer follows", nullable=True),
        "json_schema": Field(_JSON_SCHEMA, "a JSON schema the answer follows", nullable=True),
        "guided_json": Field(_JSON_SCHEMA, "vLLM's name of json_schema", nullable=True),
        "guided_regex": Field(_PATTERN, "vLLM's name of regex", nullable=True),
        "guided_grammar": Field(_PATTERN, "vLLM's name of ebnf", nullable=True),
        "guided_choice": Field(_CHOICES, "the answer is one of these texts", nullable=True),
        "structured_outputs": Field(
            FreeObject(16, STRUCTURED_OUTPUTS.schema()),
            "vLLM's way to say one of these: json, regex, grammar, choice or json_object",
            nullable=True,
        ),
        "cache_salt": CACHE_SALT,
        **LORA_FIELDS,
    }


_MODEL = Field(Text(MAX_NAME_CHARS), "the name that /v1/models gives; may be left out", nullable=True)
_STREAM = Field(Boolean(), "answer as server-sent events", nullable=True, default=False)
_MAX_TOKENS = Integer(1, MAX_NEW_TOKENS_LIMIT)
_TOP_LOGPROBS = Field(
    Integer(0, MAX_TOP_LOGPROBS), "with logprobs: also the n most probable tokens", nullable=True
)
_STREAM_OPTIONS = Field(FreeObject(16, STREAM_OPTIONS.schema()), "include_usage", nullable=True)
_TOOLS = Field(Objects(MAX_TOOLS, 0), "functions the model may call", nullable=True)
_TOOL_CHOICE = Field(
    AnyOf((Text(64), FreeObject(16)), "auto, none, required or the name of a tool in an object"),
    "auto, none, required, or one tool by name",
    nullable=True,
)
_CHAT_EXTENSIONS = {
    "chat_template_kwargs": Field(
        FreeObject(64), "variables for the model's chat template, such as enable_thinking", nullable=True
    ),
    "separate_reasoning": Field(
        Boolean(),
        "give <think>…</think> apart from the answer; false leaves it in",
        nullable=True,
        default=True,
    ),
    "parallel_tool_calls": Field(Boolean(), "false: at most one call in an answer", nullable=True),
    "tools": _TOOLS,
    "tool_choice": _TOOL_CHOICE,
}
_MESSAGE_SCHEMA = {"type": "object", "properties": {"role": {"type": "string"}}, "required": ["role"]}

CHAT = OpenAIForm(
    {
        "messages": Field(
            Objects(MAX_MESSAGES, 1, _MESSAGE_SCHEMA), "the conversation so far", required=True
        ),
        "model": _MODEL,
        "stream": _STREAM,
        "stream_options": _STREAM_OPTIONS,
        "n": Field(Integer(1, MAX_CHOICES), "answers to make", nullable=True, default=1),
        "max_tokens": Field(
            _MAX_TOKENS, "tokens to generate at most; by default what the context leaves", nullable=True
        ),
        "max_completion_tokens": Field(_MAX_TOKENS, "the newer name of max_tokens", nullable=True),
        "logprobs": replace(_TRUTH, help="give the logprob of each token"),
        "top_logprobs": _TOP_LOGPROBS,
        "response_format": Field(FreeObject(16), "text, json_object or json_schema", nullable=True),
        "reasoning_effort": Field(
            Text(32), "for a model whose chat template takes it; none turns thinking off", nullable=True
        ),
        "modalities": Field(ListOf(Text(choices=("text",)), 1, 1), 'only ["text"]', nullable=True),
        "verbosity": Field(Text(choices=("medium",)), "only medium", nullable=True),
        "store": _ignored("a chat completion is never kept"),
        "add_generation_prompt": Field(
            Boolean(), "open the assistant's turn after the messages", nullable=True, default=True
        ),
        "continue_final_message": Field(
            Boolean(), "go on with the last message, which is the assistant's", nullable=True, default=False
        ),
        **_CHAT_EXTENSIONS,
        **_sampling(),
        **IGNORED,
    }
)

_PROMPT = (Text(0, 1), TokenIds())

COMPLETION = OpenAIForm(
    {
        "prompt": Field(
            AnyOf(
                (*_PROMPT, ListOf(AnyOf(_PROMPT, "a text or token ids"), MAX_PROMPTS, 1)),
                f"a text, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these",
            ),
            "a text, token ids, or a list of these",
            required=True,
        ),
        "model": _MODEL,
        "stream": _STREAM,
        "stream_options": _STREAM_OPTIONS,
        "n": Field(Integer(1, MAX_CHOICES), "answers to make for each prompt", nullable=True, default=1),
        "max_tokens": Field(
            Integer(0, MAX_NEW_TOKENS_LIMIT),
            "tokens to generate at most; 0 only with echo",
            nullable=True,
            default=16,
        ),
        "logprobs": Field(Integer(0, MAX_TOP_LOGPROBS), "give this many most probable tokens", nullable=True),
        "echo": Field(Boolean(), "begin the text with the prompt", nullable=True, default=False),
        **_sampling(),
        **IGNORED,
    }
)  # fmt: skip

RESPONSE = OpenAIForm(
    {
        "input": Field(
            AnyOf((Text(0, 1), Objects(MAX_MESSAGES, 1)), "a text or a list of 1 to 4096 items"),
            "a text, or messages and results of tool calls",
            required=True,
        ),
        "model": _MODEL,
        "stream": _STREAM,
        "stream_options": _STREAM_OPTIONS,
        "instructions": Field(Text(), "a system message, which is not carried on", nullable=True),
        "max_output_tokens": Field(
            _MAX_TOKENS, "tokens to generate at most; by default what the context leaves", nullable=True
        ),
        "previous_response_id": Field(Text(128), "continue the conversation that ended there", nullable=True),
        "store": Field(Boolean(), "keep the answer for previous_response_id", nullable=True, default=True),
        "text": Field(FreeObject(16), "format: text, json_object or json_schema", nullable=True),
        "reasoning": Field(FreeObject(16), "effort, as reasoning_effort of a chat", nullable=True),
        "include": Field(
            ListOf(Text(choices=("message.output_text.logprobs",)), 4), "logprobs of the text", nullable=True
        ),
        "top_logprobs": _TOP_LOGPROBS,
        "truncation": Field(Text(choices=("disabled",)), "only disabled", nullable=True),
        **_CHAT_EXTENSIONS,
        **_sampling(),
        **IGNORED,
        "metadata": Field(FreeObject(16), "given back as it is", nullable=True),
    }
)


def number_of(values: Mapping[str, Any], name: str, default: int) -> int:
    value = values.get(name, default)
    assert isinstance(value, int)
    return value
