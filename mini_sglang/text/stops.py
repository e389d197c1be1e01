"""Stop strings over streamed text: cut the answer where one ends, hold back only what could become one."""

from __future__ import annotations

from collections.abc import Sequence


class StopMatcher:
    """Finds the first of several stop strings in a text that comes in pieces.

    The match is the one that is complete first, reading character by character; of several complete at
    the same character it is the longest. So the outcome depends on the text alone, never on how it was
    cut into pieces.

    Args:
        stops: strings that end the text; none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops), "an empty stop string matches everywhere"
        self._stops = tuple(dict.fromkeys(stops))
        self._held = ""
        self._matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """Take the next piece; give what is safe to show, and the stop string if one is now complete.

        Safe is what no stop string can swallow any more, whatever comes next. After a match the safe part
        ends where the match begins, and every later call gives nothing but the same match.
        """
        if not self._stops:  # as most requests have it, token after token
            return text, None
        if self._matched is not None:
            return "", self._matched
        text = self._held + text
        first: tuple[int, int] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (first is None or (start + len(stop), start) < first):
                first = (start + len(stop), start)
        if first is not None:
            end, start = first
            self._held, self._matched = "", text[start:end]
            return text[:start], self._matched
        safe = len(text) - self._partial(text)
        self._held = text[safe:]
        return text[:safe], None

    def finish(self) -> str:
        """The text that was held back, now that no more comes; nothing after a match."""
        rest, self._held = self._held, ""
        return rest

    def _partial(self, text: str) -> int:
        """Length of the longest end of ``text`` that some stop string begins with."""
        longest = 0
        for stop in self._stops:
            # Every place in reach where the stop string could have begun, the earliest (longest) first.
            start = text.find(stop[0], max(0, len(text) - len(stop) + 1))
            while start >= 0 and len(text) - start > longest:
                if stop.startswith(text[start:]):
                    longest = len(text) - start
                    break
                start = text.find(stop[0], start + 1)
        return longest
