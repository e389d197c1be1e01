"""The items of the Responses API: from its input to chat messages, and its tools to those of a chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mini_sglang.api.openai.messages import check_text
from mini_sglang.errors import InvalidValueError

_ROLES = ("system", "developer", "user", "assistant")
_TEXT_KINDS = ("input_text", "output_text", "text", "refusal")
_ALLOWED = "a message, function_call, function_call_output or reasoning"


def input_messages(items: str | Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Chat messages, as ``read_messages`` takes them, of an ``input``.

    Calls next to one another become one assistant's message, as they were made. Thoughts are left out: a
    model does not read those of its earlier answers.

    Raises:
        InvalidValueError: an item that is not allowed, named by its place.
    """
    if isinstance(items, str):
        return [{"role": "user", "content": items}]
    messages: list[dict[str, Any]] = []
    for number, item in enumerate(items):
        where = f"input[{number}]"
        kind = item.get("type", "message" if "role" in item else None)
        if kind == "message":
            messages.append(_message(item, where))
        elif kind == "function_call":
            call = _call(item, where)
            if messages and messages[-1]["role"] == "assistant":
                messages[-1].setdefault("tool_calls", []).append(call)
            else:
                messages.append({"role": "assistant", "content": None, "tool_calls": [call]})
        elif kind == "function_call_output":
            output = check_text(item.get("output"), f"{where}.output", _TEXT_KINDS)
            messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
        elif kind != "reasoning":
            raise InvalidValueError(f"{where}.type", kind, _ALLOWED)
    return messages


def chat_tools(tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Tools as a chat has them.

    Raises:
        InvalidValueError: a tool that is no function; there are no built-in ones.
    """
    result = []
    for number, tool in enumerate(tools):
        if tool.get("type") != "function":
            raise InvalidValueError(
                f"tools[{number}].type", tool.get("type"), "function; there are no built-in tools"
            )
        function = {key: value for key, value in tool.items() if key != "type" and value is not None}
        result.append({"type": "function", "function": function})
    return result


def _message(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    role = item.get("role")
    if role not in _ROLES:
        raise InvalidValueError(f"{where}.role", role, "one of " + ", ".join(_ROLES))
    return {"role": role, "content": check_text(item.get("content"), f"{where}.content", _TEXT_KINDS)}


def _call(item: Mapping[str, Any], where: str) -> dict[str, Any]:
    for key in ("call_id", "name", "arguments"):
        if not isinstance(item.get(key), str):
            raise InvalidValueError(f"{where}.{key}", item.get(key), "a text")
    function = {"name": item["name"], "arguments": item["arguments"]}
    return {"id": item["call_id"], "type": "function", "function": function}
