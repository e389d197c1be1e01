"""Checks the messages of a chat and makes them what the model's chat template takes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from mini_sglang.errors import InvalidValueError

ROLES = ("system", "developer", "user", "assistant", "tool")
# What clients send back of an answer they were given.
_KEYS = {
    "role", "content", "name", "tool_calls", "tool_call_id", "reasoning_content", "refusal", "annotations",
    "audio", "function_call",
}  # fmt: skip
_UNREAD = {"annotations", "refusal", "audio", "function_call"}


def read_messages(messages: Sequence[Mapping[str, Any]], *, developer: bool) -> list[dict[str, Any]]:
    """Messages for ``Tokenizer.encode_chat``.

    The arguments of tool calls become objects, which templates expect; text that is no JSON object stays.
    A result of a tool must follow the call it answers.

    Args:
        developer: whether the template knows that role; elsewhere such a message is a system message.

    Raises:
        InvalidValueError: a message that is not allowed, named by its place.
    """
    result: list[dict[str, Any]] = []
    called: set[str] = set()
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        plain = _read_message(message, where)
        role = plain["role"]
        if role == "developer" and not developer:
            plain["role"] = "system"
        if role == "tool":
            call_id = plain.get("tool_call_id")
            if not isinstance(call_id, str) or call_id not in called:
                raise InvalidValueError(
                    f"{where}.tool_call_id", call_id, "the id of a call in the assistant's message before it"
                )
        else:
            called = {call["id"] for call in plain.get("tool_calls", ())}
        result.append(plain)
    return result


def check_text(value: object, where: str, kinds: Sequence[str] = ("text",)) -> str:
    """A text, or parts ``{"type": …, "text": …}`` of these kinds, joined as they stand."""
    if isinstance(value, str):
        return value
    allowed = (
        f'a text or a list of parts like {{"type": "{kinds[0]}", "text": "…"}}; the model reads text only'
    )
    if not isinstance(value, Sequence) or not value:
        raise InvalidValueError(where, value, allowed)
    texts = []
    for number, part in enumerate(value):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("refusal" if kind == "refusal" else "text") if isinstance(part, Mapping) else None
        if kind not in kinds or not isinstance(text, str):
            raise InvalidValueError(f"{where}[{number}]", part, allowed)
        texts.append(text)
    return "".join(texts)


def _read_message(message: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise InvalidValueError(f"{where}.role", role, "one of " + ", ".join(ROLES))
    unknown = sorted(key for key, value in message.items() if key not in _KEYS and value is not None)
    if unknown:
        raise InvalidValueError(where, unknown[0], "made of " + ", ".join(sorted(_KEYS - _UNREAD)))
    for key in ("audio", "function_call"):
        if message.get(key) is not None:
            raise InvalidValueError(f"{where}.{key}", message[key], "left out; it is not supported")
    plain: dict[str, Any] = {"role": role}
    content = message.get("content")
    if content is not None:
        kinds = ("text", "refusal") if role == "assistant" else ("text",)
        plain["content"] = check_text(content, f"{where}.content", kinds)
    elif role != "assistant":
        raise InvalidValueError(f"{where}.content", None, f"a text in a message of role {role}")
    for key in ("name", "tool_call_id", "reasoning_content"):
        value = message.get(key)
        if value is not None:
            if not isinstance(value, str):
                raise InvalidValueError(f"{where}.{key}", value, "a text")
            plain[key] = value
    calls = message.get("tool_calls")
    if calls:
        if role != "assistant":
            raise InvalidValueError(f"{where}.tool_calls", calls, "in an assistant's message only")
        plain["tool_calls"] = _read_calls(calls, f"{where}.tool_calls")
    elif content is None:
        plain["content"] = ""
    return plain


def _read_calls(calls: object, where: str) -> list[dict[str, Any]]:
    allowed = '{"id": …, "type": "function", "function": {"name": …, "arguments": "…"}}'
    if not isinstance(calls, list):
        raise InvalidValueError(where, calls, f"a list of calls, {allowed}")
    result = []
    for number, call in enumerate(calls):
        function = call.get("function") if isinstance(call, Mapping) else None
        call_id = call.get("id") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or call.get("type", "function") != "function":
            raise InvalidValueError(f"{where}[{number}]", call, allowed)
        name, arguments = function.get("name"), function.get("arguments")
        if not isinstance(name, str) or not isinstance(arguments, str) or not isinstance(call_id, str):
            raise InvalidValueError(f"{where}[{number}]", dict(call), allowed)
        result.append(
            {
                "id": call_id,
                "type": "function",
                "function": {"name": name, "arguments": parsed_arguments(arguments)},
            }
        )
    return result


def parsed_arguments(text: str) -> Any:
    """The arguments of a call as an object; the text itself where it is none."""
    try:
        value = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, dict) else text
