"""A whole engine on recorded steps: prefixes, chunks, retractions and sampling as without them."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from mini_sglang.backend.device_sampling import DeviceSampler
from mini_sglang.backend.graphs.program import GraphProgram
from mini_sglang.backend.overlap import DeviceSubmitter
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams
from tests.backend.graphs.comparing import SMALL
from tests.backend.graphs.recorder import FaithfulRecorder
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.test_per_request import make_engine, run


@pytest.mark.usefixtures("even_products")
def test_the_answers_of_an_engine_without(tmp_path: Path, recorder: FaithfulRecorder) -> None:
    folder = save_tiny_model(tmp_path, "qwen3", **{**SMALL, "num_hidden_layers": 1})
    draw = random.Random(1)
    shared = [draw.randrange(3, 190) for _ in range(20)]
    wanted = [
        (
            [
                *shared[: draw.choice((0, 20))],
                *(draw.randrange(3, 190) for _ in range(draw.randrange(1, 20))),
            ],
            SamplingParams(
                max_new_tokens=draw.randrange(12, 30),
                temperature=draw.choice([0.0, 0.9]),
                top_p=draw.choice([1.0, 0.9]),
                seed=index,
                ignore_eos=True,
            ),
        )
        for index in range(6)
    ]
    settings = {
        "attn_impl": "triton",
        "kernels": "reference",
        "kv_token_budget": 96,
        "page_size_tokens": 4,
        "prefill_chunk_size": 16,
        "max_batch_size": 4,
    }
    plain, _ = make_engine(folder, **settings, enable_decode_cuda_graph=False, enable_cuda_graph=False)
    expected = run(plain, wanted)
    engine, backend = make_engine(folder, **settings)
    assert isinstance(backend.program, GraphProgram)
    replayed = recorder.replayed
    assert run(engine, wanted) == expected
    assert recorder.replayed > replayed + 10
    assert engine.stats()["retractions"] > 0
    # The same with a step always under way, whose tokens the host does not know.
    backend.sampler = DeviceSampler(backend.vocab_size)
    backend.submitter = DeviceSubmitter(backend)
    resolved = Settings.resolve({**settings, "dtype": "fp32", "device": "cpu"}, {})
    ahead, replayed = EngineCore(backend, resolved, frozenset({2})), recorder.replayed
    assert run(ahead, wanted) == expected
    assert recorder.replayed > replayed + 10
    assert ahead.stats()["overlapped_steps"] > 10
