"""Chat messages to prompt text, by the Jinja template that comes with a model.

The dialect is that of Hugging Face's ``apply_chat_template``. A template is a stranger's program: it runs in
Jinja's immutable sandbox, sees plain data only, and is stopped after ``RENDER_SECONDS``.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.types import Message

if TYPE_CHECKING:
    from jinja2 import Environment, Template, nodes
    from jinja2.parser import Parser

ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython")
RENDER_SECONDS = 5.0
_MAX_DEPTH = 64


class ChatTemplate:
    """The chat template of one model. Thread-safe; compiled when first used.

    Args:
        sources: the template, or several by name, of which ``default`` is used, and ``tool_use`` where
            tools are given.
        special_tokens: texts such as ``bos_token`` and ``eos_token``, by the name templates use.
    """

    def __init__(self, sources: str | Mapping[str, str], special_tokens: Mapping[str, str]) -> None:
        self.sources = {"default": sources} if isinstance(sources, str) else dict(sources)
        self._special_tokens = dict(special_tokens)
        self._compiled: dict[str, Template] = {}

    def render(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text of a conversation.

        Args:
            messages: as ``plain_messages`` gives them.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end where the text of the last message, which must have one, ends.
            tools: JSON schemas of functions the model may call.
            template_kwargs: further variables of this model's template (``enable_thinking``).

        Raises:
            InvalidValueError: the template refuses the conversation, fails on it or takes too long.
            ModelLoadError: the template cannot be compiled, or there is none of the name needed.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        template = self._compiled.get(name) or self._compile(name)
        variables = {**self._special_tokens, **(template_kwargs or {})}
        mark = ""
        if continue_final_message:
            # Cut off again after rendering, with what the template writes behind it. Random, so that no
            # message has it; not white space, so that a template which strips leaves what is before it.
            mark = "\ue000" + secrets.token_hex(8)
            messages = [*messages[:-1], {**messages[-1], "content": messages[-1]["content"] + mark}]
        fixed = {
            "messages": messages,
            "tools": tools or None,
            "documents": variables.pop("documents", None),
            "add_generation_prompt": add_generation_prompt,
        }
        clash = sorted(fixed.keys() & variables.keys())
        if clash:
            raise InvalidValueError("template_kwargs", clash[0], "a name that is not already an argument")
        try:
            with template.environment.time_limit():  # type: ignore[attr-defined]
                rendered = template.render(**variables, **fixed)
        except Exception as error:
            reason = str(error)[:200].rstrip(".") or type(error).__name__
            raise InvalidValueError(
                "messages", list(messages), f"a conversation the model's chat template accepts ({reason})"
            ) from None
        if not mark:
            return rendered
        text, found, _ = rendered.rpartition(mark)
        if not found:
            allowed = "left out: the model's chat template does not show the last message as it is"
            raise InvalidValueError("continue_final_message", True, allowed)
        return text

    def _compile(self, name: str) -> Template:
        if name not in self.sources:
            names = ", ".join(sorted(self.sources))
            raise ModelLoadError(f"The model has chat templates named {names}, but none named {name}.")
        try:
            template = _environment().from_string(self.sources[name])
        except Exception as error:
            raise ModelLoadError(
                f"The model's chat template is damaged: {str(error)[:200].rstrip('.')}."
            ) from None
        self._compiled[name] = template
        return template


def plain_messages(messages: object) -> list[dict[str, Any]]:
    """Check chat messages and copy them as plain data for a template.

    ``content`` becomes one text: a list of ``{"type": "text"}`` parts is joined as it stands. Keys whose
    value is ``None`` are left out; only an assistant's message may have no content.

    Raises:
        InvalidValueError: no messages, or one that is not allowed.
    """
    if isinstance(messages, (str, bytes, Mapping)) or not isinstance(messages, Sequence) or not messages:
        raise InvalidValueError("messages", messages, "a list of at least one message")
    return [_plain_message(message) for message in messages]


def plain_data(value: object, field: str, depth: int = 0) -> Any:
    """Copy JSON-like data with nothing but plain types in it.

    Raises:
        InvalidValueError: something else is in it, or it is nested more than 64 deep.
    """
    if depth > _MAX_DEPTH:
        raise InvalidValueError(field, "…", f"nested at most {_MAX_DEPTH} deep")
    if value is None or isinstance(value, bool):
        return value
    # A subclass could carry methods of its own into the sandbox.
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise InvalidValueError(field, dict(value), "JSON data, whose keys are texts")
        return {str.__str__(key): plain_data(item, field, depth + 1) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, (bytes, bytearray)):
        return [plain_data(item, field, depth + 1) for item in value]
    raise InvalidValueError(field, value, "JSON data: texts, numbers, true, false, null, lists and objects")


def _plain_message(message: object) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise InvalidValueError("messages", message, "a list of objects with role and content")
    role = message.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise InvalidValueError("role", role, "one of " + ", ".join(ROLES))
    given = {key: value for key, value in message.items() if value is not None}
    content = given.pop("content", None)
    plain: dict[str, Any] = {"role": str.__str__(role)}
    if content is not None:
        plain["content"] = _content_text(content)
    elif role != "assistant":
        raise InvalidValueError("content", None, f"a text in a message of role {role}")
    elif "tool_calls" not in given:
        plain["content"] = ""
    return plain_data(given, "messages") | plain  # type: ignore[no-any-return]


def _content_text(content: object) -> str:
    if isinstance(content, str):
        return str.__str__(content)
    if not isinstance(content, Sequence) or isinstance(content, (bytes, bytearray)):
        raise InvalidValueError("content", content, "a text or a list of text parts")
    texts = []
    for part in content:
        text = part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        if not isinstance(text, str):
            allowed = 'a list of parts like {"type": "text", "text": "…"}; this model reads text only'
            raise InvalidValueError("content", part, allowed)
        texts.append(text)
    return "".join(texts)


def _environment() -> Environment:
    """A sandboxed Jinja environment with what chat templates expect, and a clock in its loops."""
    from jinja2 import TemplateError, TemplateRuntimeError, nodes
    from jinja2.ext import Extension, LoopControlExtension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """``{% generation %}`` marks the assistant's words for training; here it changes nothing."""

        tags = {"generation"}  # noqa: RUF012

        def parse(self, parser: Parser) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body).set_lineno(line)

    class TimedSandbox(ImmutableSandboxedEnvironment):
        """Looks at the clock in every turn of a loop and every call of a macro."""

        def __init__(self) -> None:
            extensions = [Generation, LoopControlExtension]
            super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions)
            self._limit = threading.local()

        def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
            tree = super()._parse(source, name, filename)
            repeated: list[nodes.For | nodes.Macro] = [*tree.find_all(nodes.For), *tree.find_all(nodes.Macro)]
            for node in repeated:
                # An attribute of the environment, so that no variable of the template can stand in for it.
                check = nodes.Call(nodes.EnvironmentAttribute("check_time"), [], [], None, None)
                node.body.insert(0, nodes.ExprStmt(check).set_lineno(node.lineno))
            return tree

        def time_limit(self) -> _TimeLimit:
            return _TimeLimit(self._limit)

        def check_time(self) -> None:
            if time.monotonic() > self._limit.deadline:
                raise TemplateRuntimeError(f"it took more than {RENDER_SECONDS:g} seconds")

    def raise_exception(message: object) -> None:
        raise TemplateError(str(message))

    environment = TimedSandbox()
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


class _TimeLimit:
    """Sets this thread's deadline while a template is rendered."""

    def __init__(self, limit: threading.local) -> None:
        self._limit = limit

    def __enter__(self) -> None:
        self._limit.deadline = time.monotonic() + RENDER_SECONDS

    def __exit__(self, *error: object) -> None:
        self._limit.deadline = 0.0


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML, which a model would read as it stands.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)
