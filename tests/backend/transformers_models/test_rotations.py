"""Frequencies that change with the length: cached keys cannot follow, so they are fixed at load."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_sglang.errors import InvalidValueError
from tests.backend.harness import page_ranges, step, step_logits
from tests.backend.transformers_models.families import CONTEXT, Family, save, tiny_model
from tests.backend.transformers_models.test_families import answers, generated, load, prompts
from tests.backend.transformers_models.test_loading import engine_of

ORIGINAL = 48
# For heads of 8: four frequencies.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3],
    "long_factor": [2.0, 3.0, 5.0, 9.0],
    "original_max_position_embeddings": ORIGINAL,
    "factor": CONTEXT / ORIGINAL,
}
PHI = Family(
    "Phi-3",
    "phi3",
    config={
        "rope_parameters": LONGROPE,
        "original_max_position_embeddings": ORIGINAL,
        "sliding_window": None,
    },
)


def test_longrope_within_its_original_length_is_transformers(tmp_path: Path) -> None:
    model = tiny_model(PHI)
    backend = load(save(model, tmp_path))
    assert backend.context_length == ORIGINAL
    wanted = [prompt for prompt in prompts() if len(prompt) < 30]
    assert answers(engine_of(backend), wanted) == [generated(model, prompt) for prompt in wanted]


def test_longrope_beyond_it_is_the_long_factors_for_every_length(tmp_path: Path) -> None:
    model = tiny_model(PHI)
    backend = load(save(model, tmp_path), context_length=CONTEXT)
    assert backend.context_length == CONTEXT
    ids = [5 + 3 * i % 150 for i in range(ORIGINAL + 10)]
    with torch.no_grad():
        expected = model(torch.tensor([ids])).logits[0]
    long, short = page_ranges(backend, [len(ids), 6])
    got, _ = step_logits(backend, [step(ids, 0, long), step(ids[:6], 0, short)])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)
    # The first rows of the long one: a short prompt gets the same, alone or beside it.
    (alone,) = step_logits(backend, [step(ids[:6], 0, short)])
    torch.testing.assert_close(alone, expected[:6], rtol=1e-3, atol=1e-3)


def test_dynamic_frequencies_are_those_of_the_models_own_length(tmp_path: Path) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    model = tiny_model(Family("Granite", "granite", config={"rope_parameters": rope}))
    folder = save(model, tmp_path)
    backend = load(folder)
    assert backend.context_length == CONTEXT
    assert answers(engine_of(backend), prompts()) == [generated(model, prompt) for prompt in prompts()]
    with pytest.raises(
        InvalidValueError, match=f"CONTEXT_LENGTH is {CONTEXT + 1}; it must be at most {CONTEXT}"
    ):
        load(folder, context_length=CONTEXT + 1)
