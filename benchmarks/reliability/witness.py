"""What the rows of faults share: streams of every API, their undisturbed answers, what is seen meanwhile."""

from __future__ import annotations

import asyncio
import json
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.reliability.client import BrokenOffError, Exchange
from benchmarks.reliability.faulty import VARIABLE
from benchmarks.reliability.ledger import Ask, Entry, keep
from benchmarks.reliability.report import Row
from benchmarks.reliability.server import Server, settle, tiny_folder


@contextmanager
def server_of(**settings: Any) -> Iterator[tuple[Server, Path]]:
    """A server over a tiny model that is being started, ended afterwards, and a folder of its own.

    In the folder are ``tmp``, where it has its temporary files, and ``fault``, where ``faulty`` looks.

    Args:
        settings: of ``Server``.
    """
    with tempfile.TemporaryDirectory(prefix="reliability-") as name, tiny_folder() as model:
        folder = Path(name)
        (folder / "tmp").mkdir()
        settings |= {"tmpdir": folder / "tmp", VARIABLE: folder / "fault"}
        server = Server(model, folder / "server.log", **settings)
        try:
            yield server, folder
        finally:
            server.close()


@dataclass(slots=True)
class Told:
    """A streamed answer of ``/v1/responses``: its events' types in order, its text, and how it ended."""

    status: int = 0
    kinds: list[str] = field(default_factory=list)
    text: str = ""
    errors: list[str] = field(default_factory=list)
    broken: str | None = None
    ended_at: float = 0.0


async def responses(port: int, prompt: str, tokens: int) -> Told:
    """Ask ``/v1/responses`` for a stream; never raises for what the server does."""
    told = Told()
    body = {
        "input": prompt,
        "max_output_tokens": tokens,
        "temperature": 0.0,
        "ignore_eos": True,
        "stream": True,
    }
    try:
        async with Exchange(port, "/v1/responses", body) as one:
            told.status = await one.head()
            data = await one.body()
        if told.status != 200:
            told.errors.append(json.loads(data)["error"]["message"])
        for frame in data.decode().split("\n\n")[:-1] if told.status == 200 else ():
            head, _, shown = frame.partition("\n")
            event = json.loads(shown.removeprefix("data: "))
            assert head == f"event: {event['type']}", head
            told.kinds.append(event["type"])
            told.text += event["delta"] if event["type"] == "response.output_text.delta" else ""
            if event["type"] == "response.failed":
                told.errors.append(event["response"]["error"]["message"])
    except (BrokenOffError, OSError, TimeoutError) as error:
        told.broken = f"{type(error).__name__}: {error}"
    except (AssertionError, ValueError, KeyError) as error:
        told.broken = f"it could not be read: {error!r}"
    told.ended_at = time.perf_counter()
    return told


@dataclass(slots=True)
class Streams:
    """What became of one set of streams."""

    entries: list[Entry]
    told: list[Told]

    @property
    def failed(self) -> int:
        return len(self._lost()[0]) + len(self._lost()[1])

    def ended_by(self) -> float:
        """When the last of those that failed ended, by ``time.perf_counter``."""
        entries, told = self._lost()
        return max((one.ended_at for one in (*entries, *told)), default=0.0)

    def messages(self) -> set[str]:
        entries, told = self._lost()
        return {message for one in (*entries, *told) for message in one.errors}

    def ill_ended(self) -> list[str]:
        """Of those that failed, what is not one last error event in the shape of its API."""
        entries, told = self._lost()
        wrong: list[str] = []
        for one in entries:
            finishes = sum(len(answer.finishes) for answer in one.answers.values())
            if one.broken is not None:
                wrong.append(f"{one.ask.api}: {one.broken}")
            elif len(one.errors) != 1 or one.dones or one.after or finishes:
                wrong.append(
                    f"{one.ask.api}: {one.errors}, {one.dones} [DONE], {finishes} ends, {one.after} after"
                )
            elif one.status != 200 and not _shaped(one):
                wrong.append(f"{one.ask.api}: status {one.status} with {one.errors[0][:80]!r}")
        for response in told:
            if response.broken is not None:
                wrong.append(f"responses: {response.broken}")
            elif response.status == 200 and (
                response.kinds[-1:] != ["response.failed"] or len(response.errors) != 1
            ):
                wrong.append(f"responses: {response.kinds[-2:]}")
        return wrong

    def unlike(self, quiet: Streams) -> list[str]:
        """Of those that did not fail, what is not as in the undisturbed run."""
        wrong: list[str] = []
        for one, calm in zip(self.entries, quiet.entries, strict=True):
            if one.errors or one.broken:
                continue
            wrong += [f"{one.ask.api}: {fault}" for fault in one.faults()]
            same = all(
                one.answer(i).ids == a.ids and one.answer(i).text == a.text for i, a in calm.answers.items()
            )
            if not same:
                wrong.append(f"{one.ask.api}: another answer")
        for told, calm_told in zip(self.told, quiet.told, strict=True):
            if not (told.errors or told.broken) and (told.text, told.kinds[-1]) != (
                calm_told.text,
                calm_told.kinds[-1],
            ):
                wrong.append("responses: another answer")
        return wrong

    def _lost(self) -> tuple[list[Entry], list[Told]]:
        return [one for one in self.entries if one.errors or one.broken], [
            one for one in self.told if one.errors or one.broken
        ]


