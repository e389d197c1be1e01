"""A step of many rows as several of fewer, so that its buffers stay small and in the caches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mini_sglang.backend.step import SequenceResult, SequenceStep

SHORT = 128
"""A sequence of at most so many rows is not cut; a piece has room for it. One with drafts has no more."""


def cut(steps: Sequence[SequenceStep], max_rows: int) -> list[list[tuple[int, SequenceStep]]]:
    """``steps`` in pieces of at most ``max_rows`` (not below ``SHORT``) tokens, to be run one after another.

    Returns:
        of each piece its steps and their places in ``steps``. A long sequence may have parts in several, of
        which the last one samples.
    """
    pieces: list[list[tuple[int, SequenceStep]]] = []
    piece: list[tuple[int, SequenceStep]] = []
    room = max_rows
    for place, step in enumerate(steps):
        rest = step
        while (count := len(rest.token_ids)) > room:
            if count > SHORT and room:
                part, rest = _divide(rest, room)
                piece.append((place, part))
            pieces.append(piece)
            piece, room = [], max_rows
        piece.append((place, rest))
        room -= count
    return [*pieces, piece]


def join(
    count: int, pieces: Sequence[Sequence[tuple[int, SequenceStep]]], results: Sequence[list[SequenceResult]]
) -> list[SequenceResult]:
    """The results of ``count`` steps from those of the pieces that ``cut`` made of them."""
    joined: list[SequenceResult | None] = [None] * count
    for piece, outcomes in zip(pieces, results, strict=True):
        for (place, _), result in zip(piece, outcomes, strict=True):
            before = joined[place]
            if before is not None:
                result.prompt_logprobs = before.prompt_logprobs + result.prompt_logprobs
            joined[place] = result
    return [result for result in joined if result is not None]


def _divide(step: SequenceStep, count: int) -> tuple[SequenceStep, SequenceStep]:
    ids, targets = step.token_ids, step.prompt_targets
    return (
        replace(step, token_ids=ids[:count], prompt_targets=targets[:count], sample=None),
        replace(step, token_ids=ids[count:], start=step.start + count, prompt_targets=targets[count:]),
    )
