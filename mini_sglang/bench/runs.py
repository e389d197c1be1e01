"""One answer of one peer, whether it counts, and the row that all of a peer's answers come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

QUIET = 0.15
"""Cores that others may keep busy; with more, threads that wait for each other by spinning crawl."""


@dataclass
class Run:
    """One turn of one round.

    Attributes:
        turn: from 1.
        seconds: as the engine's process measured it, from the request to the last id.
        first: seconds to the first id; None where the engine only shows the end.
        times: seconds to each id; None where it does not show them.
        wall: seconds from outside, the pipe included.
        cpu_seconds: of the process and all it has begun.
        peak_bytes: the same, since its start.
        others: cores that other processes kept busy meanwhile.
        reason: why it does not count, in one sentence.
        choices: the reference's own choice at the place of each id; None where it was not asked.
    """

    peer: str
    group: str
    round: int
    turn: int
    prompt_tokens: int
    ids: list[int]
    seconds: float
    first: float | None
    times: list[float] | None
    wall: float = 0.0
    cpu_seconds: float = 0.0
    peak_bytes: int = 0
    others: float = 0.0
    reason: str | None = None
    choices: list[int] | None = None

    @property
    def tokens(self) -> int:
        """Of the answer."""
        return len(self.ids)

    @property
    def itl(self) -> float | None:
        """Seconds from one id to the next, on the average of the answer, however they come in groups."""
        if self.first is None or self.tokens < 2:
            return None
        last = self.times[-1] if self.times else self.seconds
        return (last - self.first) / (self.tokens - 1)

    def as_json(self) -> dict[str, Any]:
        """With lists for each of its prompts, of which it has one."""
        fields = asdict(self)
        fields.update(
            prompt_tokens=[self.prompt_tokens],
            ids=[self.ids],
            times=None if self.times is None else [self.times],
            choices=None if self.choices is None else [self.choices],
            valid=self.reason is None,
        )
        return fields


def read_reply(reply: Mapping[str, Any], new: int, wall: float) -> tuple[dict[str, Any], str | None]:
    """A worker's answer as the fields of a ``Run``, and why it does not count.

    Args:
        new: the ids that were asked for.
        wall: seconds that passed outside.
    """
    fields: dict[str, Any] = {"ids": [], "seconds": wall, "first": None, "times": None}
    ids = reply.get("ids")
    if not isinstance(ids, list) or len(ids) != 1 or not _are(ids[0], int):
        return fields, "its answer has no ids"
    fields["ids"] = ids[0]
    if len(ids[0]) != new:
        return fields, f"it gave {len(ids[0])} ids where {new} were asked for"
    seconds, times = reply.get("seconds"), reply.get("times")
    if not _is_time(seconds):
        return fields, "its answer has no time"
    seconds = fields["seconds"] = float(seconds or 0.0)
    if seconds > wall:
        return fields, f"it says that it took {seconds:.3f} s, where {wall:.3f} s passed"
    if times is not None:
        if not isinstance(times, list) or len(times) != 1 or not _are(times[0], float):
            return fields, "its ids' times are no times"
        fields["times"] = times = times[0]
        if len(times) != new or sorted(times) != times or not 0 <= times[0] <= times[-1] <= seconds:
            return fields, "its ids' times do not fit its ids or its seconds"
    fields["first"] = times[0] if times else reply.get("first")
    if not (fields["first"] is None or (_is_time(fields["first"]) and fields["first"] <= seconds)):
        return {**fields, "first": None}, "its first id's time does not fit its seconds"
    return fields, None


def row(
    side: Any,
    runs: Sequence[Run],
    reason: str | None,
    *,
    answers: Sequence[Sequence[int]] | None = None,
    start_seconds: float | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """A peer's row; the figures of one that does not count are None.

    A round's figure is of all its turns: their tokens over their seconds, the mean of their TTFT and ITL. The
    row has the median over the rounds.

    Args:
        side: name, title, group and notes.
        runs: of the rounds that are measured.
        reason: why the peer has no figures; None where all of its runs count.
        answers: the reference's own answers to the turns of the first round.
        start_seconds: until it took requests.
        notes: what its process said that a reader has to know.
    """
    reason = reason or next((run.reason for run in runs if run.reason), None)
    figures: dict[str, Any] = dict.fromkeys(
        (
            "tokens",
            "seconds",
            "tokens_per_s",
            "spread",
            "ttft",
            "itl",
            "ratio",
            "agree",
            "same_until",
            "others",
        )
    )
    peak = max((run.peak_bytes for run in runs), default=0)
    notes = [*side.notes, *notes]
    if reason is None and not runs:
        reason = "it was not measured"
    if reason is None:
        figures.update(_figures(runs, answers))
        if figures["others"] > QUIET:
            notes.append(
                f"NOT QUIET: other processes kept {figures['others']:.2f} cores busy meanwhile, "
                f"up to {max(run.others for run in runs):.2f}"
            )
    return {
        "peer": side.name,
        "title": side.title,
        "group": side.group,
        "valid": reason is None,
        "reason": reason,
        **figures,
        "peak_mb": peak / 1e6 if peak else None,
        "start_seconds": start_seconds,
        "notes": notes,
    }


def set_ratios(rows: Sequence[dict[str, Any]], ours: str) -> None:
    """Tokens/s of ours over each peer's in its group: above 1 ours is faster."""
    mine = {one["group"]: one["tokens_per_s"] for one in rows if one["peer"] == ours and one["valid"]}
    for one in rows:
        if one["valid"] and one["peer"] != ours and one["group"] in mine:
            one["ratio"] = mine[one["group"]] / one["tokens_per_s"]


