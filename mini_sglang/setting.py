"""What one setting is: how it is declared, how a value of it is checked, how it is shown."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import Field, field
from pathlib import Path
from typing import Any, cast

from mini_sglang.errors import InvalidValueError

TRUE = frozenset({"1", "true", "yes", "on"})
FALSE = frozenset({"0", "false", "no", "off"})


def setting(
    section: str,
    env: str | tuple[str, ...],
    default: Any,
    help: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str, ...] = (),
    spellings: Mapping[str, str] | None = None,
    shown: str | None = None,
    secret: bool = False,
) -> Any:
    """A field of a settings dataclass.

    Args:
        section: the heading it stands under.
        env: its environment variable, or several of which the first that is set counts.
        help: what it does, for a reader.
        low: least value of a number; ``high`` is the greatest.
        choices: the texts allowed, in lower case.
        spellings: other ways to write a choice.
        shown: the default as a reader sees it, where the value itself says little.
        secret: keep the value out of ``repr``.
    """
    return field(
        default=default,
        repr=not secret,
        metadata={
            "section": section,
            "env": (env,) if isinstance(env, str) else env,
            "help": help,
            "low": low,
            "high": high,
            "choices": choices,
            "spellings": spellings or {},
            "shown": shown,
        },
    )


def parse_value(spec: Field[Any], kind: type, shown_name: str, value: object) -> Any:
    """The value of a setting, from the text of a variable or flag, or from a keyword.

    Args:
        kind: the setting's type: bool, int, float, str or Path.
        shown_name: what the setting is called to who gave it.

    Raises:
        InvalidValueError: the value is of the wrong type or not allowed.
    """
    if kind is bool:
        return _parse_bool(shown_name, value)
    if kind is int or kind is float:
        return _parse_number(spec, shown_name, value, kind)
    choices = spec.metadata["choices"]
    if choices and isinstance(value, int):
        # A choice of 0 and 1, as a bool or a number in a keyword.
        value = str(int(value))
    if not isinstance(value, (str, Path)) or str(value) == "":
        raise InvalidValueError(shown_name, value, "a text that is not empty")
    if kind is Path:
        return Path(value)
    text = str(value)
    if choices:
        text = spec.metadata["spellings"].get(text.lower(), text.lower())
        if text not in choices:
            raise InvalidValueError(shown_name, value, "one of " + ", ".join(choices))
    return text


def _parse_bool(shown_name: str, value: object) -> bool:
    if isinstance(value, bool):
        return value
    text = str(value).strip().lower()
    if text in TRUE:
        return True
    if text in FALSE:
        return False
    raise InvalidValueError(shown_name, value, "1 or 0 (true, false, yes, no, on, off)")


def _parse_number(spec: Field[Any], shown_name: str, value: object, kind: type) -> int | float:
    low, high = spec.metadata["low"], spec.metadata["high"]
    what = "a whole number" if kind is int else "a number"
    allowed = f"{what} from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise InvalidValueError(shown_name, value, allowed)
    try:
        number = kind(value) if not isinstance(value, float) or kind is float else int(value)
    except (ValueError, OverflowError):
        raise InvalidValueError(shown_name, value, allowed) from None
    # A NaN fails both comparisons, a fraction given for a whole number the third.
    if not low <= number <= high or (isinstance(value, float) and number != value):
        raise InvalidValueError(shown_name, value, allowed)
    return cast("int | float", number)


def default_text(spec: Field[Any]) -> str:
    """How a setting's default is shown to a reader."""
    if spec.metadata["shown"]:
        return str(spec.metadata["shown"])
    if isinstance(spec.default, bool):
        return f"`{int(spec.default)}`"
    return "unset" if spec.default is None else f"`{spec.default}`"


def markdown_table(specs: Iterable[Field[Any]]) -> str:
    """Settings as Markdown, one table for each section."""
    lines: list[str] = []
    section = ""
    for spec in specs:
        if spec.metadata["section"] != section:
            section = spec.metadata["section"]
            lines += ["", f"### {section}", "", "| variable | flag | default | what it does |"]
            lines.append("| --- | --- | --- | --- |")
        variables = " / ".join(f"`{name}`" for name in spec.metadata["env"])
        choices = spec.metadata["choices"]
        help_text = spec.metadata["help"] + (f" ({', '.join(choices)})" if choices else "")
        flag = "--" + spec.name.replace("_", "-")
        lines.append(f"| {variables} | `{flag}` | {default_text(spec)} | {help_text} |")
    return "\n".join(lines).strip() + "\n"
