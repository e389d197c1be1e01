"""vLLM's CPU build, in one process.

Options: model (a folder), threads, dtype, prefix_cache, requests (most at a time), tokens (longest prompt and
answer).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from worker_protocol import Answer, Ids, Stream, serve

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


class VLLM:
    def __init__(self, options: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
            OMP_NUM_THREADS=str(options["threads"]),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="ERROR",
            HF_HUB_OFFLINE="1",
        )
        import torch
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            model=options["model"],
            dtype=DTYPES[options.get("dtype", "bf16")],
            max_model_len=options["tokens"],
            max_num_seqs=max(32, options.get("requests", 1)),
            enable_prefix_caching=options["prefix_cache"],
        )
        self.about = {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}, "notes": []}
        self.asked = 0

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        if cold:
            self.llm.reset_prefix_cache()
        params = self.vllm.SamplingParams(
            temperature=0,
            max_tokens=new,
            ignore_eos=True,
            detokenize=False,
            output_kind=self.vllm.sampling_params.RequestOutputKind.DELTA,
        )
        engine = self.llm.llm_engine
        first, self.asked = self.asked, self.asked + len(ids)
        stream = Stream(len(ids))
        for index, prompt in enumerate(ids):
            engine.add_request(str(first + index), {"prompt_token_ids": prompt}, params)
        while engine.has_unfinished_requests():
            for output in engine.step():
                stream.add(int(output.request_id) - first, list(output.outputs[0].token_ids))
        return stream.answer()


def with_openmp() -> None:
    """Begin again with Intel's OpenMP loaded first, as vLLM asks for, where its environment has it."""
    library = Path(sys.prefix, "lib", "libiomp5.so")
    loaded = os.environ.get("LD_PRELOAD", "")
    if library.exists() and library.name not in loaded:
        os.environ["LD_PRELOAD"] = ":".join(filter(None, (str(library), loaded)))
        os.execv(sys.executable, [sys.executable, *sys.argv])


if __name__ == "__main__":
    with_openmp()
    serve(VLLM)
