"""Which steps are recorded: by numbers of rows, and by how long their sequences may be."""

from __future__ import annotations

from dataclasses import dataclass

# Programs that find nothing to do, in each layer: what it costs to start so many is worth a graph of fewer.
_IDLE_PROGRAMS = 4096
SHORT_PROMPT = 32
"""Prompts of up to so many tokens are split over their positions, as decodes are."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One recorded step.

    Attributes:
        rows: tokens; a step of fewer is padded.
        decodes: whether they are of as many sequences; else they are one sequence's.
        positions: the most that a sequence may have after the step.
    """

    rows: int
    decodes: bool
    positions: int

    @property
    def sequences(self) -> int:
        return self.rows if self.decodes else 1


def decode_sizes(most: int) -> list[int]:
    """Numbers of decodes that a step is padded to, ascending; the last is ``most``."""
    return [size for size in (1, 2, 4) if size < most] + _steps(8, 8, 4, most)


def prompt_sizes(most: int) -> list[int]:
    """Numbers of a prompt's tokens that a step is padded to, ascending; the last is ``most``."""
    if most < 2:
        return []
    return [size for size in (16, SHORT_PROMPT) if size < most] + _steps(64, 64, 8, most)


def _steps(first: int, least: int, parts: int, most: int) -> list[int]:
    """From ``first`` on, by ``least`` or a part of the largest power of two that is no larger."""
    sizes = []
    size = first
    while size < most:
        sizes.append(size)
        size += max(least, (1 << (size.bit_length() - 1)) // parts)
    return [*sizes, most]


def split_levels(programs: int, most: int) -> list[int]:
    """Into how many parts sequences may be divided in the recordings of one size, ascending.

    A recording starts as many programs for every sequence as its longest may need. So one for the longest
    there are is enough where sequences are few; more of them spare many sequences that are short the
    programs that find nothing to do. One part has no second kernel.

    Args:
        programs: for each part, over all sequences.
        most: parts of the longest sequence.
    """
    levels = [most]
    level = 1 << (most.bit_length() - 1)
    while level > 1:
        if (levels[0] - level) * programs >= _IDLE_PROGRAMS:
            levels.insert(0, level)
        level //= 2
    return levels if most == 1 else [1, *levels]


def shapes(decodes: int, prompt: int, positions: int, span: int, spans: int, programs: int) -> list[Shape]:
    """All steps to record, the largest first.

    Args:
        decodes: most sequences of a step that decodes; 0 records none.
        prompt: longest prompt; below 2 none is recorded.
        positions: most of a sequence.
        span: positions of a part of a sequence at least; ``spans`` are the most parts.
        programs: of a sequence, for each part.
    """
    most = min(spans, -(-positions // span))

    def of(size: int, decodes: bool, levels: list[int]) -> list[Shape]:
        return [Shape(size, decodes, positions if level == most else level * span) for level in levels]

    found: list[Shape] = []
    for size in decode_sizes(decodes) if decodes else []:
        found += of(size, True, split_levels(size * programs, most))
    for size in prompt_sizes(prompt):
        found += of(size, False, split_levels(programs, most) if size <= SHORT_PROMPT else [most])
    return sorted(found, key=lambda shape: (shape.rows, shape.positions), reverse=True)
