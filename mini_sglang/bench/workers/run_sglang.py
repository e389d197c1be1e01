"""sglang's Engine, which starts a scheduler in a process of its own.

Options: model (a folder), threads, dtype, prefix_cache, requests (most at a time), tokens (longest prompt and
answer).
"""

from __future__ import annotations

import os
from typing import Any

from worker_protocol import Answer, Ids, Stream, serve

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
LEAST_TOKENS = 20_000


class SGLang:
    def __init__(self, options: dict[str, Any]) -> None:
        os.environ.update(
            SGLANG_USE_CPU_ENGINE="1", OMP_NUM_THREADS=str(options["threads"]), HF_HUB_OFFLINE="1"
        )
        import sglang
        import torch

        tokens, requests = options.get("tokens", 0), options.get("requests", 1)
        self.engine = sglang.Engine(
            model_path=options["model"],
            device="cpu",
            dtype=DTYPES[options.get("dtype", "bf16")],
            attention_backend="torch_native",
            sampling_backend="pytorch",
            disable_overlap_schedule=True,
            disable_cuda_graph=True,
            disable_radix_cache=not options.get("prefix_cache", True),
            max_total_tokens=max(LEAST_TOKENS, 2 * requests * tokens),
            max_running_requests=max(32, requests),
            # Ids go in and come out: no process that makes text of them.
            skip_tokenizer_init=True,
            log_level="error",
        )
        self.about = {
            "versions": {"sglang": sglang.__version__, "torch": torch.__version__},
            "notes": stand_in_notes(),
        }

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        if cold:
            self.engine.flush_cache()
        params = {"temperature": 0, "max_new_tokens": new, "ignore_eos": True}
        stream = Stream(len(ids))
        # Each piece has all the ids so far.
        for piece in self.engine.generate(input_ids=ids, sampling_params=params, stream=True):
            prompt = piece.get("index", 0)
            stream.add(prompt, piece["output_ids"][len(stream.ids[prompt]) :])
        return stream.answer()


def stand_in_notes() -> list[str]:
    import sgl_kernel

    if getattr(sgl_kernel, "STAND_IN", False):
        return ["without sglang's own CPU kernels, which PyPI does not have: on torch's operators"]
    return []


if __name__ == "__main__":
    serve(SGLang)
