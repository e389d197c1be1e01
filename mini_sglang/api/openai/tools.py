"""The tools of a request: their definitions, the choice among them, and the schema that enforces it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mini_sglang.api.openai.answer import PieceParser
from mini_sglang.api.openai.calls import MAX_ATTEMPTS, CallParser, ForcedCallParser, Format
from mini_sglang.errors import InvalidValueError

MAX_TOOLS = 128
_NAME = re.compile(r"[a-zA-Z0-9_.-]{1,64}")
_TOOL_KEYS = {"name", "description", "parameters", "strict"}
_EMPTY_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


@dataclass(frozen=True, slots=True)
class Tools:
    """The tools of one request and how they are to be used.

    Attributes:
        definitions: as the chat template takes them, ``{"type": "function", "function": {…}}``.
        choice: ``auto``, ``none``, ``required`` or ``named``.
        name: with ``named``, the tool to call.
        parallel: whether one answer may hold several calls.
    """

    definitions: tuple[dict[str, Any], ...] = ()
    choice: str = "none"
    name: str | None = None
    parallel: bool = True

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(tool["function"]["name"] for tool in self.definitions)

    @property
    def forced(self) -> bool:
        return self.choice in ("required", "named")

    @property
    def shown(self) -> list[dict[str, Any]] | None:
        """What the model is told of; nothing where it may call nothing."""
        return list(self.definitions) if self.definitions and self.choice != "none" else None

    def schema(self) -> str | None:
        """The JSON schema an answer must follow, as text; ``None`` where the model is free.

        For one named tool it is that of its arguments; for ``required`` that of a list of calls.
        """
        if not self.forced:
            return None
        by_name = {tool["function"]["name"]: tool["function"] for tool in self.definitions}
        if self.name is not None:
            return json.dumps(_parameters(by_name[self.name]))
        defs: dict[str, Any] = {}
        calls = []
        for number, (name, function) in enumerate(by_name.items()):
            # A reference in the parameters counts from their own root, which now is further down.
            defs[f"tool_{number}"] = _rebase(_parameters(function), f"#/$defs/tool_{number}")
            calls.append(
                {
                    "type": "object",
                    "properties": {
                        "name": {"const": name},
                        "arguments": {"$ref": f"#/$defs/tool_{number}"},
                    },
                    "required": ["name", "arguments"],
                    "additionalProperties": False,
                }
            )
        schema: dict[str, Any] = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "$defs": defs}
        if not self.parallel:
            schema["maxItems"] = 1
        return json.dumps(schema)

    def parser(self, formats: tuple[Format, ...]) -> PieceParser | None:
        """What finds the calls in one answer; ``None`` where there can be none."""
        if self.forced:
            return ForcedCallParser(self.name, self.names)
        if self.shown is None:
            return None
        return CallParser(self.names, formats, MAX_ATTEMPTS if self.parallel else 1)


def read_tools(
    tools: Sequence[Mapping[str, Any]] | None, choice: str | Mapping[str, Any] | None, parallel: bool | None
) -> Tools:
    """Check the tools of a chat request.

    Raises:
        InvalidValueError: a tool that is not one, or a choice that names none of them.
    """
    definitions = tuple(_definition(number, tool) for number, tool in enumerate(tools or ()))
    names = [tool["function"]["name"] for tool in definitions]
    for name in names:
        if names.count(name) > 1:
            raise InvalidValueError("tools", name, "a list in which each name comes once")
    parallel = parallel is not False
    if choice is None:
        return Tools(definitions, "auto" if definitions else "none", None, parallel)
    if isinstance(choice, str):
        if choice not in ("auto", "none", "required"):
            raise InvalidValueError(
                "tool_choice",
                choice,
                'auto, none, required, or {"type": "function", "function": {"name": …}}',
            )
        if choice != "none" and not definitions:
            raise InvalidValueError("tool_choice", choice, "none, or left out, where there are no tools")
        return Tools(definitions, choice, None, parallel)
    function = choice.get("function", choice)
    name = function.get("name") if isinstance(function, Mapping) else None
    if choice.get("type") != "function" or not isinstance(name, str) or name not in names:
        raise InvalidValueError(
            "tool_choice",
            dict(choice),
            '{"type": "function", "function": {"name": …}} with the name of one of the tools',
        )
    return Tools(definitions, "named", name, parallel)


def call_formats(templates: str) -> tuple[Format, ...]:
    """How a model writes its calls, told by its chat template; both ways where that says nothing."""
    if "<tool_call>" in templates:
        return ("hermes",)
    if "<|python_tag|>" in templates or '"parameters"' in templates:
        return ("bare",)
    return ("hermes", "bare")


def _definition(number: int, tool: Mapping[str, Any]) -> dict[str, Any]:
    where = f"tools[{number}]"
    function = tool.get("function")
    if tool.get("type", "function") != "function" or not isinstance(function, Mapping):
        raise InvalidValueError(where, dict(tool), '{"type": "function", "function": {"name": …, …}}')
    unknown = sorted(function.keys() - _TOOL_KEYS)
    if unknown:
        raise InvalidValueError(f"{where}.function", unknown[0], "made of " + ", ".join(sorted(_TOOL_KEYS)))
    name = function.get("name")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidValueError(
            f"{where}.function.name", name, "1 to 64 letters, digits, underscores, dots or hyphens"
        )
    description = function.get("description")
    if description is not None and not isinstance(description, str):
        raise InvalidValueError(f"{where}.function.description", description, "a text")
    parameters = function.get("parameters")
    if parameters is not None and not isinstance(parameters, Mapping):
        raise InvalidValueError(f"{where}.function.parameters", parameters, "a JSON schema of an object")
    if isinstance(parameters, Mapping) and parameters.get("type", "object") != "object":
        raise InvalidValueError(
            f"{where}.function.parameters", dict(parameters), 'a JSON schema with "type": "object"'
        )
    if not isinstance(function.get("strict"), bool | None):
        raise InvalidValueError(f"{where}.function.strict", function.get("strict"), "true or false")
    kept: dict[str, Any] = {"name": name}
    if description is not None:
        kept["description"] = description
    kept["parameters"] = dict(parameters) if parameters else dict(_EMPTY_PARAMETERS)
    return {"type": "function", "function": kept}


def _parameters(function: Mapping[str, Any]) -> dict[str, Any]:
    # Without a type the schema would let the arguments be any JSON value.
    return {"type": "object", **function["parameters"]}


def _rebase(schema: Any, root: str) -> Any:
    if isinstance(schema, list):
        return [_rebase(item, root) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    result = {key: _rebase(value, root) for key, value in schema.items()}
    target = schema.get("$ref")
    if isinstance(target, str) and target.startswith("#"):
        result["$ref"] = root + target[1:]
    return result
