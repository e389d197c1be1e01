"""Rounds with peers whose delays are known, in real processes; and peers that misbehave."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from mini_sglang.bench import compare, machine
from mini_sglang.bench.compare import Comparison, Participant
from mini_sglang.bench.runs import row
from mini_sglang.bench.sides import Side

HERE = Path(__file__).parent
NEW = 4


@pytest.fixture(autouse=True)
def no_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "REST", 0.0)


def side(name: str, worker: str = "fake_worker", **options: Any) -> Side:
    return Side(name, name, "bf16", HERE / f"{worker}.py", sys.executable, {"name": name, **options})


def compared(sides: Sequence[Side], **options: Any) -> list[Participant]:
    given: dict[str, Any] = {
        "prompt": lambda number, turn: [number, turn],
        "turns": 1,
        "new": NEW,
        "rounds": 1,
        "answer_seconds": 60.0,
        **options,
    }
    return Comparison(**given).run(sides)


def rows_of(participants: Sequence[Participant]) -> list[dict[str, Any]]:
    return [
        row(participant.side, participant.runs, participant.reason, start_seconds=participant.start_seconds)
        for participant in participants
    ]


def test_a_known_start_first_id_and_gap_are_reported_as_that() -> None:
    start, first, gap = 1.0, 0.4, 0.1
    (made,) = rows_of(compared([side("slow", start=start, first=first, gap=gap)], rounds=3, turns=2))
    # A sleep is never shorter; how much longer it is depends on who else works on this machine.
    assert made["valid"] and made["tokens"] == 2 * NEW
    assert first <= made["ttft"] < 2 * first
    assert gap <= made["itl"] < 3 * gap
    one = first + (NEW - 1) * gap
    assert 2 * one <= made["seconds"] < 4 * one
    assert made["tokens_per_s"] == pytest.approx(2 * NEW / made["seconds"])
    assert start <= made["start_seconds"] < start + 20
    assert made["peak_mb"] > 1


def test_times_that_the_worker_gives_are_the_figures_exactly() -> None:
    times = [[0.0625, 0.125, 0.125, 0.25]]
    (made,) = rows_of(compared([side("exact", first=0.3, claim=0.25, times=times)], rounds=2))
    assert (made["ttft"], made["itl"], made["seconds"]) == (0.0625, 0.0625, 0.25)
    assert (made["tokens_per_s"], made["spread"]) == (16.0, [16.0, 16.0])


def test_a_peer_cannot_say_that_it_took_longer_or_shorter_than_by_our_clock() -> None:
    ticks = iter(range(100))
    (made,) = rows_of(compared([side("late", claim=1.5)], clock=lambda: next(ticks)))
    assert made["reason"] == "it says that it took 1.500 s, where 1.000 s passed"


def test_order_turns_round_each_round_and_the_warm_up_does_not_count(tmp_path: Path) -> None:
    log = tmp_path / "log"
    sides = [side(name, log=str(log)) for name in "abc"]
    participants = compared(sides, rounds=3, turns=2, new=compare.WARM_NEW + 1)
    lines = [line.split() for line in log.read_text().splitlines()]
    who = [(int(line[4]), line[0]) for line in lines if line[5] == "0"]
    assert who == [
        *((0, name) for name in "cba"),
        *((1, name) for name in "abc"),
        *((2, name) for name in "cba"),
        *((3, name) for name in "abc"),
    ]
    # A peer has all turns of a round before the next peer's, and keeps its own cache.
    assert [line[4:] for line in lines[:2]] == [["0", "0"], ["0", "1"]]
    assert {line[2] for line in lines} == {"False"}
    assert {line[1] for line in lines if line[4] == "0"} == {str(compare.WARM_NEW)}
    for participant in participants:
        assert [(run.round, run.turn) for run in participant.runs] == [
            (n, t) for n in (1, 2, 3) for t in (1, 2)
        ]


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"more": -1}, f"it gave {NEW - 1} ids where {NEW} were asked for"),
        ({"more": 1}, f"it gave {NEW + 1} ids where {NEW} were asked for"),
        ({"do": "die"}, "ended with status 3: a last word"),
        ({"do": "die", "at": 3}, "ended with status 3: a last word"),
        ({"do": "refuse"}, "RuntimeError: not this prompt"),
        ({"load": "fail"}, "ValueError: no such weights"),
    ],
)
def test_a_peer_that_fails_says_why_and_the_others_go_on(options: dict[str, Any], reason: str) -> None:
    bad, good = rows_of(compared([side("bad", **options), side("good")], rounds=2))
    assert not bad["valid"] and reason in bad["reason"] and "\n" not in bad["reason"]
    assert bad["tokens_per_s"] is None
    assert good["valid"] and good["tokens"] == NEW


def test_a_peer_that_hangs_is_ended_after_the_limit() -> None:
    begun = time.monotonic()
    bad, good = rows_of(compared([side("bad", do="hang"), side("good")], answer_seconds=3.0))
    assert bad["reason"] == "it gave no answer within 3 s" and good["valid"]
    assert time.monotonic() - begun < 120
    (slow,) = rows_of(compared([side("slow", start=600)], start_seconds=2.0))
    assert slow["reason"] == "it gave no answer within 2 s"


@pytest.mark.parametrize("late", [False, True])
def test_junk_in_the_place_of_an_answer_is_the_reason(late: bool) -> None:
    bad, good = rows_of(compared([side("bad", "junk_worker", late=late), side("good")]))
    assert bad["reason"] == "its process wrote what is no answer: 'Loading weights: 100%'"
    assert good["valid"]


def test_what_a_library_prints_is_not_taken_for_an_answer() -> None:
    (made,) = rows_of(compared([side("chatty", print=True, do="junk")]))
    assert made["valid"]


def test_a_side_that_is_missing_has_its_reason() -> None:
    gone, good = rows_of(
        compared([Side("gone", "Gone", "bf16", missing="it is not installed"), side("good")])
    )
    assert gone["reason"] == "it is not installed" and good["valid"]
    (made,) = rows_of(compared([Side("x", "x", "bf16", HERE / "fake_worker.py", "/nowhere/python")]))
    assert "cannot be run as a Python interpreter" in made["reason"]


def test_a_peer_that_spins_while_it_waits_is_held_still_meanwhile() -> None:
    held: dict[str, bool] = {}

    def step(line: str) -> None:
        for process in psutil.Process().children():
            # One that another test left to be waited for says nothing of itself.
            with suppress(psutil.ZombieProcess):
                if any('"name": "spinner"' in word for word in process.cmdline()):
                    held[line] = settled(process, line.startswith("other"))

    def settled(process: psutil.Process, stopped: bool) -> bool:
        """Whether it is held; a signal takes a moment to arrive."""
        end = time.monotonic() + 5
        while (process.status() == psutil.STATUS_STOPPED) != stopped and time.monotonic() < end:
            time.sleep(0.01)
        return bool(process.status() == psutil.STATUS_STOPPED)

    participants = compared([side("spinner", spin=True), side("other")], rounds=2, step=step)
    assert [participant.reason for participant in participants] == [None, None]
    turns = ("warm-up, turn 1", "round 1, turn 1", "round 2, turn 1")
    assert held == {
        **{f"spinner: {turn}": False for turn in turns},
        **{f"other: {what}": True for what in ("starting", *turns)},
    }


def test_all_processes_are_gone_at_the_end() -> None:
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    compared([side("a"), side("b", do="die"), side("c", do="hang")], answer_seconds=2.0)
    assert {process.pid for process in psutil.Process().children(recursive=True)} <= before


def test_sigterm_ends_all_processes_and_what_they_began() -> None:
    script = """
import sys
from tests.bench.test_compare import compared, side
compared([side("held", child=True), side("hangs", do="hang")], step=lambda line: print(line, flush=True))
"""
    root = HERE.parents[1]
    process = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    # The last of them hangs, in the warm-up that goes the other way round, and the first is held.
    for line in process.stdout:
        if line.startswith("hangs: warm-up"):
            break
    deadline = time.monotonic() + 60
    begun: list[psutil.Process] = []
    while len(begun) < 3 and time.monotonic() < deadline:
        begun = psutil.Process(process.pid).children(recursive=True)
    assert len(begun) == 3 and any(one.status() == psutil.STATUS_STOPPED for one in begun)
    process.terminate()
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    process.stdout.close()
    gone, left = psutil.wait_procs(begun, timeout=30)
    assert not left and len(gone) == 3
