"""``LOAD_FORMAT=dummy``: random weights for a real config, without a file of weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mini_sglang import Engine, InvalidValueError, ModelLoadError, SamplingParams
from mini_sglang.backend.gpus import Need
from mini_sglang.backend.models.dummy import DummyCheckpoint
from mini_sglang.backend.parallel.need_main import need
from mini_sglang.config import Settings
from tests.api.serving import Server, serving
from tests.backend.harness import load, page_ranges, step, step_logits
from tests.tiny_folders import tiny_folder

CPU = torch.device("cpu")
CONFIG = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
PROMPT = [5, 80, 249, 7]


def write_config(folder: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **changes}))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_config(tmp_path / "tiny-qwen3")


def answer(folder: Path, **settings: object) -> tuple[int, ...]:
    given = {"load_format": "dummy", "kv_token_budget": 1024, "dtype": "fp32", **settings}
    with Engine(str(folder), **given) as engine:
        return engine.generate(PROMPT, SamplingParams(max_new_tokens=8, ignore_eos=True)).token_ids


def test_a_config_alone_answers_the_same_each_time_and_says_what_it_is(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines: list[str] = []
    with Engine(str(folder), load_format="dummy", kv_token_budget=1024, notify=lines.append) as engine:
        assert engine.description["weights"] == "random: the answers mean nothing"
        output = engine.generate("Hello", SamplingParams(max_new_tokens=8, temperature=1.0, seed=1))
        assert output.usage.prompt_tokens == 5  # a token for each byte
        assert isinstance(output.text, str) and engine.tokenizer.decode(b"caf\xc3\xa9") == "café"
    assert any("random" in line and "mean nothing" in line for line in lines)
    assert any("random weights" in record.getMessage() for record in caplog.records)
    assert answer(folder) == answer(folder)


def test_without_it_a_config_alone_is_no_model_and_real_weights_are_what_runs(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="has neither"):
        answer(write_config(tmp_path / "none"), load_format="auto")
    real = tiny_folder(tmp_path / "real", "qwen3")
    ids = answer(real, load_format="auto")
    with Engine(str(real), load_format="auto", kv_token_budget=1024) as engine:
        assert "weights" not in engine.description
    assert answer(real) != ids
    # Not read, so it may be anything.
    (real / "model.safetensors").write_bytes(b"no weights")
    assert len(answer(real)) == 8


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("layers", [3, 48])
def test_logits_are_finite_and_say_something_in_every_type(tmp_path: Path, dtype: str, layers: int) -> None:
    folder = write_config(tmp_path / "deep", num_hidden_layers=layers)
    backend = load(folder, load_format="dummy", dtype=dtype, kernels="reference")
    (table,) = page_ranges(backend, [64])
    (logits,) = step_logits(backend, [step([(i * 37) % 300 for i in range(64)], 0, table)])
    assert logits.isfinite().all()
    assert 1.0 < logits.float().std() < 5.0 and len(set(logits.argmax(-1).tolist())) > 5


def test_weights_are_made_in_their_type_on_their_device(folder: Path) -> None:
    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    calls: list[str] = []
    with Watch():
        name = "model.layers.0.mlp.down_proj.weight"
        tensor = DummyCheckpoint(folder, CPU).tensor(name, torch.bfloat16)
    assert tensor.dtype == torch.bfloat16 and tensor.shape == (64, 96)
    # Nothing is made elsewhere, or in another type, and copied.
    assert calls == ["aten.empty.memory_format", "aten.normal_.default"]
    assert abs(float(tensor.float().std()) * 96**0.5 - 1) < 0.05


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantisation_is_honoured(folder: Path, quantization: str) -> None:
    plain = load(folder, load_format="dummy")
    quantized = load(folder, load_format="dummy", quantization=quantization)
    assert quantized.describe()["quantization"] == quantization
    assert quantized.decoder.nbytes < 0.4 * plain.decoder.nbytes
    (table,) = page_ranges(plain, [8])
    logits = [step_logits(one, [step(PROMPT, 0, table)])[0] for one in (plain, quantized)]
    # The same weights, but for the rounding.
    assert torch.corrcoef(torch.stack([part.flatten() for part in logits]))[0, 1] > 0.9


def test_several_ranks_have_the_weights_of_one(folder: Path) -> None:
    assert answer(folder, tensor_parallel_size=2) == answer(folder)


def test_it_is_known_how_many_gpus_it_needs(folder: Path) -> None:
    settings = Settings.resolve({"model": str(folder), "load_format": "dummy", "device": "cpu"}, {})
    assert need(folder, settings) == Need(0, 1)


def test_it_is_served_and_shown(folder: Path, tmp_path: Path) -> None:
    with serving(folder, load_format="dummy") as client:
        done = client.ask(prompt="Hello", max_new_tokens=4, ignore_eos=True, return_token_ids=True)
        assert len(done["token_ids"]) == 4
        assert "random" in str(client.service.info.description["weights"])
    server = Server(
        folder, tmp_path / "log",
        "-m", "mini_sglang", "serve", "--load-format", "dummy", "--port", "{port}",
    )  # fmt: skip
    try:
        server.wait_ready()
        status, _, _ = server.request("POST", "/generate", {"prompt": "Hello", "max_new_tokens": 3})
        assert status == 200 and "answers mean nothing" in server.said
    finally:
        server.close()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"engine_fast_decode": True}, "ENGINE_FAST_DECODE"),
        ({"load_format": "random"}, "load_format"),
    ],
)
def test_what_it_cannot_be_together_with_is_refused(
    folder: Path, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(InvalidValueError, match=f"(?i){says}"):
        answer(folder, **settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}, "families"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
    ],
)
def test_a_config_that_it_cannot_be_of_is_refused(
    tmp_path: Path, changes: dict[str, object], says: str
) -> None:
    with pytest.raises(InvalidValueError, match=f"LOAD_FORMAT is 'dummy'.*{says}"):
        answer(write_config(tmp_path / "other", **changes))


def test_what_is_no_folder_with_a_config_is_refused(tmp_path: Path, starter_gguf: Path) -> None:
    for model, says in ((str(starter_gguf), "GGUF"), ("Qwen/Qwen3-0.6B", "a folder on disk")):
        with pytest.raises(InvalidValueError, match=f"LOAD_FORMAT is 'dummy'.*{says}"):
            Engine(model, load_format="dummy")
    with pytest.raises(ModelLoadError, match="has no config"):
        Engine(str(tmp_path), load_format="dummy")


def test_a_vocabulary_of_fewer_tokens_than_bytes_takes_ids(tmp_path: Path) -> None:
    folder = write_config(tmp_path / "few", vocab_size=64)
    with Engine(str(folder), load_format="dummy", kv_token_budget=256) as engine:
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        assert max(engine.generate([1, 2, 63], params).token_ids) < 64
