"""mini-sglang. Options: model, threads, settings (of ``Engine``)."""

from __future__ import annotations

import asyncio
import time
from importlib.metadata import version
from typing import Any

from worker_protocol import Answer, Ids, serve

from mini_sglang import Engine, SamplingParams
from mini_sglang.config import VERSION


class Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        self.engine = Engine(options["model"], num_threads=options["threads"], **options["settings"])
        versions = {"mini-sglang": VERSION, "torch": version("torch")}
        self.about = {"versions": versions, **self.engine.description}

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text)

    def run(self, ids: Ids, new: int, cold: bool, spread: bool = False) -> Answer:
        if cold:
            self.engine.clear_cache()
        params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
        if spread:
            return asyncio.run(self._spread(ids, params))
        start = time.perf_counter()
        if len(ids) > 1:
            outputs = self.engine.generate(ids, params)
            return Answer([list(one.token_ids) for one in outputs], time.perf_counter() - start)
        tokens: list[int] = []
        times: list[float] = []
        for delta in self.engine.stream(ids[0], params):
            tokens += delta.token_ids
            times += [time.perf_counter() - start] * len(delta.token_ids)
        return Answer([tokens], time.perf_counter() - start, times[0], times=[times])

    async def _spread(self, ids: Ids, params: SamplingParams) -> Answer:
        """As ``run``, with when each request had its first and its last id."""
        start = time.perf_counter()

        async def one(prompt: list[int]) -> tuple[list[int], float, float]:
            first = 0.0
            tokens: list[int] = []
            async for delta in self.engine.astream(prompt, params):
                first = first or time.perf_counter() - start
                tokens += delta.token_ids
            return tokens, first, time.perf_counter() - start

        answers = await asyncio.gather(*(one(prompt) for prompt in ids))
        tokens, firsts, ends = (list(column) for column in zip(*answers, strict=True))
        return Answer(tokens, max(ends), min(firsts), firsts, ends)


if __name__ == "__main__":
    serve(Ours)
