"""Hugging Face ``generate``. Options: model (a folder or a .gguf file), threads, dtype."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from worker_protocol import Answer, Ids, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Clock(BaseStreamer):
    """When the first new id came: ``generate`` puts the prompt first, then each id."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """The last id was put already."""


class HuggingFace:
    def __init__(self, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        path = Path(options["model"])
        folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=DTYPES[options["dtype"]], **extra).eval()
        # None in generation_config, unlike None as an argument of generate, means that no id ends an answer.
        self.model.generation_config.eos_token_id = None
        self.about = {"versions": {"transformers": transformers.__version__, "torch": torch.__version__}}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        clock = Clock() if len(ids) == 1 else None
        start = time.perf_counter()
        prompts = torch.tensor(ids)
        with torch.inference_mode():
            rows = self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )
        seconds = time.perf_counter() - start
        first = clock.times[1] - start if clock else None
        return Answer(rows[:, prompts.shape[1] :].tolist(), seconds, first)


if __name__ == "__main__":
    serve(HuggingFace)
