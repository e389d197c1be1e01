"""Datasets from files: JSONL of prompts or conversations, and ShareGPT's JSON."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mini_sglang.bench.load.datasets import Session, Turn
from mini_sglang.errors import MiniSglangError

_ASKING = ("human", "user")
_LENGTHS = ("output_len", "max_tokens", "max_new_tokens")
FORMS = (
    'an object with "prompt" (a text), "messages", or ShareGPT\'s "conversations", '
    'and "output_len" if need be'
)


def read_sessions(
    path: Path, output: tuple[int, int], turns: int, think: float, seed: int, *, form: str
) -> Iterator[Session]:
    """Endless sessions: the file's, in an order that the seed gives, again and again.

    Args:
        output: least and most new tokens of an entry that does not say how many.
        turns: of a conversation, at most so many questions are asked.
        form: in which prompts are given, ``text`` or ``messages``.

    Raises:
        MiniSglangError: the file cannot be read, or an entry is of no known form.
    """
    draw = random.Random(f"{path.name} {seed}")
    entries = _entries(path)
    sessions = [_session(path, n, entry, output, turns, think, draw) for n, entry in entries]
    if not sessions:
        raise MiniSglangError(f"{str(path)!r} has no entries; each must be {FORMS}.")
    for (number, _), session in zip(entries, sessions, strict=True):
        content = session.turns[0].content
        if not (isinstance(content, str) or (form == "messages" and isinstance(content[0], dict))):
            raise MiniSglangError(
                f"{str(path)!r}, entry {number}: this API takes {form}, and cannot be given this prompt; "
                "--dialect openai-chat takes messages."
            )
    draw.shuffle(sessions)
    return _again(sessions)


def _again(sessions: list[Session]) -> Iterator[Session]:
    while True:
        yield from sessions


def _entries(path: Path) -> list[tuple[int, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise MiniSglangError(f"The dataset {str(path)!r} cannot be read: {error}") from None
    try:
        if text.lstrip().startswith("["):
            return list(enumerate(json.loads(text), 1))
        return [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
    except ValueError as error:
        raise MiniSglangError(f"The dataset {str(path)!r} is neither JSON nor JSON a line: {error}") from None


def _session(
    path: Path,
    number: int,
    entry: Any,
    output: tuple[int, int],
    turns: int,
    think: float,
    draw: random.Random,
) -> Session:
    new = draw.randint(*output)
    if isinstance(entry, dict):
        given = next((entry[name] for name in _LENGTHS if name in entry), new)
        prompt, messages = entry.get("prompt"), entry.get("messages")
        if type(given) is int and given > 0:
            if prompt and isinstance(prompt, str):
                return Session((Turn(prompt, given),))
            if isinstance(messages, list) and messages and all(isinstance(one, dict) for one in messages):
                return Session((Turn(messages, given),))
            asked = _asked(entry.get("conversations"))
            if asked:
                return Session(
                    tuple(Turn(text, given, think if n else 0.0) for n, text in enumerate(asked[:turns]))
                )
    raise MiniSglangError(f"{str(path)!r}, entry {number}: it must be {FORMS}.")


def _asked(value: Any) -> list[str]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        return []
    texts = [one.get("value") for one in value if one.get("from") in _ASKING]
    return [text for text in texts if isinstance(text, str) and text]