def asks_of(count: int, tokens: int) -> list[Ask]:
    """Sampled answers of distinct prompts, of each API and form in turn."""
    forms = (("generate", False), ("generate", True), ("completions", False), ("chat", False))
    return [
        Ask(api, (f"stream {number} of many",), tokens, temperature=0.9, seed=number, sse=sse)
        for number in range(count)
        for api, sse in [forms[number % len(forms)]]
    ]


async def stream_all(port: int, asks: Sequence[Ask], told: int, tokens: int) -> Streams:
    """All of them at once, and ``told`` streams of ``/v1/responses`` beside."""
    many = asyncio.gather(*(keep(port, ask) for ask in asks))
    rest = asyncio.gather(*(responses(port, f"response {n}", tokens) for n in range(told)))
    return Streams(await many, await rest)


@contextmanager
def streaming(port: int, asks: Sequence[Ask], told: int, tokens: int) -> Iterator[list[Streams]]:
    """Have the streams run in a thread while the block does; the list has them when the block has ended."""
    found: list[Streams] = []
    thread = threading.Thread(target=lambda: found.append(asyncio.run(stream_all(port, asks, told, tokens))))
    thread.start()
    try:
        yield found
    finally:
        thread.join()


class Watch:
    """Looks at ``/health`` and ``/ready`` all the time while its block runs.

    Attributes:
        seen: (ready's status, health's status, state of the pool, states of the engines), each change once.
    """

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}"
        self._stop = threading.Event()
        self._looked = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self.seen: list[tuple[int, int, str, tuple[str, ...]]] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        # What the block does comes after a first look.
        self._looked.wait(5.0)
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def states(self, engine: int) -> list[str]:
        """The states of an engine in order, each change once."""
        states = [engines[engine] for *_, engines in self.seen if engines]
        return [state for n, state in enumerate(states) if n == 0 or state != states[n - 1]]

    def lies(self) -> list[str]:
        """What cannot be true, going by the states of the engines just before and after."""
        wrong: list[str] = []
        for ready, health, state, engines in self.seen:
            if not engines:
                continue
            usable = engines.count("ready")
            if (ready == 200) != (usable > 0):
                wrong.append(f"/ready {ready} with engines {engines}")
            if health != (200 if {"ready", "starting"} & set(engines) else 503):
                wrong.append(f"/health {health} with engines {engines}")
            named = "ready" if usable == len(engines) else "degraded" if usable else "down"
            if state != named:
                wrong.append(f"state {state} with engines {engines}")
        return wrong

    def _look(self) -> None:
        while not self._stop.wait(0.05):
            # Between two equal looks at the engines, what /ready said belongs to that state.
            before, ready, after = self._health(), self._get("/ready")[0], self._health()
            if before != after:
                continue
            look = (ready, *before)
            if not self.seen or self.seen[-1] != look:
                self.seen.append(look)
            self._looked.set()

    def _health(self) -> tuple[int, str, tuple[str, ...]]:
        status, body = self._get("/health")
        if not body:
            return status, "", ()
        told = json.loads(body)
        return status, told["state"], tuple(one["state"] for one in told["engines"])

    def _get(self, path: str) -> tuple[int, bytes]:
        try:
            with urllib.request.urlopen(self._url + path, timeout=10) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()
        except OSError:
            return 0, b""


def wait_all_ready(server: Server) -> None:
    """Wait until every engine is ready."""
    settle(lambda: all(one["state"] == "ready" for one in server.metrics()["engines"]), "all engines")


def check_aftermath(row: Row, server: Server, ask: Ask, quiet: Entry) -> None:
    """Everything is as it was: a canary request gives its answer, and nothing has leaked."""
    server.wait_idle()
    canary = asyncio.run(keep(server.port, ask))
    same = not canary.faults() and canary.answer(0).ids == quiet.answer(0).ids
    row.check("a canary completes afterwards, with its ids", canary.faults() or "the same", same)
    server.wait_idle()
    leaks = server.leaks()
    row.check("pages, places and slots are back", leaks or "none missing", not leaks)


def _shaped(entry: Entry) -> bool:
    """Whether the body of a refusal is in the shape of the API that was asked."""
    try:
        error = json.loads(entry.errors[0])["error"]
    except (ValueError, KeyError):
        return False
    return {"message", "code"} <= set(error) and ("type" in error) == (entry.ask.api != "generate")
