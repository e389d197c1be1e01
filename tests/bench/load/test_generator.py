"""The generator in virtual time, with a server of known speed: exact, whatever the machine does."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from mini_sglang.bench.load.datasets import Session, Turn
from mini_sglang.bench.load.figures import row
from mini_sglang.bench.load.generator import Generator, Load
from mini_sglang.bench.wire.base import Ask
from mini_sglang.bench.wire.client import Answer
from tests.bench.virtual_time import VirtualLoop, run_virtual

FIRST, EACH = 0.5, 0.125


class Server:
    """Answers ``places`` requests at a time, each so fast; others wait. Answers are 100, 101, …"""

    def __init__(self, places: int = 1000, fails: Callable[[int], bool] = lambda number: False) -> None:
        self.asks: list[Ask] = []
        self.most = 0
        self._busy = 0
        self._places = asyncio.Semaphore(places)
        self._fails = fails

    async def __call__(self, ask: Ask) -> Answer:
        now = asyncio.get_running_loop().time
        answer = Answer(now(), counted=True)
        fails = self._fails(len(self.asks))
        self.asks.append(ask)
        async with self._places:
            self._busy += 1
            self.most = max(self.most, self._busy)
            for token in range(ask.new_tokens):
                await asyncio.sleep(EACH if token else FIRST)
                answer.times.append(now())
            self._busy -= 1
        answer.ids = [100 + n for n in range(ask.new_tokens)]
        answer.text = "".join(f" t{token}" for token in answer.ids)
        answer.output_tokens, answer.prompt_tokens, answer.end = ask.new_tokens, len(ask.ids or ""), now()
        if fails:
            answer.fail("status 500", "no", now())
        return answer


def single(count: int, new: int = 3) -> list[Session]:
    return [Session((Turn([n, n + 1], new),)) for n in range(count)]


def open_loop(server: Server, times: list[float], sessions: Iterable[Session], form: str = "ids") -> Load:
    async def run() -> Load:
        return await Generator(server, form, {}).open_loop(times, sessions)

    return run_virtual(run())


def closed_loop(server: Server, places: int, sessions: Iterable[Session], until: float | None = None) -> Load:
    async def run() -> Load:
        return await Generator(server, "ids", {}).closed_loop(places, iter(sessions), until)

    return run_virtual(run())


def test_a_known_server_is_reported_as_what_it_is() -> None:
    load = open_loop(Server(), [0.0, 0.25, 2.0], single(3))
    assert [request.planned for request in load.requests] == [0.0, 0.25, 2.0]
    assert [request.sent for request in load.requests] == [0.0, 0.25, 2.0]
    assert load.requests[1].times == (0.75, 0.875, 1.0)
    assert load.duration == 2.75
    found = row(load)
    for name, value in (("ttft", FIRST), ("tpot", EACH), ("itl", EACH), ("e2e", FIRST + 2 * EACH)):
        assert found[name] == {"mean": value, "p50": value, "p90": value, "p99": value}
    assert found["output_throughput"] == 9 / 2.75
    assert found["request_throughput"] == 3 / 2.75


def test_a_full_server_does_not_hold_back_the_next_requests() -> None:
    # One at a time, 0.75 s each, and four a second are due: an open loop sends them all in time.
    load = open_loop(Server(places=1), [0.0, 0.25, 0.5, 0.75], single(4))
    assert [request.sent for request in load.requests] == [0.0, 0.25, 0.5, 0.75]
    assert [request.end for request in load.requests] == [0.75, 1.5, 2.25, 3.0]
    assert row(load)["ttft"]["p50"] == 1.25


def test_requests_that_went_out_late_are_counted_from_when_they_were_due() -> None:
    class Slow(Server):
        async def __call__(self, ask: Ask) -> Answer:
            # The whole loop stands still, as under a client that has no time.
            loop = asyncio.get_running_loop()
            assert isinstance(loop, VirtualLoop)
            loop.clock.now += 1.0
            return await super().__call__(ask)

    found = row(open_loop(Slow(), [0.0, 0.5], single(2)))
    assert found["lag"] is not None and found["lag"]["p99"] > 1.0
    for name in ("ttft", "e2e"):
        assert found[f"{name}_planned"]["mean"] == pytest.approx(found[name]["mean"] + found["lag"]["mean"])


@pytest.mark.parametrize("places", [1, 3])
def test_a_closed_loop_keeps_so_many_going(places: int) -> None:
    server = Server()
    load = closed_loop(server, places, single(6))
    assert server.most == places
    assert load.duration == 0.75 * 6 / places
    assert all(request.planned == request.sent for request in load.requests)


def test_a_closed_loop_ends_after_its_duration() -> None:
    server = Server()
    endless = (Session((Turn([1], 3),)) for _ in itertools.count())
    load = closed_loop(server, 2, endless, 2.0)
    # 0, 0.75 and 1.5 s are before it; what was begun is heard out.
    assert len(load.requests) == 6 and load.duration == 2.25 and load.unfinished == 0


CHAT = Session((Turn([1, 2], 2), Turn([3], 1, think=0.25), Turn([4], 1, think=0.25)))


def test_a_turn_follows_the_answer_that_came_and_the_time_to_think() -> None:
    server = Server()
    load = open_loop(server, [1.0], [CHAT])
    assert [list(ask.ids or ()) for ask in server.asks] == [
        [1, 2],
        [1, 2, 100, 101, 3],
        [1, 2, 100, 101, 3, 100, 4],
    ]
    first_end = 1.0 + FIRST + EACH
    assert [request.planned for request in load.requests] == [
        1.0,
        first_end + 0.25,
        first_end + 0.25 + FIRST + 0.25,
    ]
    assert [(request.session, request.turn) for request in load.requests] == [(0, 0), (0, 1), (0, 2)]


def test_history_as_text_and_as_messages() -> None:
    session = Session((Turn("hello", 2), Turn("again", 1)))
    server = Server()
    open_loop(server, [0.0], [session], "text")
    assert [ask.text for ask in server.asks] == ["hello", "hello t100 t101 again"]
    server = Server()
    open_loop(server, [0.0], [session], "messages")
    assert server.asks[1].messages == [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": " t100 t101"},
        {"role": "user", "content": "again"},
    ]


def test_a_failed_turn_ends_its_session_and_no_other() -> None:
    server = Server(fails=lambda number: number == 0)
    load = open_loop(server, [0.0, 5.0], [CHAT, CHAT])
    assert [(request.session, request.turn, request.error) for request in load.requests] == [
        (0, 0, "status 500"),
        (1, 0, None),
        (1, 1, None),
        (1, 2, None),
    ]


def test_stopping_keeps_what_came() -> None:
    async def run() -> Load:
        generator = Generator(Server(), "ids", {})
        asyncio.get_running_loop().call_later(1.0, generator.stop)
        return await generator.open_loop([0.0, 0.5, 5.0], single(3))

    load = run_virtual(run())
    assert load.interrupted and load.unfinished == 1
    assert [request.end for request in load.requests] == [0.75]
    assert load.duration == 1.0


def test_a_fault_of_ours_is_not_swallowed() -> None:
    async def broken(ask: Ask) -> Any:
        raise ZeroDivisionError

    async def run() -> Load:
        return await Generator(broken, "ids", {}).open_loop([0.0], single(1))

    with pytest.raises(ZeroDivisionError):
        run_virtual(run())


def test_each_end_is_told() -> None:
    told: list[int] = []

    async def run() -> Load:
        generator = Generator(Server(), "ids", {"temperature": 0.5}, lambda request: told.append(request.id))
        return await generator.open_loop([0.0, 0.25], single(2))

    assert len(run_virtual(run()).requests) == 2
    assert told == [0, 1]
