"""The comparison over HTTP with servers of known speed: one at a time, in turns; only what counts counts."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from mini_sglang.bench import server_cli, server_compare
from mini_sglang.bench.peers.base import Launch, Peer
from mini_sglang.bench.process import PeerError
from mini_sglang.bench.server_compare import Place, ServerComparison
from mini_sglang.bench.server_process import ServerProcess, free_port
from mini_sglang.bench.server_runs import Burst, burst_of, gather_choices, read_answer
from mini_sglang.bench.server_sides import ServerSide
from mini_sglang.bench.sides import Side
from mini_sglang.bench.wire.client import Answer
from mini_sglang.errors import MiniSglangError
from tests.bench.fake_server import Behaviour, fake_server
from tests.bench.streams import PROMPT

NEW, TURNS = 6, 3


class Stage:
    """Fake servers in place of processes; ``told`` says who was started and ended, in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.told: list[str] = []
        self.behaviours: dict[str, Behaviour] = {}
        self.alive = 0

        @contextmanager
        def server(compared: Any, place: Place, side: ServerSide) -> Iterator[tuple[str, None]]:
            self.told.append(side.name)
            self.alive += 1
            assert self.alive == 1
            place.starts.append(0.0)
            try:
                with fake_server(self.behaviours[side.name]) as url:
                    yield url, None
            finally:
                self.alive -= 1

        monkeypatch.setattr(ServerComparison, "_server", server)
        monkeypatch.setattr(server_compare, "rest", lambda wait: None)

    def side(self, name: str, dialect: str, **behaviour: Any) -> ServerSide:
        self.behaviours[name] = Behaviour(dialect, **behaviour)
        peer = Peer(name, name.title(), None, "folder", wire=dialect)
        return ServerSide(name, name.title(), "bf16", peer=peer, path=Path("weights"))


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    return Stage(monkeypatch)


def compare(
    sides: Sequence[Side],
    rounds: int = 2,
    concurrency: int = 3,
    prompt: Callable[[int, int], list[int]] | None = None,
) -> list[Place]:
    comparison = ServerComparison(
        prompt=prompt or (lambda number, turn: [number % 100, turn] + [7] * (PROMPT - 2)),
        text=lambda ids: " ".join(map(str, ids)),
        turns=TURNS,
        new=NEW,
        rounds=rounds,
        concurrency=concurrency,
        limit=20.0,
    )
    return comparison.run(sides)


def test_a_servers_known_delays_are_its_figures(stage: Stage) -> None:
    first, each = 0.1, 0.03
    sides = [
        stage.side("ours", "ours", first=first, each=each),
        stage.side("other", "transformers", first=first),
    ]
    for place in compare(sides):
        assert place.reason is None and place.burst_reason is None
        assert len(place.runs) == 2 * TURNS and len(place.bursts) == 2
        assert all(run.tokens == NEW and run.prompt_tokens == PROMPT for run in place.runs)
        assert first <= statistics.median(run.first or 0.0 for run in place.runs) <= first + 0.5
    ours = compare(sides[:1])[0]
    whole = first + each * (NEW - 1)
    assert whole <= statistics.median(run.seconds for run in ours.runs) <= whole + 0.5
    # All of a burst at once: as long as one, with three times the tokens.
    for burst in ours.bursts:
        assert burst.tokens == 3 * NEW and whole <= burst.seconds <= whole + 0.6
        assert len(burst.answers) == 3


def test_one_server_at_a_time_and_the_order_turns(stage: Stage) -> None:
    sides = [stage.side(name, "ours") for name in ("a", "b", "c")]
    compare(sides, rounds=3, concurrency=0)
    assert stage.told == [*"abc", *"cba", *"abc"]


def test_all_are_asked_the_same_and_no_prompt_comes_twice(stage: Stage) -> None:
    sides = [stage.side("ours", "ours"), stage.side("other", "vllm")]
    compare(sides, rounds=2, prompt=lambda number, turn: [number, turn] + [7] * (PROMPT - 2))
    ours, other = (stage.behaviours[name].bodies for name in ("ours", "other"))
    assert [body["prompt"] for body in ours] == [body["prompt"] for body in other]
    prompts = [tuple(body["prompt"]) for body in ours]
    # A server is started anew for each round, whose warm-up is the same again.
    warm = [tuple(p) for p in prompts if p[0] == 0 or 1000 <= p[0] < 2000]
    assert len(set(prompts)) == 2 * (TURNS + 3) + len(set(warm))


@pytest.mark.parametrize("missing", [1, -1])
def test_another_number_of_tokens_makes_a_row_invalid(stage: Stage, missing: int) -> None:
    (place,) = compare([stage.side("short", "ours", missing=missing)])
    assert place.reason == f"it gave {NEW - missing} tokens where {NEW} were asked for"
    # It takes no further part.
    assert stage.told == ["short"]


def test_another_number_of_prompt_tokens_makes_a_row_invalid(stage: Stage) -> None:
    (place,) = compare([stage.side("x", "ours")], prompt=lambda number, turn: [1] * (PROMPT + 2))
    assert place.reason == f"it counted {PROMPT} prompt tokens where {PROMPT + 2} were sent"


