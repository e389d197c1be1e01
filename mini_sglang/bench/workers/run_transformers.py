"""Hugging Face ``generate``, streamed.

Options: model (a folder or a .gguf file), threads, dtype, text (hand each id to a ``TextIteratorStreamer``,
as one streams with it, where there is one prompt).
"""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import torch
import transformers
from transformers.generation.streamers import BaseStreamer
from worker_protocol import Answer, Ids, Stream, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Clock(BaseStreamer):
    """Puts the ids of each step into a ``Stream``; ``generate`` puts the prompts first.

    Args:
        stream: where they go.
        after: another streamer that is given the same.
    """

    def __init__(self, stream: Stream, after: BaseStreamer | None) -> None:
        self.stream, self.after = stream, after
        self.prompts_came = False

    def put(self, value: torch.Tensor) -> None:
        if self.prompts_came:
            for index, token in enumerate(value.tolist()):
                self.stream.add(index, [token])
        self.prompts_came = True
        if self.after is not None:
            self.after.put(value)

    def end(self) -> None:
        if self.after is not None:
            self.after.end()


class HuggingFace:
    def __init__(self, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        path = Path(options["model"])
        folder, extra = (path.parent, {"gguf_file": path.name}) if path.is_file() else (path, {})
        load = transformers.AutoModelForCausalLM.from_pretrained
        self.model = load(folder, dtype=DTYPES[options.get("dtype", "bf16")], **extra).eval()
        # None in generation_config, unlike None as an argument of generate, means that no id ends an answer.
        self.model.generation_config.eos_token_id = None
        self.tokenizer = None
        if options.get("text"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, **extra)
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.about = {"versions": versions, "notes": []}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        stream = Stream(len(ids))
        if self.tokenizer is None or len(ids) > 1:
            self._generate(ids, new, Clock(stream, None))
            return stream.answer()
        text = transformers.TextIteratorStreamer(self.tokenizer, skip_prompt=True)
        failed: list[Exception] = []

        def work() -> None:
            try:
                self._generate(ids, new, Clock(stream, text))
            except Exception as error:
                failed.append(error)
                # Else its reader would wait for ever.
                text.end()

        thread = Thread(target=work)
        thread.start()
        for _ in text:
            pass
        thread.join()
        if failed:
            raise failed[0]
        return stream.answer()

    def choose(self, prompt: list[int], ids: list[int]) -> list[int]:
        """The model's own greedy choice at each place of an answer, given the prompt and the ids before."""
        given = torch.tensor([prompt + ids[:-1]])
        with torch.inference_mode():
            # Of every place of a long prompt they would take more memory than the weights.
            logits = self.model(given, logits_to_keep=len(ids), use_cache=False).logits[0, -len(ids) :]
        chosen: list[int] = logits.argmax(-1).tolist()
        return chosen

    def _generate(self, ids: Ids, new: int, clock: Clock) -> None:
        # Prompts of one length: padding would change what is computed.
        prompts = torch.tensor(ids)
        with torch.inference_mode():
            self.model.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                max_new_tokens=new,
                do_sample=False,
                pad_token_id=0,
                streamer=clock,
            )


if __name__ == "__main__":
    serve(HuggingFace)
