"""The types a request's fields can have: each checks a value and describes itself as JSON Schema."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from mini_sglang.errors import InvalidValueError
from mini_sglang.types import MAX_LOGIT_BIAS, MAX_STOP_CHARS, MAX_STOPS

MAX_TOKEN_ID = (1 << 31) - 1
MAX_PROMPT_TOKENS = 1 << 21


class Kind(Protocol):
    """The type of a field's value."""

    def check(self, name: str, value: object) -> Any:
        """The value as it is used on.

        Raises:
            InvalidValueError: it is not allowed; the sentence names ``name``.
        """

    def schema(self) -> dict[str, Any]:
        """As JSON Schema."""


@dataclass(frozen=True, slots=True)
class Integer:
    low: int
    high: int

    def check(self, name: str, value: object) -> int:
        # JSON has one number type; 5.0 is not taken for 5 all the same, nor true for 1.
        if type(value) is not int or not self.low <= value <= self.high:
            raise InvalidValueError(name, value, f"a whole number from {self.low} to {self.high}")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number; ``above`` leaves ``low`` itself out."""

    low: float
    high: float
    above: bool = False

    def check(self, name: str, value: object) -> float:
        # Compared before it is converted: an integer may be past every float. A NaN fails both.
        if type(value) in (int, float) and self.low <= value <= self.high:  # type: ignore[operator]
            number = float(value)  # type: ignore[arg-type]
            if not (self.above and number == self.low):
                return number
        start = f"a number {'above' if self.above else 'from'} {self.low:g} "
        raise InvalidValueError(name, value, f"{start}{'up ' if self.above else ''}to {self.high:g}")

    def schema(self) -> dict[str, Any]:
        low = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", low: self.low, "maximum": self.high}


@dataclass(frozen=True, slots=True)
class Boolean:
    def check(self, name: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise InvalidValueError(name, value, "true or false")
        return value

    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}


@dataclass(frozen=True, slots=True)
class Text:
    """A string of ``least`` to ``most`` characters; ``most`` 0 leaves that to the size of the body."""

    most: int = 0
    least: int = 0
    choices: tuple[str, ...] = ()

    def check(self, name: str, value: object) -> str:
        if self.choices and value not in self.choices:
            raise InvalidValueError(name, value, "one of " + ", ".join(self.choices))
        if not isinstance(value, str) or len(value) < self.least or (self.most and len(value) > self.most):
            what = "a text" if not self.least else "a text that is not empty"
            raise InvalidValueError(name, value, f"{what}{self._bound()}")
        return value

    def _bound(self) -> str:
        return f" of at most {self.most} characters" if self.most else ""

    def schema(self) -> dict[str, Any]:
        if self.choices:
            return {"type": "string", "enum": list(self.choices)}
        bounds = {"minLength": self.least, "maxLength": self.most}
        return {"type": "string"} | {key: bound for key, bound in bounds.items() if bound}


@dataclass(frozen=True, slots=True)
class ListOf:
    """A list of ``least`` to ``most`` values of one kind."""

    item: Kind
    most: int
    least: int = 0

    def check(self, name: str, value: object) -> list[Any]:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise InvalidValueError(name, value, f"a list of {self.least} to {self.most} entries")
        check = self.item.check
        return [check(name, entry) for entry in value]

    def schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": self.item.schema(),
            "minItems": self.least,
            "maxItems": self.most,
        }


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A list of ids, checked in one pass since a prompt may have a million of them."""

    most: int = MAX_PROMPT_TOKENS

    def check(self, name: str, value: object) -> list[int]:
        if not isinstance(value, list) or not 1 <= len(value) <= self.most:
            raise InvalidValueError(name, value, f"a list of 1 to {self.most} token ids")
        if not all(type(entry) is int for entry in value):
            wrong = next(entry for entry in value if type(entry) is not int)
            raise InvalidValueError(name, wrong, "made of token ids, which are whole numbers")
        if min(value) < 0 or max(value) > MAX_TOKEN_ID:
            raise InvalidValueError(name, min(value) if min(value) < 0 else max(value), "made of token ids")
        return value

    def schema(self) -> dict[str, Any]:
        item = {"type": "integer", "minimum": 0, "maximum": MAX_TOKEN_ID}
        return {"type": "array", "items": item, "minItems": 1, "maxItems": self.most}


