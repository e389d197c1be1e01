"""Events reach their reader in order and none is waited for in vain, however seldom it is woken."""

from __future__ import annotations

import asyncio
import gc
import queue
import random
import threading

import pytest

from mini_sglang.api.mailbox import Inbox, LoopCalls
from mini_sglang.types import FinishReason, TokenEvent, TokenLogprob


def events(count: int) -> list[TokenEvent]:
    """``count`` tokens, the last of them with the end."""
    made = [TokenEvent("r", (index,)) for index in range(count)]
    made[-1].finish = FinishReason.LENGTH
    return made


def test_a_reader_is_rung_for_the_next_event_only_where_it_found_none_and_for_the_last() -> None:
    rings: list[int] = []
    sent = events(6)
    inbox = Inbox(lambda: rings.append(len(rings)))
    inbox.put(sent[0])
    inbox.put(sent[1])
    assert not rings, "nobody waits"
    assert [inbox.take(patient=False), inbox.take(patient=False)] == sent[:2]
    assert inbox.take(patient=False) is None
    inbox.put(sent[2])
    inbox.put(sent[3])
    assert len(rings) == 1
    assert inbox.take(patient=False) == sent[2] and inbox.take(patient=True) is None
    inbox.put(sent[4])
    assert inbox.take(patient=True) is None and len(rings) == 1, "it waits for the end"
    inbox.put(sent[5])
    assert len(rings) == 2
    whole = inbox.take(patient=True)
    assert whole is not None and whole.token_ids == (3, 4, 5) and whole.finish is FinishReason.LENGTH
    assert inbox.take(patient=True) is None


@pytest.mark.parametrize("gathered", [False, True])
def test_a_whole_answer_has_all_that_its_events_say(gathered: bool) -> None:
    rings: list[None] = []
    inbox = Inbox(lambda: rings.append(None), whole=gathered)
    said = [TokenLogprob(index, -0.5, ()) for index in range(3)]
    inbox.put(TokenEvent("r", (7,), (said[0],), prompt_logprobs=(said[2],), prompt_tokens=5, cached_tokens=4))
    inbox.put(TokenEvent("r", (8, 9), (said[1],), prompt_tokens=5, cached_tokens=4))
    last = TokenEvent(
        "r", finish=FinishReason.ERROR, error="e", prompt_tokens=5, cached_tokens=4, error_kind="k"
    )
    assert inbox.take(patient=True) is None and not rings and inbox.first_token_at is not None
    inbox.put(last)
    assert len(rings) == 1
    assert inbox.take(patient=True) == TokenEvent(
        "r", (7, 8, 9), (said[0], said[1]), FinishReason.ERROR, None, "e", 5, 4, (said[2],), "k"
    )


@pytest.mark.parametrize("patience", [0.0, 0.5, 1.0])
def test_no_event_is_lost_between_two_threads(patience: float) -> None:
    draw = random.Random(3)
    for _ in range(200):
        bell: queue.SimpleQueue[None] = queue.SimpleQueue()
        inbox = Inbox(lambda bell=bell: bell.put(None))
        sent = events(draw.randint(1, 60))

        def put(inbox: Inbox = inbox, sent: list[TokenEvent] = sent) -> None:
            for event in sent:
                inbox.put(event)

        thread = threading.Thread(target=put)
        thread.start()
        got: list[TokenEvent] = []
        while not got or got[-1].finish is None:
            event = inbox.take(patient=draw.random() < patience)
            if event is None:
                bell.get(timeout=60)
            else:
                got.append(event)
        thread.join()
        assert [token for event in got for token in event.token_ids] == list(range(len(sent)))
        assert [event.finish is None for event in got] == [True] * (len(got) - 1) + [False]


def test_a_loop_is_woken_once_for_all_that_came() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()
        wakes: list[object] = []
        wake = loop.call_soon_threadsafe
        loop.call_soon_threadsafe = lambda call, *rest: (wakes.append(call), wake(call, *rest))[1]  # type: ignore[method-assign,assignment]
        calls, done = LoopCalls(loop), []
        for index in range(100):
            calls.put(lambda index=index: done.append(index))
        assert not done and len(wakes) == 1
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert done == list(range(100))
        calls.put(lambda: done.append(100))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert done[-1] == 100 and len(wakes) == 2

    asyncio.run(run())


def test_calls_of_many_threads_all_come() -> None:
    async def run() -> None:
        calls, done = LoopCalls(asyncio.get_running_loop()), []
        whole = asyncio.Event()

        def note(thread: int, index: int) -> None:
            done.append((thread, index))
            if len(done) == 4000:
                whole.set()

        def put(thread: int) -> None:
            for index in range(1000):
                calls.put(lambda index=index: note(thread, index))

        threads = [threading.Thread(target=put, args=(number,)) for number in range(4)]
        for thread in threads:
            thread.start()
        await asyncio.wait_for(whole.wait(), 60)
        for number in range(4):
            assert [index for thread, index in done if thread == number] == list(range(1000))

    asyncio.run(run())


def test_a_closed_loop_is_told_at_each_call() -> None:
    loop = asyncio.new_event_loop()
    calls = LoopCalls(loop)
    calls.put(lambda: None)  # never carried out
    loop.close()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="closed"):
            calls.put(lambda: None)


def watched() -> int:
    """Events that Python's garbage collector looks through."""
    # By type: an object of a library that imports when it is asked for something may be asked by isinstance.
    return sum(type(one) is TokenEvent for one in gc.get_objects())


def test_of_whole_answers_python_has_nothing_to_look_through() -> None:
    inbox, count = Inbox(lambda: None, whole=True), 500
    before = watched()
    for index in range(count):
        inbox.put(TokenEvent("r", (index,)))
    assert watched() == before
