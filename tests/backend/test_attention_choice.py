"""``ATTN_IMPL``: each name runs its own code, all give the same answers, and what cannot run is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_sglang.backend.attention import paged
from mini_sglang.backend.loader import load_backend
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import greedy, load, page_ranges, step, step_logits
from tests.backend.tiny_models import save_tiny_model, tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family
from tests.backend.transformers_models.request_families import CASES

PROMPTS = [[(7 * i * i + 3 * i + s) % 190 + 5 for i in range(length)] for s, length in enumerate((1, 20, 37))]
FAMILIES = {family.model_type: family for family in PAGED}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A window shorter than the prompts, so that masks of both kinds are made.
    return save_tiny_model(tmp_path_factory.mktemp("model"), "mistral", sliding_window=12)


class Calls:
    """How often each way of torch was taken."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.fused = self.explicit = 0
        fused, explicit = paged.scaled_dot_product_attention, paged._weigh

        def count_fused(*args: object, **given: object) -> torch.Tensor:
            self.fused += 1
            return fused(*args, **given)  # type: ignore[arg-type]

        def count_explicit(*args: object) -> torch.Tensor:
            self.explicit += 1
            return explicit(*args)  # type: ignore[arg-type]

        monkeypatch.setattr(paged, "scaled_dot_product_attention", count_fused)
        monkeypatch.setattr(paged, "_weigh", count_explicit)


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("name", ["paged", "sdpa", "eager"])
def test_each_runs_its_own_code_and_answers_alike(
    folder: Path, kernels: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = greedy(load(folder, kernels="reference"), PROMPTS, 8)
    backend = load(folder, kernels=kernels, attn_impl=name)
    calls = Calls(monkeypatch)
    assert greedy(backend, PROMPTS, 8) == expected
    compiled = backend.describe()["attention"] == "paged, compiled"
    assert compiled == (name == "paged" and backend.program is not None)
    assert (calls.fused > 0) == (name != "eager" and not compiled)
    assert (calls.explicit > 0) == (name == "eager")


def test_eager_has_the_logits_of_transformers(folder: Path) -> None:
    model = tiny_model("mistral", sliding_window=12)
    backend = load(folder, attn_impl="eager")
    tables = page_ranges(backend, [len(prompt) for prompt in PROMPTS])
    steps = [step(prompt, 0, table) for prompt, table in zip(PROMPTS, tables, strict=True)]
    for logits, prompt in zip(step_logits(backend, steps), PROMPTS, strict=True):
        with torch.inference_mode():
            own = model(torch.tensor([prompt])).logits[0]
        torch.testing.assert_close(logits, own, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["sdpa", "eager"])
def test_over_our_pages_beside_the_code_of_transformers(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_family(tiny_family(FAMILIES["phi3"]), tmp_path)
    expected = greedy(load(folder), PROMPTS, 8)
    backend = load(folder, attn_impl=name)
    calls = Calls(monkeypatch)
    assert greedy(backend, PROMPTS, 8) == expected
    assert (calls.fused > 0, calls.explicit > 0) == (name == "sdpa", name == "eager")


def test_the_name_goes_to_transformers_where_it_keeps_the_cache(tmp_path: Path) -> None:
    family = next(case.family for case in CASES if case.family.model_type == "qwen3_next")
    folder = save_family(tiny_family(family), tmp_path)
    for name, used in (("auto", "sdpa"), ("sdpa", "sdpa"), ("eager", "eager")):
        settings = Settings.resolve({"dtype": "fp32", "device": "cpu", "attn_impl": name}, env={})
        backend = load_backend(folder, settings)
        assert backend.describe()["attention"] == f"transformers {used}"
        assert backend._runner.model.config._attn_implementation == used  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("settings", "field", "reason"),
    [
        ({"attn_impl": "flash_attention_2"}, "ATTN_IMPL", "flash_attn runs on CUDA alone"),
        ({"attn_impl": "flashinfer"}, "ATTN_IMPL", "flashinfer runs on CUDA alone"),
        ({"attn_impl": "sdpa", "kv_dtype": "bf16"}, "KV_DTYPE", "auto"),
    ],
)
def test_what_our_pages_cannot_have_is_refused(
    folder: Path, settings: dict[str, object], field: str, reason: str
) -> None:
    with pytest.raises(InvalidValueError, match=reason) as caught:
        load(folder, **settings)
    assert caught.value.field == field


def test_the_fused_one_is_refused_for_a_soft_cap(tmp_path: Path) -> None:
    folder = save_family(tiny_family(FAMILIES["gemma2"]), tmp_path)
    with pytest.raises(InvalidValueError, match="no soft caps"):
        load(folder, attn_impl="sdpa")
    assert load(folder, attn_impl="eager").describe()["attention"] == "paged, eager"
