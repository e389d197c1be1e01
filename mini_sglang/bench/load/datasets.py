"""What is asked: sessions of one or more turns, the same for the same seed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mini_sglang.errors import InvalidValueError

Content = list[int] | str | list[dict[str, Any]]
"""Of a turn: token ids, a text, or whole messages."""
Make = Callable[[int, random.Random], Content]

KINDS = ("random", "shared-prefix", "multi-turn", "repeat")
FIRST_ID = 300
"""Ids below are special tokens and single bytes in many vocabularies."""

_TEXT = (
    "about after again air all along also always animal answer apple around back bank bird blue boat book "
    "bread bridge bring build call carry chair change child city clear close cloud cold come corn count "
    "country cross dark deep door draw dream dry each early earth east easy field fire first fish floor "
    "flower follow food foot forest form friend front garden give glass gold good grain grass green ground "
    "group grow half hand happy hard head hear heart heavy help hill hold home horse house idea island join "
    "jump keep kind king lake land large last late laugh leaf learn left letter light line listen little "
    "long look low made map mark milk mind moon morning mother mountain mouth move music name near never "
    "night north note ocean often open order other page paint paper part past path people place plain plant "
    "play point port power press quick quiet rain reach read ready red rest ride right ring river road rock "
    "room round run salt sand school sea seed send serve shade shape ship shore short silver simple sing "
    "sleep slow small snow song soon sound south space stand star start step stone story street strong sun "
    "table talk tall tell thin thing think time town trade tree turn under valley voice walk wall warm "
    "watch water wave west wheel white whole wide wind window winter wood word work world write year"
)
WORDS = tuple(_TEXT.split())


@dataclass(frozen=True)
class Turn:
    """One request of a session.

    ``think``: seconds between the end of the answer before and this turn.
    """

    content: Content
    new_tokens: int
    think: float = 0.0


@dataclass(frozen=True)
class Session:
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Lengths:
    """Of the contents that are made, in tokens (in words where a server takes text only): least and most."""

    input: tuple[int, int] = (256, 256)
    output: tuple[int, int] = (128, 128)
    prefix: int = 512


@dataclass(frozen=True)
class Shape:
    """How the made datasets are made.

    Attributes:
        prefixes: how many prefixes are shared.
        distinct: prompts of ``repeat``.
        turns: of a session of ``multi-turn``.
        think: seconds between its turns.
    """

    lengths: Lengths = Lengths()
    prefixes: int = 1
    distinct: int = 1
    turns: int = 3
    think: float = 0.0


def ids_below(vocab: int) -> Make:
    """Makes prompts of exactly n random token ids, below ``vocab``."""

    def make(count: int, draw: random.Random) -> Content:
        return draw.choices(range(min(FIRST_ID, vocab // 2), vocab), k=count)

    return make


def words(count: int, draw: random.Random) -> Content:
    """A text of n words, for servers that take no ids."""
    return " ".join(draw.choices(WORDS, k=count))


def join(first: Content, second: Content) -> Content:
    """Two contents of one form, one after the other."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first} {second}" if first and second else first or second
    assert isinstance(first, list) and isinstance(second, list)
    return [*first, *second]


def made(kind: str, shape: Shape, make: Make, seed: int) -> Iterator[Session]:
    """Endless sessions of a made dataset.

    Raises:
        InvalidValueError: a kind that there is not.
    """
    if kind not in KINDS:
        raise InvalidValueError("--dataset", kind, f"one of {', '.join(KINDS)}, or a .json or .jsonl file")
    draw = random.Random(f"{kind} {seed}")
    lengths = shape.lengths

    def turn(before: Content | None = None, think: float = 0.0) -> Turn:
        content = make(draw.randint(*lengths.input), draw)
        content = content if before is None else join(before, content)
        return Turn(content, draw.randint(*lengths.output), think)

    if kind == "shared-prefix":
        prefixes = [make(lengths.prefix, draw) for _ in range(shape.prefixes)]
        for number in itertools.count():
            yield Session((turn(prefixes[number % len(prefixes)]),))
    elif kind == "repeat":
        kept = [turn() for _ in range(shape.distinct)]
        for number in itertools.count():
            yield Session((kept[number % len(kept)],))
    elif kind == "multi-turn":
        while True:
            yield Session(tuple(turn(think=shape.think if place else 0.0) for place in range(shape.turns)))
    while True:
        yield Session((turn(),))


class Dialogue:
    """What a session has said so far, in the form that its server takes.

    Args:
        form: ``ids``, ``text`` or ``messages``.
    """

    def __init__(self, form: str) -> None:
        self.form = form
        self._said: Content = "" if form == "text" else []

    def ask(self, content: Content) -> Mapping[str, Any]:
        """The whole prompt with this content last, as a keyword of ``Ask``."""
        if self.form == "messages" and isinstance(content, str):
            content = [{"role": "user", "content": content}]
        self._said = join(self._said, content)
        return {self.form: self._said}

    def heard(self, text: str, ids: Sequence[int] | None) -> bool:
        """Put the real answer behind it; False where the server did not name its ids, and they are needed."""
        if self.form == "ids":
            if ids is None:
                return False
            self._said = join(self._said, list(ids))
        elif self.form == "text":
            assert isinstance(self._said, str)
            self._said += text
        else:
            self._said = join(self._said, [{"role": "assistant", "content": text}])
        return True
