"""``server_bench.py``: servers side by side over HTTP, one stream of chat turns and a burst."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from mini_sglang.bench.conversation import check_room
from mini_sglang.bench.local import Bench, Outcome, Plan, asked, foot
from mini_sglang.bench.local import record as local_record
from mini_sglang.bench.models import BenchModel
from mini_sglang.bench.peers.registry import version
from mini_sglang.bench.process import PeerError
from mini_sglang.bench.record import Record
from mini_sglang.bench.reference import Reference
from mini_sglang.bench.runs import row, set_ratios
from mini_sglang.bench.server_compare import Place, ServerComparison
from mini_sglang.bench.server_runs import HttpRun, gather_choices
from mini_sglang.bench.server_sides import ServerSeating, ServerSide
from mini_sglang.bench.sides import OURS, Side
from mini_sglang.bench.table import COLUMNS, TTFB, table


@dataclass(frozen=True)
class ServerPlan(Plan):
    """What was asked for over HTTP.

    Attributes:
        concurrency: answers of the burst; 0 for none.
        urls: of servers that run already, by peer.
        base: added to the numbers of openings.
    """

    concurrency: int = 8
    urls: Mapping[str, str] = field(default_factory=dict)
    base: int = 0


@dataclass(frozen=True)
class ServerBench(Bench):
    """Measures a plan on a model."""

    plan: ServerPlan

    def run(self) -> Outcome:
        """Raises: ContextLengthError or InvalidValueError, for a prompt that does not fit or is none."""
        plan, outcome, tokenizer = self.plan, Outcome(), self.model.tokenizer
        conversation = plan.conversation
        tokens = check_room(conversation, tokenizer, plan.new, self.model.context)
        seating = ServerSeating(
            self.model, plan.dtype, plan.threads, tokens, self.settings, self.step, urls=plan.urls
        )
        groups = seating.groups(plan.peers)
        reference, conversation = self._begin(outcome, conversation)

        def prompt(number: int, turn: int) -> list[int]:
            return conversation.prompt(tokenizer, number, turn)

        comparison = ServerComparison(
            prompt=prompt,
            text=lambda ids: tokenizer.decode(ids, skip_special=False),
            turns=len(conversation.turns),
            new=plan.new,
            rounds=plan.rounds,
            concurrency=plan.concurrency,
            limit=plan.limit,
            base=plan.base,
            wait=plan.wait,
            step=self.step,
        )
        places = [place for sides in groups for place in comparison.run(sides)]
        if reference is not None:
            self._judge_places(reference, prompt, places, outcome)
        self._tell(places, outcome)
        return outcome

    def _judge_places(
        self,
        reference: Reference,
        prompt: Callable[[int, int], list[int]],
        places: Sequence[Place],
        outcome: Outcome,
    ) -> None:
        bursts = [burst for place in places for burst in place.bursts]
        runs: list[HttpRun] = [run for place in places for run in place.runs]
        runs += [run for burst in bursts for run in burst.answers]
        # The reference knows a prompt by the number of its opening, which over HTTP is not that of the round.
        twins = [replace(run, round=run.number) for run in runs if run.ids]
        if not twins:
            return
        try:
            reference.judge(twins, prompt, self.step)
        except PeerError as error:
            outcome.notes.append(f"the float32 reference judged nobody: {error}")
        judged = iter(twins)
        for run in runs:
            if run.ids:
                run.choices = next(judged).choices
        for burst in bursts:
            gather_choices(burst)
        outcome.versions["reference transformers"] = reference.versions.get("transformers", "unknown")

    def _tell(self, places: Sequence[Place], outcome: Outcome) -> None:
        # The reference's own answers are to openings without the base.
        answers = outcome.answers if outcome.answers and not self.plan.base else None
        single, bursts = [], []
        for place in places:
            outcome.runs += [*place.runs, *place.bursts]
            start = statistics.median(place.starts) if place.starts else None
            side = _noted(place.side)
            # What has to be known of a peer is said once.
            bare = replace(side, notes=())
            alone = replace(side, group=f"{side.group}, one stream")
            made = row(alone, place.runs, place.reason, answers=answers, start_seconds=start)
            single.append({**made, "ttfb": _ttfb(place.runs) if made["valid"] else None})
            if self.plan.concurrency:
                together = replace(bare, group=f"{side.group}, {self.plan.concurrency} at once")
                why = place.reason or place.burst_reason
                made = row(together, place.bursts, why, start_seconds=start)
                bursts.append({**made, "ttfb": _ttfb(place.bursts) if made["valid"] else None})
            if place.starts and isinstance(place.side, ServerSide) and place.side.peer is not None:
                found = version(place.side.peer, self.settings)
                if found is not None and place.side.name != OURS:
                    outcome.versions[place.side.name] = found
        outcome.rows = _by_group([*single, *bursts])
        set_ratios(outcome.rows, OURS)
        self._measure_limits(outcome)


def _noted(side: Side) -> Side:
    """With what its API cannot tell."""
    if isinstance(side, ServerSide) and side.missing is None and side.dialect.note:
        return replace(side, notes=(*side.notes, side.dialect.note))
    return side


def _ttfb(runs: Sequence[HttpRun]) -> float | None:
    """The median over the rounds of each one's mean."""
    rounds: dict[int, list[float]] = {}
    for run in runs:
        if run.first_byte is not None:
            rounds.setdefault(run.round, []).append(run.first_byte)
    return statistics.median(map(statistics.fmean, rounds.values())) if rounds else None


def _by_group(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    groups = list(dict.fromkeys(one["group"] for one in rows))
    return [one for group in groups for one in rows if one["group"] == group]


def report(plan: ServerPlan, model: BenchModel, outcome: Outcome) -> Iterator[str]:
    """What is printed: what was run, the table, notes, the machine."""
    burst = f", then {plan.concurrency} requests at once" if plan.concurrency else ""
    yield (
        f"{model.name} over HTTP: {asked(plan)} in alternating order{burst}; one server at a time, "
        "started for each round, warmed up and ended"
    )
    yield ""
    yield from table(outcome.rows, (*COLUMNS[:5], TTFB, *COLUMNS[5:]))
    yield from foot(outcome)


def record(plan: ServerPlan, model: BenchModel, outcome: Outcome) -> Record:
    """The JSON of it, every run in it."""
    made = local_record(plan, model, outcome)
    made.kind = "server"
    made.settings |= {"concurrency": plan.concurrency, "urls": sorted(plan.urls), "openings_from": plan.base}
    return made
