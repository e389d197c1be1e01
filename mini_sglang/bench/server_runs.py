"""One answer over HTTP, a burst of them, and whether they count."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mini_sglang.bench.runs import Run
from mini_sglang.bench.wire.client import Answer


@dataclass
class HttpRun(Run):
    """One answer.

    Attributes:
        first_byte: seconds to the first byte of its body.
        output_tokens: by its ids, or by the server's count where it names none.
        number: of the conversation's opening; a burst has as many as it has answers.
    """

    first_byte: float | None = None
    output_tokens: int = 0
    number: int = 0
    cached_tokens: int | None = None

    @property
    def tokens(self) -> int:
        return self.output_tokens


def read_answer(
    answer: Answer,
    *,
    peer: str,
    group: str,
    round: int,
    turn: int,
    prompt: Sequence[int],
    new: int,
    number: int,
) -> HttpRun:
    """An answer as a run, with the reason why it does not count, if it does not."""
    seconds = answer.end - answer.sent
    times = [time - answer.sent for time in answer.times]
    run = HttpRun(
        peer=peer,
        group=group,
        round=round,
        turn=turn,
        prompt_tokens=len(prompt),
        ids=answer.ids or [],
        seconds=seconds,
        first=times[0] if times else None,
        # Of pieces of text it is not known which token came when.
        times=times if len(times) == answer.output_tokens else None,
        wall=seconds,
        first_byte=None if answer.first_byte is None else answer.first_byte - answer.sent,
        output_tokens=answer.output_tokens or 0,
        number=number,
        cached_tokens=answer.cached_tokens,
    )
    if answer.error is not None:
        run.reason = f"{answer.error}: {answer.detail}"
    elif answer.output_tokens != new:
        run.reason = f"it gave {answer.output_tokens} tokens where {new} were asked for"
    elif answer.prompt_tokens is not None and answer.prompt_tokens != len(prompt):
        run.reason = f"it counted {answer.prompt_tokens} prompt tokens where {len(prompt)} were sent"
    elif not times:
        run.reason = "its answer came without text or ids, so that nothing says when its first token came"
    return run


@dataclass
class Burst(HttpRun):
    """Answers that were asked for at once, as one run: all tokens from the first request to the last id.

    ``ids`` and ``choices`` are those of all, one after another; TTFT and ITL are means.
    """

    answers: list[HttpRun] = field(default_factory=list)

    @property
    def itl(self) -> float | None:
        return _mean([run.itl for run in self.answers])

    def as_json(self) -> dict[str, Any]:
        fields = super().as_json()
        del fields["answers"]
        return {
            **fields,
            "turn": "burst",
            "prompt_tokens": [run.prompt_tokens for run in self.answers],
            "ids": [run.ids for run in self.answers],
            "times": [run.times for run in self.answers],
            "choices": [run.choices for run in self.answers],
            "firsts": [run.first for run in self.answers],
            "ends": [run.seconds for run in self.answers],
        }


def burst_of(answers: Sequence[Answer], runs: Sequence[HttpRun]) -> Burst:
    """The answers of one burst, which are those runs, as one."""
    seconds = max(answer.end for answer in answers) - min(answer.sent for answer in answers)
    failed = next((run.reason for run in runs if run.reason), None)
    one = runs[0]
    return Burst(
        peer=one.peer,
        group=one.group,
        round=one.round,
        turn=one.turn,
        prompt_tokens=sum(run.prompt_tokens for run in runs),
        ids=[token for run in runs for token in run.ids],
        seconds=seconds,
        first=_mean([run.first for run in runs]),
        times=None,
        wall=seconds,
        reason=failed,
        first_byte=_mean([run.first_byte for run in runs]),
        output_tokens=sum(run.output_tokens for run in runs),
        answers=list(runs),
    )


def gather_choices(burst: Burst) -> None:
    """Give a burst what the reference would have chosen in each of its answers, where it judged all."""
    found: list[int] = []
    for run in burst.answers:
        if run.choices is None:
            return
        found += run.choices
    burst.choices = found


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known and len(known) == len(values) else None
