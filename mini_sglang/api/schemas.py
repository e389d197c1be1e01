"""What a request may hold: each field once, with its type, range and size.

``Form.read`` checks a decoded body and ``Form.schema`` tells the same as JSON Schema for the OpenAPI
document, so that the two cannot drift apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from mini_sglang.api.kinds import (
    MAX_TOKEN_ID,
    AnyOf,
    Boolean,
    FreeObject,
    Integer,
    Kind,
    ListOf,
    LogitBias,
    Number,
    Objects,
    StopStrings,
    Text,
    TokenIds,
)
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import (
    MAX_NEW_TOKENS_LIMIT,
    MAX_PRIORITY,
    MAX_STOP_TOKEN_IDS,
    MAX_TOP_LOGPROBS,
    SPECULATIVE_CHOICES,
    SamplingParams,
    sampling_param_names,
)

__all__ = [
    "CACHE_SALT",
    "MAX_MESSAGES",
    "AnyOf",
    "Boolean",
    "Field",
    "Form",
    "FreeObject",
    "Integer",
    "ListOf",
    "Number",
    "Objects",
    "Text",
    "TokenIds",
    "sampling_fields",
    "sampling_from",
]

MAX_MESSAGES = 4096
MAX_SALT_CHARS = 256


@dataclass(frozen=True, slots=True)
class Field:
    """One field of a form.

    Args:
        nullable: null counts as not given; elsewhere it is refused.
        default: shown in the document; the reader of the values applies it.
    """

    kind: Kind
    help: str
    required: bool = False
    nullable: bool = False
    default: Any = None

    def schema(self) -> dict[str, Any]:
        schema = self.kind.schema()
        if self.nullable:
            schema = {"anyOf": [schema, {"type": "null"}]}
        schema["description"] = self.help
        if self.default is not None:
            schema["default"] = self.default
        return schema


@dataclass(frozen=True, slots=True)
class Form:
    """The fields of one request body; of those in ``either`` exactly one must be given."""

    fields: Mapping[str, Field]
    either: tuple[str, ...] = ()

    def read(self, body: object) -> dict[str, Any]:
        """The fields that were given, checked; nullable ones given as null are left out.

        Raises:
            InvalidValueError: a field is missing, wrong, or unknown.
        """
        if not isinstance(body, dict):
            raise InvalidValueError("the body", body, "a JSON object")
        values: dict[str, Any] = {}
        for name, value in body.items():
            spec = self.fields.get(name)
            if spec is None:
                raise InvalidValueError("field", name, "one of " + ", ".join(self.fields))
            if value is None and spec.nullable:
                continue
            values[name] = spec.kind.check(name, value)
        for name, spec in self.fields.items():
            if spec.required and name not in values:
                raise InvalidValueError(name, None, f"given: {spec.help}")
        given = [name for name in self.either if name in values]
        if self.either and len(given) != 1:
            allowed = f"one of {', '.join(self.either)}, and only one"
            raise InvalidValueError("what was given", " and ".join(given) or None, allowed)
        return values

    def schema(self) -> dict[str, Any]:
        choice = {"oneOf": [{"required": [name]} for name in self.either]} if self.either else {}
        return {
            **choice,
            "type": "object",
            "properties": {name: spec.schema() for name, spec in self.fields.items()},
            "required": [name for name, spec in self.fields.items() if spec.required],
            "additionalProperties": False,
        }


def sampling_fields() -> dict[str, Field]:
    """Every field of ``SamplingParams``, by its own name, with its help and default."""
    kinds = _sampling_kinds()
    found: dict[str, Field] = {}
    for spec in fields(SamplingParams):
        default = spec.default if isinstance(spec.default, (bool, int, float)) else None
        kind = kinds[spec.name]
        found[spec.name] = Field(kind, spec.metadata["help"], nullable=spec.default is None, default=default)
    return found


def sampling_from(values: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters among a form's values.

    Raises:
        InvalidValueError: values that do not go together (``min_new_tokens`` over ``max_new_tokens``).
    """
    return SamplingParams(**{name: values[name] for name in sampling_param_names() if name in values})


def _sampling_kinds() -> dict[str, Kind]:
    return {
        "max_new_tokens": Integer(1, MAX_NEW_TOKENS_LIMIT),
        "min_new_tokens": Integer(0, MAX_NEW_TOKENS_LIMIT),
        "temperature": Number(0, 2),
        "top_k": Integer(0, 1 << 30),
        "top_p": Number(0, 1, above=True),
        "min_p": Number(0, 1),
        "repetition_penalty": Number(0.01, 10),
        "presence_penalty": Number(-2, 2),
        "frequency_penalty": Number(-2, 2),
        "logit_bias": LogitBias(),
        "seed": Integer(-(1 << 63), (1 << 63) - 1),
        "stop": StopStrings(),
        "stop_token_ids": ListOf(Integer(0, MAX_TOKEN_ID), MAX_STOP_TOKEN_IDS),
        "ignore_eos": Boolean(),
        "logprobs": Boolean(),
        "top_logprobs": Integer(0, MAX_TOP_LOGPROBS),
        "prompt_logprobs": Boolean(),
        # At most one of these four; what they say is checked when SamplingParams is made.
        "json_schema": AnyOf((FreeObject(), Text(least=1)), "a JSON schema, as an object or its text"),
        "regex": Text(),
        "ebnf": Text(),
        "json_object": Boolean(),
        "priority": Integer(-MAX_PRIORITY, MAX_PRIORITY),
        "speculative": AnyOf(
            (Boolean(), Text(choices=SPECULATIVE_CHOICES)),
            "true, false, or one of " + ", ".join(SPECULATIVE_CHOICES),
        ),
    }


CACHE_SALT = Field(
    Text(MAX_SALT_CHARS),
    "requests with different salts never share cached prefixes, so that none can tell what another asked",
    nullable=True,
)
