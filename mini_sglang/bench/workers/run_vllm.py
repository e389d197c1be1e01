"""vLLM's CPU build, in one process. Options: model (a folder), threads, prefix_cache, tokens."""

from __future__ import annotations

import os
import time
from typing import Any

from worker_protocol import Answer, Ids, serve


class VLLM:
    def __init__(self, options: dict[str, Any]) -> None:
        cores = sorted(os.sched_getaffinity(0))[: options["threads"]]
        os.environ.update(
            VLLM_CPU_KVCACHE_SPACE="2",
            VLLM_CPU_OMP_THREADS_BIND=",".join(map(str, cores)),
            VLLM_ENABLE_V1_MULTIPROCESSING="0",
            VLLM_LOGGING_LEVEL="ERROR",
            HF_HUB_OFFLINE="1",
        )
        import torch
        import vllm

        self.vllm = vllm
        self.llm = vllm.LLM(
            model=options["model"],
            dtype="bfloat16",
            max_model_len=options["tokens"],
            max_num_seqs=32,
            enable_prefix_caching=options["prefix_cache"],
        )
        self.about = {"versions": {"vllm": vllm.__version__, "torch": torch.__version__}}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        params = self.vllm.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True, detokenize=False)
        if cold:
            self.llm.reset_prefix_cache()
        start = time.perf_counter()
        prompts = [{"prompt_token_ids": prompt} for prompt in ids]
        outputs = self.llm.generate(prompts, params, use_tqdm=False)
        return Answer([list(one.outputs[0].token_ids) for one in outputs], time.perf_counter() - start)


if __name__ == "__main__":
    serve(VLLM)
