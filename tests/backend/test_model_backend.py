"""Loading a model and running steps through the facade."""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from mini_sglang.backend import model_backend
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SequenceStep
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, ModelLoadError
from tests.backend.harness import greedy, load, page_ranges, step, step_logits
from tests.backend.tiny_models import VOCAB_SIZE, save_tiny_model, tiny_model

PROMPTS = [[5, 6, 7], list(range(20, 57)), [200, 3], list(range(100, 119))]


@pytest.fixture(scope="module")
def oracle() -> PreTrainedModel:
    return tiny_model("qwen3")


@pytest.fixture(scope="module")
def folder(oracle: PreTrainedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    oracle.save_pretrained(folder)
    return folder


@pytest.fixture
def backend(folder: Path) -> ModelBackend:
    return load(folder)


def _copy(folder: Path, to: Path, **config: Any) -> Path:
    """The model with some of its config changed; ``None`` removes a field."""
    to.mkdir(exist_ok=True)
    save_file(load_file(folder / "model.safetensors"), to / "model.safetensors")
    merged = {**json.loads((folder / "config.json").read_text()), **config}
    (to / "config.json").write_text(json.dumps({k: v for k, v in merged.items() if v is not None}))
    return to


def test_a_mixed_step_equals_separate_ones(backend: ModelBackend) -> None:
    tables = page_ranges(backend, [len(prompt) for prompt in PROMPTS])
    first = [step(p[:-1], 0, t) for p, t in zip(PROMPTS, tables, strict=True)]
    mixed = [
        step(PROMPTS[1][9:], 9, tables[1], sample=True),
        step(PROMPTS[0][-1:], 2, tables[0], sample=True),
        step(PROMPTS[3][:7], 0, tables[3], sample=True),
        step(PROMPTS[2][-1:], 1, tables[2], sample=True),
    ]
    alone = []
    for one in mixed:
        backend.run(first)
        alone.append((backend.run([one])[0].token_id, step_logits(backend, [one])[0]))
    backend.run(first)
    together = backend.run(mixed)
    assert [result.token_id for result in together] == [token for token, _ in alone]
    for ours, (_, expected) in zip(step_logits(backend, mixed), alone, strict=True):
        assert (ours - expected).abs().max() < 1e-5


def test_a_request_does_not_see_what_a_failed_one_left_in_its_pages(backend: ModelBackend) -> None:
    expected = greedy(backend, PROMPTS, 20)
    backend.kv.data.fill_(torch.inf)
    assert greedy(backend, PROMPTS, 20) == expected


def test_a_sequence_with_nan_logits_is_reported_and_the_others_go_on(backend: ModelBackend) -> None:
    tables = page_ranges(backend, [len(prompt) + 1 for prompt in PROMPTS])
    good = backend.run([step(p, 0, t, sample=True) for p, t in zip(PROMPTS, tables, strict=True)])
    slot = tables[1][0] * backend.page_size
    backend.kv.data[:, slot] = torch.nan
    tails = [step(p[-1:], len(p) - 1, t, sample=True) for p, t in zip(PROMPTS, tables, strict=True)]
    results = backend.run(tails)
    assert results[1].error is not None and results[1].token_id is None
    for i in (0, 2, 3):
        assert results[i].error is None and results[i].token_id == good[i].token_id


def test_prompt_logprobs_are_those_of_transformers(
    backend: ModelBackend, oracle: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_backend, "LOGPROB_ROWS", 4)
    prompt = PROMPTS[1]
    (pages,) = page_ranges(backend, [len(prompt)])
    chunks = [
        SequenceStep(prompt[:10], 0, pages, prompt_targets=prompt[1:11], prompt_top=2),
        SequenceStep(prompt[10:], 10, pages, step([1], 0, pages, sample=True).sample, prompt[11:], 2),
    ]
    got = [entry for chunk in chunks for entry in backend.run([chunk])[0].prompt_logprobs]
    with torch.no_grad():
        expected = oracle(torch.tensor([prompt])).logits[0].log_softmax(-1)
    assert [entry.token_id for entry in got] == prompt[1:]
    for row, entry in zip(expected[:-1], got, strict=True):
        assert entry.logprob == pytest.approx(row[entry.token_id].item(), abs=1e-4)
        values, ids = row.topk(2)
        assert [token for token, _ in entry.top] == ids.tolist()
        assert [value for _, value in entry.top] == pytest.approx(values.tolist(), abs=1e-4)


def test_a_chunk_that_needs_no_token_gives_none(backend: ModelBackend) -> None:
    (pages,) = page_ranges(backend, [3])
    (result,) = backend.run([step([5, 6, 7], 0, pages)])
    assert result.token_id is None and result.error is None and not result.prompt_logprobs
    assert backend.run([]) == []


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({"token_ids": [5, VOCAB_SIZE]}, f"token id is {VOCAB_SIZE}; it must be from 0 to {VOCAB_SIZE - 1}."),
        ({"token_ids": [-1, 5]}, "token id is -1"),
        ({"token_ids": []}, "at least one token"),
        ({"start": -1}, "positions is"),
        ({"start": 511}, "positions is"),
        ({"start": 15}, "at least 2 pages"),
        ({"pages": array("i", [128])}, "page is 128; it must be from 0 to 127."),
        ({"pages": array("i", [0])}, "two writers"),
        ({"prompt_targets": [1, 2, 3]}, "at most one per token"),
    ],
)
def test_a_step_that_breaks_the_contract_runs_nothing(
    backend: ModelBackend, bad: dict[str, Any], sentence: str
) -> None:
    fields = {"token_ids": [5, 6], "start": 0, "pages": array("i", [3])} | bad
    pages = fields["pages"]
    with pytest.raises(InvalidValueError, match=sentence) as caught:
        backend.run([step([7, 8, 9], 0, array("i", [0])), SequenceStep(**fields)])
    assert backend.kv.data.isnan().all()
    # A view in a frame of the traceback would make this a BufferError.
    pages.append(1)
    assert caught.tb is not None


