"""A server whose device has little memory: it answers, refuses what never fits, and lives on."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_sglang.backend.batch import Batch
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SequenceResult, SequenceStep
from tests.api.serving import serving

pytestmark = pytest.mark.usefixtures("past_set_aside")

MOST_TOKENS, LONGEST = 12, 200


def make_small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that has memory for few tokens at a time, and for no long sequence."""
    plain = ModelBackend._run

    def run(self: ModelBackend, steps: Sequence[SequenceStep], batch: Batch) -> list[SequenceResult]:
        if len(batch.token_ids) > MOST_TOKENS or max(batch.seq_lens) > LONGEST:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return plain(self, steps, batch)

    monkeypatch.setattr(ModelBackend, "_run", run)


def test_a_server_out_of_memory_answers_what_fits_and_lives_on(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[dict[str, Any]] = [
        {"prompt": f"question {index} " * 3, "max_new_tokens": 20, "ignore_eos": True} for index in range(8)
    ]
    with serving(tiny_model) as client:
        expected = [client.ask(**body)["text"] for body in asked]
    make_small(monkeypatch)
    too_long = {"prompt": "x" * (LONGEST + 50), "max_new_tokens": 4}
    with serving(tiny_model) as client:
        with ThreadPoolExecutor(9) as pool:
            refused = pool.submit(client.post, "/generate", json=too_long)
            answers = list(pool.map(lambda body: client.ask(**body)["text"], asked))
        assert answers == expected
        error = refused.result().json()["error"]
        assert refused.result().status_code == 503 and error["code"] == "unavailable"
        assert "no room for a step of this request" in error["message"]
        again = client.post(
            "/v1/completions", json={"model": "tiny", "max_tokens": 4, "prompt": too_long["prompt"]}
        )
        assert again.status_code == 503 and "no room for a step" in again.json()["error"]["message"]
        lines = client.post("/generate", json={**too_long, "stream": True})
        assert lines.status_code == 503
        assert [client.ask(**body)["text"] for body in asked] == expected
        engine = client.get("/metrics", params={"format": "json"}).json()["engines"][0]
        assert engine["out_of_memory"] > 0 and "step_tokens_limit" in engine
        assert engine["state"] == "ready" and engine["restarts"] == 0
        text = client.get("/metrics").text
        assert f'mini_sglang_engine_out_of_memory_total{{engine="0"}} {engine["out_of_memory"]}' in text
        assert "mini_sglang_engine_step_tokens_limit" in text
