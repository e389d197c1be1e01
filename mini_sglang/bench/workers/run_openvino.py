"""OpenVINO GenAI's continuous batching.

Options: model (.gguf), threads, prefix_cache, properties (of the device).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import openvino
import openvino_genai as genai
from worker_protocol import Answer, Ids, Stream, serve


class OpenVino:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.properties = {"INFERENCE_NUM_THREADS": options["threads"], **options.get("properties", {})}
        self.pipeline = self._load()
        self.asked = 0
        versions = {"openvino-genai": genai.__version__}
        self.about = {"versions": versions, "properties": self.properties, "notes": []}

    def _load(self) -> Any:
        scheduler = genai.SchedulerConfig()
        scheduler.enable_prefix_caching = self.options["prefix_cache"]
        scheduler.cache_size = 2
        scheduler.max_num_batched_tokens = 4096
        return genai.ContinuousBatchingPipeline(self.options["model"], scheduler, "CPU", self.properties)

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        if cold and self.options["prefix_cache"] and self.asked:
            # There is no call that empties its cache.
            self.pipeline = None
            self.pipeline = self._load()
        config = genai.GenerationConfig()
        config.max_new_tokens = new
        config.ignore_eos = True
        config.do_sample = False
        stream = Stream(len(ids))
        handles = []
        for prompt in ids:
            tokens = openvino.Tensor(np.array([prompt], dtype=np.int64))
            handles.append(self.pipeline.add_request(self.asked, tokens, config))
            self.asked += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for index, handle in enumerate(handles):
                while handle.can_read():
                    for output in handle.read().values():
                        stream.add(index, list(output.generated_ids))
        return stream.answer()


if __name__ == "__main__":
    serve(OpenVino)
