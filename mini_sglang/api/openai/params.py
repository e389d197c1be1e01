"""From the fields of an OpenAI request to ``SamplingParams``."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from mini_sglang.errors import InvalidValueError
from mini_sglang.types import MAX_NEW_TOKENS_LIMIT, SamplingParams

_SAME_NAME = (
    "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "seed",
    "stop", "stop_token_ids", "ignore_eos", "priority", "speculative",
)  # fmt: skip
_CONSTRAINTS = {
    "json_schema": "json_schema", "guided_json": "json_schema", "regex": "regex", "guided_regex": "regex",
    "ebnf": "ebnf", "guided_grammar": "ebnf",
}  # fmt: skip
# How a client spells what the engine names otherwise.
_NAMES = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "template_kwargs": "chat_template_kwargs",
}


def sampling_params(
    values: Mapping[str, Any],
    *,
    max_tokens: int | None,
    constraint: Mapping[str, Any] | None = None,
    logprobs: bool = False,
    top_logprobs: int = 0,
    prompt_logprobs: bool = False,
) -> SamplingParams:
    """The sampling parameters of one request.

    Args:
        values: as ``read_form`` gives them.
        max_tokens: tokens to generate at most; ``None`` is what the context leaves, and must be put in
            its place once the prompt's length is known (``with_room``).
        constraint: what the answer must follow, as ``SamplingParams`` has it (``response_constraint``,
            a tool choice); it may not come with another.

    Raises:
        InvalidValueError: values that do not go together.
    """
    given: dict[str, Any] = {name: values[name] for name in _SAME_NAME if name in values}
    given["temperature"] = values.get("temperature", 1.0)
    given["top_k"] = max(0, values.get("top_k", 0))
    given["min_new_tokens"] = values.get("min_tokens", 0)
    given["max_new_tokens"] = MAX_NEW_TOKENS_LIMIT if max_tokens is None else max_tokens
    found = [(name, _constraint(name, values[name])) for name in _CONSTRAINTS if name in values]
    if "guided_choice" in values:
        found.append(("guided_choice", _one_of(values["guided_choice"])))
    if "structured_outputs" in values:
        found += _structured(values["structured_outputs"])
    if constraint:
        found.append(("response_format or tool_choice", dict(constraint)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise InvalidValueError(found[0][0], names, "the only thing that the answer must follow")
    for _, one in found:
        given |= one
    return SamplingParams(
        **given, logprobs=logprobs, top_logprobs=top_logprobs, prompt_logprobs=prompt_logprobs
    )


def with_room(params: SamplingParams, room: int) -> SamplingParams:
    """``params`` for a request that named no ``max_tokens``: ``room`` tokens at most.

    Raises:
        InvalidValueError: ``min_tokens`` is more than that.
    """
    return _changed(params, max_new_tokens=min(MAX_NEW_TOKENS_LIMIT, max(1, room)))


def for_choice(params: SamplingParams, index: int) -> SamplingParams:
    """The parameters of one of several answers: with a seed, each draws from its own."""
    if params.seed is None or index == 0:
        return params
    # Wraps around where the sum would leave 64 bits.
    return _changed(params, seed=(params.seed + index + (1 << 63)) % (1 << 64) - (1 << 63))


def response_constraint(format: Mapping[str, Any] | None, field: str) -> dict[str, Any] | None:
    """What ``response_format`` (or ``text.format`` of a response) demands, as ``SamplingParams`` has it.

    A schema is enforced whether it says ``strict`` or not.

    Raises:
        InvalidValueError: it is none of text, json_object and json_schema.
    """
    if format is None:
        return None
    kind = format.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"json_object": True}
    if kind != "json_schema":
        raise InvalidValueError(f"{field}.type", kind, "text, json_object or json_schema")
    # Responses have the schema beside the type, chats one level further down.
    holder = format.get("json_schema", format)
    schema = holder.get("schema") if isinstance(holder, Mapping) else None
    if not isinstance(schema, Mapping):
        raise InvalidValueError(f"{field}.json_schema.schema", schema, "a JSON schema, as an object")
    return {"json_schema": json.dumps(schema)}


def shown_error(error: InvalidValueError, prompt_field: str) -> InvalidValueError:
    """The same error in the words of this API's fields."""
    name = prompt_field if error.field == "prompt" else _NAMES.get(error.field, error.field)
    return error if name == error.field else type(error)(name, error.value, error.allowed)


def _structured(outputs: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """What the fields of ``structured_outputs`` demand, by their names."""
    found: list[tuple[str, dict[str, Any]]] = []
    for name, value in outputs.items():
        if name == "choice":
            demand = _one_of(value)
        elif name == "json_object":
            demand = {"json_object": True} if value else {}
        else:
            demand = _constraint(f"guided_{name}", value)
        if demand:
            found.append((f"structured_outputs.{name}", demand))
    if not found:
        allowed = "an object with one of json, regex, grammar, choice and json_object"
        raise InvalidValueError("structured_outputs", dict(outputs), allowed)
    return found


def _one_of(texts: Sequence[str]) -> dict[str, Any]:
    return {"regex": "|".join(re.escape(text) for text in texts)}


def _constraint(name: str, value: Any) -> dict[str, Any]:
    return {_CONSTRAINTS[name]: json.dumps(value) if isinstance(value, Mapping) else value}


def _changed(params: SamplingParams, **changes: Any) -> SamplingParams:
    # dataclasses.replace does the same, but mypy would lose the names.
    return SamplingParams(**{f.name: getattr(params, f.name) for f in fields(params)} | changes)
