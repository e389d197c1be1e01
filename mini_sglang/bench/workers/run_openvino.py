"""OpenVINO GenAI's continuous batching.

Options: model (.gguf), threads, prefix_cache, properties (of the device).
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from worker_protocol import Answer, Ids, serve


class OpenVino:
    def __init__(self, options: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = options["prefix_cache"]
        scheduler.cache_size = 2
        scheduler.max_num_batched_tokens = 4096
        properties = {"INFERENCE_NUM_THREADS": options["threads"], **options["properties"]}
        self.pipeline = genai.ContinuousBatchingPipeline(options["model"], scheduler, "CPU", properties)
        self.about = {"versions": {"openvino-genai": genai.__version__}, "properties": properties}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        config = genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        start = time.perf_counter()
        prompts = [openvino.Tensor(np.array([prompt], dtype=np.int64)) for prompt in ids]
        results = self.pipeline.generate(prompts, [config] * len(ids))
        return Answer([list(one.m_generation_ids[0]) for one in results], time.perf_counter() - start)


if __name__ == "__main__":
    serve(OpenVino)