def leading(one: Sequence[int], other: Sequence[int]) -> int:
    """How many ids are the same before the first that is not."""
    count = 0
    for a, b in zip(one, other, strict=False):
        if a != b:
            break
        count += 1
    return count


def _figures(runs: Sequence[Run], answers: Sequence[Sequence[int]] | None) -> dict[str, Any]:
    rounds = [[run for run in runs if run.round == number] for number in sorted({run.round for run in runs})]
    tokens = [sum(run.tokens for run in one) for one in rounds]
    seconds = [sum(run.seconds for run in one) for one in rounds]
    rates = [count / taken for count, taken in zip(tokens, seconds, strict=True)]
    wall = sum(run.wall for run in runs)
    judged = [(run.ids, run.choices) for run in runs if run.choices is not None]
    named = all(len(run.ids) == run.tokens for run in runs)
    agree = sum(a == b for ids, choices in judged for a, b in zip(ids, choices, strict=True))
    return {
        "tokens": tokens[0],
        "seconds": statistics.median(seconds),
        "tokens_per_s": statistics.median(rates),
        "spread": [min(rates), max(rates)],
        "ttft": _median_of_means([[run.first for run in one] for one in rounds]),
        "itl": _median_of_means([[run.itl for run in one] for one in rounds]),
        "agree": agree / sum(len(ids) for ids, _ in judged) if len(judged) == len(runs) else None,
        "same_until": sum(map(leading, (run.ids for run in rounds[0]), answers))
        if answers and named
        else None,
        "others": sum(run.others * run.wall for run in runs) / wall if wall else 0.0,
    }


def _median_of_means(rounds: Sequence[Sequence[float | None]]) -> float | None:
    if any(value is None for one in rounds for value in one):
        return None
    return statistics.median(statistics.fmean(v for v in one if v is not None) for one in rounds)


def _are(values: object, kind: type) -> bool:
    if not isinstance(values, list):
        return False
    if kind is float:
        return all(_is_time(value) for value in values)
    return all(type(value) is kind for value in values)


def _is_time(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return 0 <= value < math.inf
