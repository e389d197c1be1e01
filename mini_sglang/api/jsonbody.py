"""Request bodies from bytes, strictly: what other parsers let pass is refused here, with a sentence."""

from __future__ import annotations

from typing import Any

import msgspec

from mini_sglang.api.errors import RequestError

MAX_DEPTH = 64


def parse_json(body: bytes) -> Any:
    """Decode a body: UTF-8, finite numbers, whole surrogate pairs, at most 64 containers deep.

    Of a key given twice the last counts, as RFC 8259 lets a reader do.

    Raises:
        RequestError: 400, it is not such JSON.
    """
    try:
        value = msgspec.json.decode(body)
    except UnicodeDecodeError:
        raise _malformed("The body is not UTF-8 text.") from None
    except RecursionError:
        raise _malformed(f"The body is nested more than {MAX_DEPTH} deep.") from None
    except (msgspec.DecodeError, ValueError) as error:
        reason = str(error).removesuffix(" - at `$[...]`").removeprefix("JSON is malformed: ")
        # msgspec calls a surrogate without its partner "truncated".
        hint = r"; \ud800 to \udfff stand in pairs only" if b"\\ud" in body.lower() else ""
        raise _malformed(f"The body is not valid JSON: {reason:.200}{hint}.") from None
    _check_depth(value)
    return value


def _check_depth(value: object) -> None:
    level: list[Any] = [value] if isinstance(value, (dict, list)) else []
    depth = 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise _malformed(f"The body is nested more than {MAX_DEPTH} deep.")
        below: list[Any] = []
        for entry in level:
            children = entry.values() if type(entry) is dict else entry
            below.extend(child for child in children if type(child) is dict or type(child) is list)
        level = below


def _malformed(message: str) -> RequestError:
    return RequestError(400, "invalid_json", message)
