"""A run of rows or columns of a parameter, for a rank that holds no more of it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Part:
    """``start`` to ``stop`` along dimension ``dim``: 0 for rows (of a vector, its numbers), 1 for columns."""

    dim: int
    start: int
    stop: int

    def shape(self, whole: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of this part of a parameter of the shape ``whole``."""
        return (*whole[: self.dim], self.stop - self.start, *whole[self.dim + 1 :])
