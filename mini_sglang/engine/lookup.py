"""Prompt lookup: what followed the last tokens of a text where they stood in it before.

Saxena, "Prompt Lookup Decoding", 2023: an answer that quotes its prompt, edits it or repeats itself can
be guessed from the text alone.
"""

from __future__ import annotations

from collections.abc import Sequence

_LONGEST = 16  # tokens compared backwards
_PLACES = 8  # of a pair of tokens, the latest


class PromptLookup:
    """An index of one growing text by pairs of tokens; a token is added, and looked up, in O(1)."""

    def __init__(self) -> None:
        self._places: dict[int, list[int]] = {}
        self._indexed = 2

    def find(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Where the longest end of ``tokens``, of two at least, stood before.

        Args:
            tokens: those of the call before, and more.

        Returns:
            how many tokens agree, at most 16, and the place behind them; of several as long ones the
            latest. 0 and 0 where there is none.
        """
        places = self._places
        end = len(tokens)
        for place in range(self._indexed, end):
            key = tokens[place - 2] << 32 | tokens[place - 1]
            known = places.get(key)
            if known is None:
                places[key] = [place]
            else:
                if len(known) == _PLACES:
                    del known[0]
                known.append(place)
        self._indexed = max(self._indexed, end)
        best = found = 0
        if end > 2:
            for place in reversed(places.get(tokens[-2] << 32 | tokens[-1], ())):
                length = 2
                most = min(_LONGEST, place)
                while length < most and tokens[place - length - 1] == tokens[end - length - 1]:
                    length += 1
                if length > best:
                    best, found = length, place
                    if length == _LONGEST:
                        break
        return best, found


def copied(tokens: Sequence[int], place: int, count: int) -> list[int]:
    """``count`` tokens from ``place`` on; where the text ends within them it goes on as it did from there."""
    found = list(tokens[place : place + count])
    while len(found) < count:
        found += found[len(found) - (len(tokens) - place) :][: count - len(found)]
    return found
