"""A benchmark's JSON, checked field by field: what is in a file was written by anyone."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mini_sglang.bench.record import read_record
from mini_sglang.errors import InvalidValueError, MiniSglangError

_SHOWN = 400
# Controls, half characters, and what turns the direction of the text around it.
_UNSHOWN = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class Fields:
    """An object of the file. Each getter checks the type; what is missing or null is empty.

    Args:
        where: how an error names it: ``'a.json': rows[0]``.
    """

    def __init__(self, where: str, values: object) -> None:
        if not isinstance(values, dict):
            raise InvalidValueError(where, values, "an object")
        self._where = where
        self._values: dict[str, Any] = values

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def items(self) -> list[tuple[str, str]]:
        """All of it as text."""
        return [(clean(name), shown(value)) for name, value in self._values.items()]

    def text(self, name: str) -> str:
        value = self._values.get(name)
        if value is None:
            return ""
        if isinstance(value, (dict, list)):
            raise self._wrong(name, value, "text")
        return clean(str(value))

    def number(self, name: str) -> float | None:
        """At least 0; None also for what JSON has no word for, NaN and infinity."""
        return self._number(name, self._values.get(name), 0.0)

    def flag(self, name: str) -> bool | None:
        value = self._values.get(name)
        if value is not None and not isinstance(value, bool):
            raise self._wrong(name, value, "true or false")
        return value

    def part(self, name: str) -> Fields:
        value = self._values.get(name)
        return Fields(self._at(name), {} if value is None else value)

    def parts(self, name: str) -> list[Fields]:
        return [Fields(self._at(f"{name}[{i}]"), value) for i, value in enumerate(self._list(name))]

    def numbers(self, name: str) -> list[float]:
        """A list of finite numbers of any sign."""
        return self._numbers(name, self._list(name))

    def lists(self, name: str) -> list[list[float]]:
        """A list of lists of finite numbers; null is an empty one."""
        found: list[list[float]] = []
        for i, value in enumerate(self._list(name)):
            if value is None:
                found.append([])
                continue
            if not isinstance(value, list):
                raise self._wrong(f"{name}[{i}]", value, "a list of numbers")
            found.append(self._numbers(f"{name}[{i}]", value))
        return found

    def count(self, name: str) -> int:
        """How many items the lists of a list have together."""
        return sum(map(len, self.lists(name)))

    def texts(self, name: str) -> list[str]:
        return [shown(value) for value in self._list(name)]

    def _list(self, name: str) -> list[Any]:
        value = self._values.get(name)
        if value is None:
            return []
        if not isinstance(value, list):
            raise self._wrong(name, value, "a list")
        return value

    def _numbers(self, name: str, values: list[Any]) -> list[float]:
        found = [self._number(f"{name}[{i}]", value, -math.inf) for i, value in enumerate(values)]
        if None in found:
            raise self._wrong(f"{name}[{found.index(None)}]", None, "a finite number")
        return [number for number in found if number is not None]

    def _number(self, name: str, value: object, least: float) -> float | None:
        if value is None or (isinstance(value, float) and not math.isfinite(value)):
            return None
        allowed = "a number" if least < 0 else f"a number of at least {least:g}, or null"
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < least:
            raise self._wrong(name, value, allowed)
        try:
            return float(value)
        except OverflowError:
            raise self._wrong(name, value, allowed) from None

    def _at(self, name: str) -> str:
        return f"{self._where}{name}" if self._where.endswith(": ") else f"{self._where}.{name}"

    def _wrong(self, name: str, value: object, allowed: str) -> InvalidValueError:
        return InvalidValueError(self._at(name), value, allowed)


@dataclass(frozen=True)
class Source:
    """One file.

    Attributes:
        label: the file's name without its ending, to tell several of a kind apart.
        rows, runs: as ``Record`` has them.
    """

    label: str
    file: str
    kind: str
    top: Fields
    rows: list[Fields]
    runs: list[Fields]

    @property
    def machine(self) -> Fields:
        return self.top.part("machine")

    @property
    def settings(self) -> Fields:
        return self.top.part("settings")

    @property
    def limits(self) -> Fields:
        return self.top.part("limits")


def read_source(path: Path) -> Source:
    """Read one file of ``Record.write``.

    Raises:
        MiniSglangError: it is damaged, or is something else.
    """
    try:
        found = read_record(path)
    except RecursionError:
        raise MiniSglangError(f"{str(path)!r} cannot be read as a benchmark's JSON: too deep.") from None
    top = Fields(f"{str(path)!r}: ", found)
    source = Source(
        label=clean(path.stem),
        file=clean(path.name),
        kind=top.text("kind"),
        top=top,
        rows=top.parts("rows"),
        runs=top.parts("runs"),
    )
    if not source.rows:
        raise MiniSglangError(f"{str(path)!r} has no rows: nothing was measured in it.")
    return source


def clean(text: str) -> str:
    """On one line, without what is not to be seen, and not endless."""
    text = _UNSHOWN.sub(" ", text).strip()
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "…"


def shown(value: object) -> str:
    """Any JSON value as text."""
    if isinstance(value, str):
        return clean(value)
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list) and not any(isinstance(item, (list, dict)) for item in value):
        return clean(", ".join(map(shown, value)))
    return clean(json.dumps(value, ensure_ascii=False))
