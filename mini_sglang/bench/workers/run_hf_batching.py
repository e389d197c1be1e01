"""transformers' continuous batching.

Options: model (a folder), threads, dtype, prefix_cache, requests (most at a time), tokens (longest prompt and
answer).
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from worker_protocol import Answer, Ids, Stream, serve

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PAGE_TOKENS = 256
LEAST_BLOCKS = 80
WAIT = 0.5


class HFBatching:
    def __init__(self, options: dict[str, Any]) -> None:
        transformers.utils.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(options["threads"])
        load = transformers.AutoModelForCausalLM.from_pretrained
        dtype = DTYPES[options.get("dtype", "bf16")]
        self.model = load(options["model"], dtype=dtype, attn_implementation="sdpa").eval()
        # No id ends an answer.
        self.generation = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
        pages = -(-options.get("tokens", 0) // PAGE_TOKENS) + 1
        # Its own choice of blocks and of the batch takes many gigabytes on a CPU.
        self.batching = transformers.ContinuousBatchingConfig(
            num_blocks=max(LEAST_BLOCKS, pages * options.get("requests", 1)),
            max_batch_tokens=2048,
            page_size=PAGE_TOKENS,
            allow_block_sharing=options.get("prefix_cache", True),
        )
        self.manager = self._start()
        versions = {"transformers": transformers.__version__, "torch": torch.__version__}
        self.about = {"versions": versions, "notes": []}

    def _start(self) -> Any:
        manager = self.model.init_continuous_batching(
            generation_config=self.generation, continuous_batching_config=self.batching
        )
        manager.start()
        return manager

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        if cold and self.batching.allow_block_sharing:
            # What it keeps of prompts goes with the manager.
            self.manager.stop(block=True)
            self.manager = self._start()
            self._answer([[0]], 1)
        return self._answer(ids, new)

    def close(self) -> None:
        self.manager.stop(block=True)

    def _answer(self, ids: Ids, new: int) -> Answer:
        stream = Stream(len(ids))
        names = self.manager.add_requests(ids, max_new_tokens=new, streaming=True)
        at = {name: index for index, name in enumerate(names)}
        while at:
            result = self.manager.get_result(timeout=WAIT)
            if result is None:
                if not self.manager.is_running():
                    raise RuntimeError("its thread ended")
                continue
            if result.error:
                raise RuntimeError(result.error)
            index = at[result.request_id]
            # Each result has all the ids so far.
            stream.add(index, result.generated_tokens[len(stream.ids[index]) :])
            if result.is_finished():
                del at[result.request_id]
        return stream.answer()


if __name__ == "__main__":
    serve(HFBatching)
