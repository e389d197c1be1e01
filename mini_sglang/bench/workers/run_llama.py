"""llama-cpp-python, its low-level calls: a batch of ids, the logits, the greatest of them.

Options: model (.gguf), threads, flash_attention (true or false; by default llama.cpp's own choice),
prefix_cache, requests (most at a time), tokens (longest prompt and answer).
"""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
from worker_protocol import Answer, Ids, Stream, serve

BATCH = 2048
AUTO = -1
Row = tuple[int, int, int, bool]
"""A token: its id, position, sequence, and whether its logits are wanted."""


class Llama:
    def __init__(self, options: dict[str, Any]) -> None:
        llama_cpp.llama_backend_init()
        self.prefix_cache = options["prefix_cache"]
        model = llama_cpp.llama_model_load_from_file(
            options["model"].encode(), llama_cpp.llama_model_default_params()
        )
        # Sequence 0 keeps the prefix that was served last.
        sequences = options["requests"] + self.prefix_cache
        settings = llama_cpp.llama_context_default_params()
        settings.n_seq_max = sequences
        settings.n_ctx = sequences * -(-options["tokens"] // 256) * 256
        settings.n_batch = BATCH
        settings.n_threads = settings.n_threads_batch = options["threads"]
        settings.flash_attn_type = int(options.get("flash_attention", AUTO))
        # One buffer for all sequences lets them share cells; where they share none, separate ones are faster.
        settings.kv_unified = self.prefix_cache
        self.context = llama_cpp.llama_init_from_model(model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self.batch = llama_cpp.llama_batch_init(BATCH, 0, 1)
        self.kept: list[int] = []
        system = llama_cpp.llama_print_system_info().decode()
        self.about = {"versions": {"llama-cpp-python": llama_cpp.__version__}, "system": system, "notes": []}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        if cold or not self.prefix_cache:
            llama_cpp.llama_memory_clear(self.memory, False)
            self.kept = []
        stream = Stream(len(ids))
        rows: list[Row] = []
        for index, prompt in enumerate(ids):
            sequence = index + self.prefix_cache
            shared = self._share(prompt, sequence)
            last = len(prompt) - 1
            rows += [(prompt[i], i, sequence, i == last) for i in range(shared, len(prompt))]
        chosen = 0
        for at in range(0, len(rows), BATCH):
            for token in self._step(rows[at : at + BATCH]):
                stream.add(chosen, [token])
                chosen += 1
        for step in range(new - 1):
            tokens = self._step(
                [
                    (answer[-1], len(prompt) + step, index + self.prefix_cache, True)
                    for index, (prompt, answer) in enumerate(zip(ids, stream.ids, strict=True))
                ]
            )
            for index, token in enumerate(tokens):
                stream.add(index, [token])
        answer = stream.answer()
        if self.prefix_cache:
            self._keep(ids)
        return answer

    def _share(self, prompt: list[int], sequence: int) -> int:
        """Give ``sequence`` what it has in common with the prefix kept; returns the tokens."""
        common = 0
        while common < min(len(prompt) - 1, len(self.kept)) and prompt[common] == self.kept[common]:
            common += 1
        if common:
            llama_cpp.llama_memory_seq_cp(self.memory, 0, sequence, 0, common)
        return common

    def _keep(self, ids: Ids) -> None:
        if len(ids) == 1:
            llama_cpp.llama_memory_seq_rm(self.memory, 0, -1, -1)
            llama_cpp.llama_memory_seq_cp(self.memory, 1, 0, 0, len(ids[0]))
            self.kept = ids[0]
        for index in range(len(ids)):
            llama_cpp.llama_memory_seq_rm(self.memory, index + 1, -1, -1)

    def _step(self, rows: list[Row]) -> list[int]:
        """Run the rows; the greatest logit's id for each that wants it."""
        batch = self.batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, wanted) in enumerate(rows):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = sequence
            batch.logits[i] = wanted
        if status := llama_cpp.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode gave {status}")
        return [self._greatest(i) for i, row in enumerate(rows) if row[3]]

    def _greatest(self, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, (self.vocab_size,)).argmax())


if __name__ == "__main__":
    serve(Llama)
