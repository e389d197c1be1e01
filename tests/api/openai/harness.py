"""Servers on loopback for the tests: one over a tiny real model, one whose answers a test writes."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import uvicorn
from openai import OpenAI

from mini_sglang.api.server import create_app
from mini_sglang.api.service import Service
from mini_sglang.backend.grammar import GrammarCompiler
from mini_sglang.config import Settings
from mini_sglang.engine.handle import EngineHandle, EngineInfo, Sink, Work
from mini_sglang.engine.pool import EnginePool
from mini_sglang.text.tokenizer import Tokenizer, load_tokenizer
from mini_sglang.types import FinishReason, TokenEvent, TokenLogprob

CONTEXT = 4096
TEMPLATE = (
    "{% if tools %}<|im_start|>system\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    "Answer with <tool_call>…</tool_call>.<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking %}<think>\n{% endif %}{% endif %}"
)


class ScriptedEngine:
    """An ``EngineHandle`` that says what it was told to, a token an event, and keeps what it was asked."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stopped: set[str] = set()
        self.gate = threading.Event()
        self.answers: list[str] = []
        self.works: list[Work] = []
        self.error: str | None = None
        self.endless = False
        self.state = "ready"
        self.failure = None
        (self._end,) = tokenizer.eos_ids
        self.info = EngineInfo(
            description={"model": "scripted"},
            eos_ids=(self._end,),
            vocab_size=tokenizer.vocab_size,
            context_length=CONTEXT,
            max_sequence_tokens=CONTEXT,
            page_size=16,
            kv_tokens=1 << 16,
        )

    def say(self, *answers: str) -> None:
        """What the next requests get, in order; the last one for all after it. ``gate`` is opened."""
        self.answers, self.works, self.error, self.endless = list(answers), [], None, False
        self.gate.set()

    @property
    def prompt(self) -> str:
        """The text of the last prompt."""
        return self._tokenizer.decode(self.works[-1].prompt_ids, skip_special=False)

    def watch(self, callback: Callable[[], None]) -> None:
        """Its state never changes."""

    def submit(self, work: Work, sink: Sink) -> None:
        self.works.append(work)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        threading.Thread(target=self._run, args=(work, sink, answer), daemon=True).start()

    def _run(self, work: Work, sink: Sink, answer: str) -> None:
        ids = [*self._tokenizer.encode(answer, add_special=False), self._end]
        cached = 16 * (len(self.works) > 1)
        done: dict[str, Any] = {"prompt_tokens": len(work.prompt_ids), "cached_tokens": cached}
        self.gate.wait(timeout=10)
        while self.endless and work.request_id not in self._stopped:
            time.sleep(0.01)
            sink(TokenEvent(work.request_id, (self._tokenizer.encode("x", add_special=False)[0],)))
        for number, token_id in enumerate(ids):
            if work.request_id in self._stopped:
                sink(TokenEvent(work.request_id, finish=FinishReason.ABORT, **done))
                return
            if self.error is not None and number == 2:
                sink(TokenEvent(work.request_id, finish=FinishReason.ERROR, error=self.error))
                return
            finish = FinishReason.LENGTH if number + 1 == work.max_new_tokens else None
            matched = None
            if token_id == self._end:
                finish, matched = FinishReason.STOP, token_id
            logprobs: tuple[TokenLogprob, ...] = ()
            if work.params.logprobs:
                others = tuple((token_id + k, -0.5 - k) for k in range(work.params.top_logprobs))
                logprobs = (TokenLogprob(token_id, -0.5, others),)
            sink(TokenEvent(work.request_id, (token_id,), logprobs, finish, matched, **done))
            if finish is not None:
                return

    def abort(self, request_id: str, reason: FinishReason = FinishReason.ABORT) -> None:
        self._stopped.add(request_id)

    def stats(self) -> dict[str, int]:
        return {}

    def close(self) -> None:
        self.state = "closed"


class Server:
    """A server in a thread.

    Attributes:
        app: the ASGI app; ``service`` is in its state.
    """

    def __init__(
        self,
        settings: Settings,
        tokenizer: Tokenizer,
        make_handle: Callable[[int], EngineHandle],
        name: str,
        grammars: Callable[[EnginePool], GrammarCompiler] | None = None,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._make_handle = make_handle
        self._name = name
        self._grammars = grammars
        self._ready = threading.Event()
        self._failure: BaseException | None = None
        self.service: Service
        self.url = ""
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            asyncio.run(self._serve())
        except BaseException as error:
            self._failure = error
            self._ready.set()

    async def _serve(self) -> None:
        pool = EnginePool(self._make_handle, self._settings)
        await asyncio.to_thread(pool.wait_ready)
        grammars = None if self._grammars is None else self._grammars(pool)
        self.service = Service(self._settings, self._tokenizer, pool, self._name, grammars)
        app = create_app(self._settings, self.service)
        config = uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning", lifespan="off")
        self._server = uvicorn.Server(config)
        task = asyncio.create_task(self._server.serve())
        while not self._server.started and not task.done():
            await asyncio.sleep(0.01)
        port = self._server.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}/v1"
        self._ready.set()
        await task
        await self.service.close()

    def __enter__(self) -> Server:
        self._thread.start()
        self._ready.wait()
        if self._failure is not None:
            raise self._failure
        self.client = OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=30)
        return self

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self._server.should_exit = True
        self._thread.join(timeout=30)


def server_settings(folder: Path, **changes: Any) -> Settings:
    base = {"model": str(folder), "dtype": "fp32", "device": "cpu", "num_threads": 1, "page_size_tokens": 16}
    return Settings.resolve(base | {"kv_token_budget": 1 << 14, "engine_isolation": "thread"} | changes)


@contextmanager
def scripted_server(folder: Path, **changes: Any) -> Iterator[tuple[Server, ScriptedEngine]]:
    """A server over a ``ScriptedEngine`` with the tokenizer of ``folder``, called ``scripted``."""
    settings = server_settings(folder, **changes)
    tokenizer = load_tokenizer(folder, cache_dir=settings.cache_path)
    engine = ScriptedEngine(tokenizer)
    with Server(settings, tokenizer, lambda index: engine, "scripted") as server:
        yield server, engine


@contextmanager
def model_server(folder: Path, **changes: Any) -> Iterator[Server]:
    """A server over the tiny model in ``folder``, called ``tiny``."""
    from mini_sglang.api.starting import Model

    settings = server_settings(folder, **changes)
    model = Model(settings, lambda line: None)
    with Server(settings, model.tokenizer, model._make_handle, "tiny", model.grammar_checker) as server:
        yield server
