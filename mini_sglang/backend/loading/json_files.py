"""JSON objects of a model's files, which may be damaged, endless or ambiguous."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mini_sglang.errors import ModelLoadError, shorten

_MAX_BYTES = 100_000_000


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a model. Raises ``ModelLoadError`` where there is none."""
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise ModelLoadError(f"The file {path} is above the limit of {_MAX_BYTES} bytes.")
        text = path.read_bytes()
    except FileNotFoundError:
        raise ModelLoadError(f"The model folder {path.parent} has no {path.name}.") from None
    except OSError as error:
        raise ModelLoadError(f"The file {path} cannot be read: {error.strerror or error}.") from None
    return parse_json(text, f"The file {path}")


def parse_json(text: bytes, what: str) -> dict[str, Any]:
    """The JSON object that ``text`` is, without the repeated keys that Python's parser would let pass.

    Raises:
        ModelLoadError: of ``what``, where it is none.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) != len(pairs):
            keys = [key for key, _ in pairs]
            repeated = next(key for key in keys if keys.count(key) > 1)
            raise ModelLoadError(f"{what} is damaged: {shorten(repeated)} occurs twice.")
        return values

    try:
        value = json.loads(text, object_pairs_hook=unique)
    # Too deep, not UTF-8, not JSON, or a number of thousands of digits.
    except (RecursionError, ValueError):
        raise ModelLoadError(f"{what} is not valid JSON.") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{what} is not a JSON object.")
    return value