@dataclass(frozen=True, slots=True)
class AnyOf:
    """The first of ``kinds`` whose JSON type fits decides; ``allowed`` says what the field takes."""

    kinds: tuple[Kind, ...]
    allowed: str

    def check(self, name: str, value: object) -> Any:
        for kind in self.kinds:
            if _fits(kind, value):
                return kind.check(name, value)
        raise InvalidValueError(name, value, self.allowed)

    def schema(self) -> dict[str, Any]:
        return {"anyOf": [kind.schema() for kind in self.kinds]}


@dataclass(frozen=True, slots=True)
class Objects:
    """A list of JSON objects that something else checks (messages, tools)."""

    most: int
    least: int = 1
    item: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})

    def check(self, name: str, value: object) -> list[dict[str, Any]]:
        if not isinstance(value, list) or not self.least <= len(value) <= self.most:
            raise InvalidValueError(name, value, f"a list of {self.least} to {self.most} objects")
        for entry in value:
            if not isinstance(entry, dict):
                raise InvalidValueError(name, entry, "made of JSON objects")
        return value

    def schema(self) -> dict[str, Any]:
        return {
            "type": "array",
            "items": dict(self.item),
            "minItems": self.least,
            "maxItems": self.most,
        }


@dataclass(frozen=True, slots=True)
class FreeObject:
    """A JSON object of at most ``most`` keys; what is in it is checked where it is used."""

    most: int = 1024
    described: Mapping[str, Any] = field(default_factory=lambda: {"type": "object"})

    def check(self, name: str, value: object) -> dict[str, Any]:
        if not isinstance(value, dict) or len(value) > self.most:
            raise InvalidValueError(name, value, f"a JSON object of at most {self.most} keys")
        return value

    def schema(self) -> dict[str, Any]:
        return {**self.described, "maxProperties": self.most}


@dataclass(frozen=True, slots=True)
class StopStrings:
    """One string or several."""

    def check(self, name: str, value: object) -> tuple[str, ...]:
        texts = [value] if isinstance(value, str) else value
        allowed = f"up to {MAX_STOPS} non-empty strings of at most {MAX_STOP_CHARS} characters"
        if not isinstance(texts, list) or len(texts) > MAX_STOPS:
            raise InvalidValueError(name, value, allowed)
        for text in texts:
            if not isinstance(text, str) or not 0 < len(text) <= MAX_STOP_CHARS:
                raise InvalidValueError(name, text, allowed)
        return tuple(texts)

    def schema(self) -> dict[str, Any]:
        one = {"type": "string", "minLength": 1, "maxLength": MAX_STOP_CHARS}
        return {"anyOf": [one, {"type": "array", "items": one, "maxItems": MAX_STOPS}]}


@dataclass(frozen=True, slots=True)
class LogitBias:
    """Token ids, spelled as keys, to numbers added to their logits."""

    def check(self, name: str, value: object) -> dict[int, float]:
        allowed = f"up to {MAX_LOGIT_BIAS} pairs of a token id and a number from -100 to 100"
        if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
            raise InvalidValueError(name, value, allowed)
        bias: dict[int, float] = {}
        for key, number in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) < 11 and int(key) <= MAX_TOKEN_ID):
                raise InvalidValueError(name, key, allowed)
            bias[int(key)] = Number(-100, 100).check(name, number)
        return bias

    def schema(self) -> dict[str, Any]:
        return {
            "type": "object",
            "propertyNames": {"pattern": "^[0-9]{1,10}$"},
            "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
            "maxProperties": MAX_LOGIT_BIAS,
        }


def _fits(kind: Kind, value: object) -> bool:
    match kind:
        case Text():
            return isinstance(value, str)
        case Integer():
            return type(value) is int
        case Number():
            return type(value) in (int, float)
        case Boolean():
            return isinstance(value, bool)
        case FreeObject():
            return isinstance(value, dict)
        case TokenIds():
            return isinstance(value, list) and bool(value) and type(value[0]) is int
        case Objects():
            return isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        case ListOf():
            return isinstance(value, list)
    return True
