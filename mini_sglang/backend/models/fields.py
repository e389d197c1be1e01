"""Typed access to the fields of a ``config.json``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mini_sglang.errors import ModelLoadError, shorten

_MAX_INT = (1 << 31) - 1


class FieldReader:
    """Typed access to a config; a value of the wrong type or size becomes a ``ModelLoadError``."""

    def __init__(self, values: Mapping[str, Any], where: str = "") -> None:
        self.values = values
        self.where = where

    def integer(self, name: str, default: int | None = None) -> int:
        value = self._get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_INT:
            raise bad_field(self.where + name, value, f"a whole number from 1 to {_MAX_INT}")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        value = self._get(name, default)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not math.isfinite(value) or value <= 0:
            raise bad_field(self.where + name, value, "a number above 0")
        return float(value)

    def flag(self, name: str, default: bool = False) -> bool:
        value = self._get(name, default)
        if not isinstance(value, bool):
            raise bad_field(self.where + name, value, "true or false")
        return value

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self._get(name, {})
        if not isinstance(value, Mapping):
            raise bad_field(self.where + name, value, "an object")
        return value

    def _get(self, name: str, default: Any) -> Any:
        value = self.values.get(name)
        if value is None:
            if default is None:
                raise ModelLoadError(f"config.json has no {self.where}{name}, which is required.")
            return default
        return value


def bad_field(name: str, value: object, allowed: str) -> ModelLoadError:
    return ModelLoadError(f"In config.json, {name} is {shorten(value)}; it must be {allowed}.")
