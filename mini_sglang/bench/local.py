"""``local_bench.py``: stacks side by side, in process, over one conversation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from mini_sglang.bench.compare import WARM_NEW, Comparison, Participant
from mini_sglang.bench.conversation import SUITE, Conversation, check_room
from mini_sglang.bench.machine import Limits, machine_line, measure_limits
from mini_sglang.bench.models import BenchModel
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers, interpreter
from mini_sglang.bench.process import PeerError
from mini_sglang.bench.record import Record
from mini_sglang.bench.reference import Reference
from mini_sglang.bench.runs import Run, row, set_ratios
from mini_sglang.bench.sides import OURS, Side, SideMaker
from mini_sglang.bench.table import sentence, table
from mini_sglang.config import VERSION, Settings


@dataclass(frozen=True)
class Plan:
    """What was asked for.

    Attributes:
        prompt: one turn of it; None for the suite.
        new: ids of each answer.
        dtype: of peers that read a folder.
        reference: whether float32 transformers judges.
        limit: seconds that an answer may take.
        wait: seconds that are waited for a quiet machine, before each answer at most.
    """

    prompt: str | None
    new: int
    rounds: int
    dtype: str
    threads: int
    peers: Sequence[Peer]
    reference: bool
    limit: float
    wait: float = 0.0

    @property
    def conversation(self) -> Conversation:
        return Conversation(SUITE if self.prompt is None else (self.prompt,))


@dataclass
class Outcome:
    """Rows and every run of them, with what a reader has to know beside.

    Attributes:
        answers: the reference's own ids for round 1; empty where there is none.
        versions: of peers and their libraries.
        notes: on all of the table.
        limits: what the machine can do; None where that could not be measured.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    runs: list[Run] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    limits: Limits | None = None


@dataclass(frozen=True)
class Bench:
    """Measures a plan on a model.

    Args:
        step: is told what begins, for a person who watches.
    """

    plan: Plan
    model: BenchModel
    settings: Settings
    step: Callable[[str], None]

    def run(self) -> Outcome:
        """Raises: ContextLengthError or InvalidValueError, for a prompt that does not fit or is none."""
        plan, outcome = self.plan, Outcome()
        conversation = plan.conversation
        tokens = check_room(conversation, self.model.tokenizer, plan.new, self.model.context)
        maker = SideMaker(self.model, plan.dtype, plan.threads, tokens, self.settings, self.step)
        groups = maker.groups(plan.peers)
        reference, conversation = self._begin(outcome, conversation)
        participants = [participant for sides in groups for participant in self._compare(conversation, sides)]
        outcome.runs = [run for participant in participants for run in participant.runs]
        if reference is not None and outcome.runs:
            self._judge(reference, conversation, outcome)
        self._finish(participants, outcome)
        return outcome

    def _begin(self, outcome: Outcome, conversation: Conversation) -> tuple[Reference | None, Conversation]:
        """The reference, if there is one, and the conversation with the answers that later turns build on."""
        reference = self._reference(outcome)
        if reference is not None:
            try:
                outcome.answers = reference.answers(
                    conversation, self.model.tokenizer, self.plan.new, self.step
                )
                conversation = conversation.with_answers(self.model.tokenizer, outcome.answers)
            except PeerError as error:
                outcome.notes.append(f"no float32 reference: {error}")
                reference = None
        if reference is None and len(conversation.turns) > 1:
            outcome.notes.append(
                "the answers that later turns build on are a script, as no reference gives its own"
            )
        return reference, conversation

    def _reference(self, outcome: Outcome) -> Reference | None:
        if not self.plan.reference:
            outcome.notes.append("no float32 reference was asked for, so nobody says whose ids are right")
            return None
        try:
            python = interpreter(all_peers()["hf"], self.settings)
        except PeerError as error:
            outcome.notes.append(f"no float32 reference: {error}")
            return None
        return Reference(self.model.path, python, self.plan.threads, 4 * self.plan.limit)

    def _compare(self, conversation: Conversation, sides: Sequence[Side]) -> list[Participant]:
        plan = self.plan
        comparison = Comparison(
            prompt=lambda number, turn: conversation.prompt(self.model.tokenizer, number, turn),
            turns=len(conversation.turns),
            new=plan.new,
            rounds=plan.rounds,
            answer_seconds=plan.limit,
            wait=plan.wait,
            step=self.step,
        )
        return comparison.run(sides)

    def _judge(self, reference: Reference, conversation: Conversation, outcome: Outcome) -> None:
        tokenizer = self.model.tokenizer
        try:
            unjudged = reference.judge(
                outcome.runs, lambda number, turn: conversation.prompt(tokenizer, number, turn), self.step
            )
        except PeerError as error:
            unjudged = {"all": str(error)}
        for peer, why in unjudged.items():
            outcome.notes.append(f"the float32 reference could not judge {peer}: {why}")
        outcome.versions["reference transformers"] = reference.versions.get("transformers", "unknown")

    def _finish(self, participants: Sequence[Participant], outcome: Outcome) -> None:
        for participant in participants:
            made = row(
                participant.side,
                participant.runs,
                participant.reason,
                answers=outcome.answers or None,
                start_seconds=participant.start_seconds,
                notes=participant.about.get("notes", ()),
            )
            outcome.rows.append(made)
            for name, version in participant.about.get("versions", {}).items():
                # Two peers may have two versions of torch.
                if outcome.versions.setdefault(name, version) != version:
                    outcome.versions[f"{name} of {participant.side.name}"] = version
        set_ratios(outcome.rows, OURS)
        self._measure_limits(outcome)

    def _measure_limits(self, outcome: Outcome) -> None:
        self.step("the machine's limits")
        try:
            outcome.limits = measure_limits(self.plan.threads)
        except PeerError as error:
            outcome.notes.append(f"the machine's limits were not measured: {error}")