def test_bf16_in_torch_follows_transformers_rounding(oracle: PreTrainedModel, folder: Path) -> None:
    backend = load(folder, dtype="bf16", kernels="reference")
    (pages,) = page_ranges(backend, [len(PROMPTS[1])])
    (ours,) = step_logits(backend, [step(PROMPTS[1], 0, pages)])
    tokens = torch.tensor([PROMPTS[1]])
    with torch.no_grad():
        exact = oracle(tokens).logits[0]
        theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)(tokens).logits[0].float()
    assert (ours - theirs).abs().mean() < 0.2 * (theirs - exact).abs().mean()
    # The kernels round less often.
    (native,) = step_logits(load(folder, dtype="bf16"), [step(PROMPTS[1], 0, pages)])
    assert (native - exact).abs().mean() < 1.1 * (theirs - exact).abs().mean()


def test_describe_says_what_is_loaded(backend: ModelBackend, oracle: PreTrainedModel) -> None:
    about = backend.describe()
    parameters = sum(parameter.numel() for parameter in oracle.parameters())
    assert about["parameters"] == parameters
    assert 0.99 * 4 * parameters < about["weight_bytes"] <= 4 * parameters
    assert about["kv_bytes_per_token"] == 3 * 2 * 2 * 16 * 4
    assert about["kv_tokens"] == 2048 == backend.num_pages * backend.page_size
    assert (about["model_type"], about["dtype"], about["device"]) == ("qwen3", "float32", "cpu")


def test_settings_that_are_honoured(folder: Path, tmp_path: Path) -> None:
    backend = load(folder, context_length=100, kv_token_budget=100, page_size_tokens=16, num_threads=1)
    assert (backend.context_length, backend.num_pages, backend.vocab_size) == (100, 6, VOCAB_SIZE)
    assert backend.eos_ids == (2,)
    other = _copy(folder, tmp_path / "other", eos_token_id=9)
    (other / "generation_config.json").write_text('{"eos_token_id": [4, 7]}')
    assert load(other).eos_ids == (4, 7)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"context_length": 513}, "CONTEXT_LENGTH is 513; it must be at most 512, the model's own."),
        ({"kv_token_budget": 15}, "KV_TOKEN_BUDGET is 15; it must be at least 16, one page."),
        ({"kv_token_budget": 1 << 31}, "KV_TOKEN_BUDGET is 2147483648; it must be at most"),
        ({"device": "cuda"}, "DEVICE is 'cuda'; it must be auto or cpu"),
    ],
)
def test_settings_that_are_refused(folder: Path, settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InvalidValueError, match=sentence):
        load_backend(folder, Settings.resolve({"device": "cpu", **settings}, env={}))


def test_an_unknown_architecture_is_named(folder: Path, tmp_path: Path) -> None:
    other = _copy(folder, tmp_path / "other", architectures=["NoSuchForCausalLM"], model_type="no_such")
    with pytest.raises(ModelLoadError, match=r"cannot load the no_such model in .*model type `no_such`"):
        load(other)


def test_a_tensor_of_the_wrong_shape_is_named(folder: Path, tmp_path: Path) -> None:
    other = _copy(folder, tmp_path / "other", intermediate_size=80)
    with pytest.raises(ModelLoadError, match=r"layers\.0\.mlp\.gate_proj\.weight .*\[96, 64\].*\[80, 64\]"):
        load(other)


def test_a_missing_tensor_is_named_and_a_needless_one_is_not(folder: Path, tmp_path: Path) -> None:
    other = _copy(folder, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({**tensors, "model.rotary_emb.inv_freq": torch.ones(8)}, other / "model.safetensors")
    load(other)
    del tensors["model.layers.2.self_attn.k_norm.weight"]
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(ModelLoadError, match=r"no tensor model\.layers\.2\.self_attn\.k_norm\.weight"):
        load(other)


def test_tied_weights_are_held_once(tmp_path: Path) -> None:
    backend = load(save_tiny_model(tmp_path, "llama", tie_word_embeddings=True))
    assert backend.decoder.lm_head is backend.decoder.embedding