def test_a_server_that_fails_does_not_stop_the_others(stage: Stage) -> None:
    bad = stage.side("bad", "ours", fault=lambda number: 500 if number else None)
    good = stage.side("good", "ours")
    gone = Side("gone", "Gone", "bf16", missing="it is not installed")
    places = {place.side.name: place for place in compare([bad, gone, good])}
    assert places["bad"].reason == "status 500: no place left"
    assert places["gone"].reason == "it is not installed"
    assert places["good"].reason is None and len(places["good"].runs) == 2 * TURNS
    assert "gone" not in stage.told


def test_a_burst_that_fails_leaves_the_single_stream_its_figures(stage: Stage) -> None:
    # The warm-up and three turns, a warm burst of three, then the burst.
    bad = stage.side("bad", "ours", fault=lambda number: 429 if number == 8 else None)
    (place,) = compare([bad], rounds=1)
    assert place.reason is None and place.burst_reason == "status 429: no place left"


def answer(sent: float, times: list[float], end: float, **fields: Any) -> Answer:
    plain = {"ids": list(range(len(times))), "output_tokens": len(times), "prompt_tokens": 2}
    found = Answer(sent, first_byte=times[0], times=times, counted=True, end=end)
    for name, value in {**plain, **fields}.items():
        setattr(found, name, value)
    return found


TOLD: dict[str, Any] = {"peer": "p", "group": "g", "round": 1, "turn": 1, "prompt": [1, 2], "number": 5}


def burst() -> Burst:
    answers = [answer(10.0, [10.5, 11.0], 11.0), answer(10.25, [10.5, 12.0], 12.25)]
    return burst_of(answers, [read_answer(one, new=2, **TOLD) for one in answers])


def test_a_bursts_arithmetic() -> None:
    found = burst()
    assert found.reason is None
    # From the first request to the last end; means of 0.5 and 0.25, of 0.5 and 1.5.
    assert (found.seconds, found.tokens) == (2.25, 4)
    assert (found.first, found.first_byte, found.itl) == (0.375, 0.375, 1.0)
    told = found.as_json()
    assert (told["turn"], told["ids"], told["prompt_tokens"]) == ("burst", [[0, 1], [0, 1]], [2, 2])
    assert told["times"] == [[0.5, 1.0], [0.25, 1.75]]


def test_choices_of_a_burst_are_those_of_all_its_answers_or_none() -> None:
    found = burst()
    found.answers[0].choices = [0, 1]
    gather_choices(found)
    assert found.choices is None
    found.answers[1].choices = [0, 9]
    gather_choices(found)
    assert found.choices == [0, 1, 0, 9]


def test_pieces_are_not_taken_for_tokens() -> None:
    run = read_answer(answer(0.0, [1.0, 2.0], 2.0, ids=None, output_tokens=4), new=4, **TOLD)
    assert run.reason is None and run.times is None and run.tokens == 4 and run.ids == []
    assert run.first == 1.0


SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/ready' else 404)
        self.end_headers()
    def log_message(self, *words): pass
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""


def test_a_server_is_started_watched_and_ended() -> None:
    port = free_port()
    server = ServerProcess("x", [sys.executable, "-c", SERVER, str(port)], port, ready="/ready", seconds=60)
    try:
        assert server.start_seconds > 0
        assert server.usage.peak_bytes() > 1 << 20
    finally:
        server.close()
    assert server.usage.peak_bytes() == 0


def test_a_server_that_does_not_start_says_why() -> None:
    words = [sys.executable, "-c", "import sys; print('no weights here'); sys.exit(3)"]
    with pytest.raises(PeerError, match="x: its server ended with status 3: no weights here"):
        ServerProcess("x", words, free_port())
    with pytest.raises(PeerError, match=r"was not ready within 0\.3 s"):
        ServerProcess("x", [sys.executable, "-c", "import time; time.sleep(60)"], free_port(), seconds=0.3)
    with pytest.raises(PeerError, match="cannot be run"):
        ServerProcess("x", ["/no/such/python"], free_port())


def test_a_side_is_started_as_its_launch_says() -> None:
    launch = Launch(
        lambda python, model, port, threads: [python, "-c", SERVER, str(port)], ready="/ready", seconds=60
    )
    side = ServerSide("x", "X", "g", python=sys.executable, peer=Peer("x", "X", None, "any", launch=launch))
    server = side.serve()
    server.close()


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--concurrency", "-1"], "concurrency"),
        (["--rounds", "0"], "rounds"),
        (["--max-new-tokens", "1"], "max_new_tokens"),
        (["--peers", "nobody"], "nobody"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_bad_options_are_one_sentence(
    words: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert server_cli.main(words) == 2
    said = capsys.readouterr().err
    assert name in said and len(said.splitlines()) == 1


def test_a_url_names_its_peer_too() -> None:
    found = server_cli._peers("sglang", ["ollama", "sglang"])
    assert [peer.name for peer in found] == ["sglang", "ollama"]
    with pytest.raises(MiniSglangError, match="peers"):
        server_cli._peers(" , ", [])
