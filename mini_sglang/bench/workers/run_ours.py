"""mini-sglang. Options: model, threads, dtype, prefix_cache, settings (of ``Engine``, over those)."""

from __future__ import annotations

import asyncio
from importlib.metadata import version
from pathlib import Path
from typing import Any

from worker_protocol import Answer, Ids, Stream, serve

from mini_sglang import Engine, SamplingParams
from mini_sglang.config import VERSION


class Ours:
    def __init__(self, options: dict[str, Any]) -> None:
        settings = {"num_threads": options["threads"], "prefix_cache": options.get("prefix_cache", True)}
        if "dtype" in options and Path(options["model"]).is_dir():
            settings["dtype"] = options["dtype"]
        self.engine = Engine(options["model"], **{**settings, **options.get("settings", {})})
        versions = {"mini-sglang": VERSION, "torch": version("torch")}
        self.about = {"versions": versions, "notes": [], **self.engine.description}

    def encode(self, text: str) -> list[int]:
        return self.engine.encode(text)

    def run(self, ids: Ids, new: int, cold: bool, spread: bool = False) -> Answer:
        if cold:
            self.engine.clear_cache()
        params = SamplingParams(max_new_tokens=new, temperature=0, ignore_eos=True)
        if spread or len(ids) > 1:
            return asyncio.run(self._together(ids, params))
        stream = Stream(1)
        for delta in self.engine.stream(ids[0], params):
            stream.add(0, list(delta.token_ids))
        return stream.answer()

    async def _together(self, ids: Ids, params: SamplingParams) -> Answer:
        stream = Stream(len(ids))

        async def one(index: int, prompt: list[int]) -> None:
            async for delta in self.engine.astream(prompt, params):
                stream.add(index, list(delta.token_ids))

        await asyncio.gather(*(one(index, prompt) for index, prompt in enumerate(ids)))
        return stream.answer()


if __name__ == "__main__":
    serve(Ours)