def report(plan: Plan, model: BenchModel, outcome: Outcome) -> Iterator[str]:
    """What is printed: what was run, the table, notes, the machine."""
    warm = f"one to warm up, of {min(plan.new, WARM_NEW)} tokens a turn"
    yield f"{model.name}: {asked(plan)} in alternating order after {warm}"
    yield ""
    yield from table(outcome.rows)
    yield from foot(outcome)


def asked(plan: Plan) -> str:
    """What every peer was asked, and how often."""
    turns = len(plan.conversation.turns)
    what = f"{turns} chat turns of {plan.new} new tokens" if turns > 1 else f"{plan.new} new tokens"
    plural = "" if plan.rounds == 1 else "s"
    threads = "1 thread" if plan.threads == 1 else f"{plan.threads} threads"
    return f"{what}, greedy, {threads}, {plan.rounds} round{plural}"


def foot(outcome: Outcome) -> Iterator[str]:
    """Notes, the machine, versions."""
    for note in outcome.notes:
        yield from sentence(f"{note[:1].upper()}{note[1:]}.")
    yield from sentence(machine_line(outcome.limits))
    named = {"mini-sglang": VERSION, **outcome.versions}.items()
    versions = ", ".join(f"{name} {version}" for name, version in named)
    yield from sentence(f"Versions: {versions}.")


def record(plan: Plan, model: BenchModel, outcome: Outcome) -> Record:
    """The JSON of it, every run in it."""
    settings = {
        "model": model.name,
        "prompt": plan.prompt,
        "turns": list(plan.conversation.turns),
        "max_new_tokens": plan.new,
        "rounds": plan.rounds,
        "dtype": plan.dtype,
        "threads": plan.threads,
        "peers": [peer.name for peer in plan.peers],
        "warm_up_tokens": min(plan.new, WARM_NEW),
        "reference": {"asked": plan.reference, "answers": outcome.answers},
        "notes": outcome.notes,
    }
    return Record(
        "local",
        settings,
        rows=outcome.rows,
        runs=[run.as_json() for run in outcome.runs],
        versions=outcome.versions,
        limits=outcome.limits,
    )


def status(rows: Sequence[dict[str, Any]]) -> int:
    """0 where ours ran and counts in every group it is in, else 1."""
    mine = [one["valid"] for one in rows if one["peer"] == OURS]
    return 0 if mine and all(mine) else 1
