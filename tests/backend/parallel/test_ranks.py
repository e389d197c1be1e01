"""Every family's features, divided: the logits of the whole model, from parts that are only parts."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch

from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import load, page_ranges, step, step_logits
from tests.backend.loading import model_files
from tests.backend.tiny_models import save_tiny_model

from .ranks import Ranks

# With a vocabulary that neither 2 nor 4 divides, and 2 KV heads for up to 4 ranks.
SIZES: dict[str, Any] = {"vocab_size": 301, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama one KV head": ("llama", {"num_key_value_heads": 1}),
    "llama as many KV heads": ("llama", {"num_key_value_heads": 4}),
    "llama uneven inside": ("llama", {"intermediate_size": 112}),
    "mistral window": ("mistral", {"sliding_window": 9}),
    "qwen2 q, k and v biases": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 q and k norms": ("qwen3", {}),
    "smollm3 layers without rope": ("smollm3", {"no_rope_layer_interval": 2}),
}
_GENERATOR = torch.Generator().manual_seed(3)
PROMPTS = [torch.randint(3, 301, (n,), generator=_GENERATOR).tolist() for n in (1, 5, 40)]


def logits(backend: ModelBackend) -> list[torch.Tensor]:
    tables = page_ranges(backend, [len(prompt) for prompt in PROMPTS])
    return step_logits(backend, [step(p, 0, t) for p, t in zip(PROMPTS, tables, strict=True)])


def compare(path: Path, size: int, tolerance: float, **settings: object) -> Ranks:
    whole = load(path, **settings)
    ranks = Ranks(path, size, **settings)
    tables = page_ranges(whole, [len(prompt) for prompt in PROMPTS])
    for ours, one in zip(ranks.logits(PROMPTS, tables), logits(whole), strict=True):
        assert ours.shape == one.shape
        assert (ours - one).abs().max() <= tolerance * one.abs().max()
        if tolerance < 1e-4:
            assert torch.equal(ours.argmax(-1), one.argmax(-1))
    return ranks


@pytest.mark.parametrize("kernels", ["auto", "reference"])
@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_ranks_give_the_logits_of_one(family: str, size: int, kernels: str, tmp_path: Path) -> None:
    name, features = FAMILIES[family]
    path = save_tiny_model(tmp_path, name, **{**SIZES, **features})
    ranks = compare(path, size, 1e-5, kernels=kernels)
    whole = load(path, kernels=kernels).decoder.nbytes
    shared = sum(backend.decoder.nbytes for backend in ranks.backends)
    kv_heads = features.get("num_key_value_heads", 2)
    copies = max(1, size // kv_heads) - 1  # of k and v, where ranks share a KV head
    twice = copies * 2 * SIZES["num_hidden_layers"] * kv_heads * SIZES["head_dim"] * 64 * 4
    # The kernels round a matrix's rows up to 16.
    assert shared - twice == pytest.approx(whole, rel=0.05)
    assert max(backend.decoder.nbytes for backend in ranks.backends) < 1.3 * whole / size + twice / size
    assert {b.kv.kv_heads for b in ranks.backends} == {max(1, kv_heads // size)}


@pytest.fixture(scope="module", params=["Q8_0", "Q4_0"])
def blocks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A llama, whose converter reorders the rows of q and k."""
    torch.manual_seed(0)
    sizes = {**model_files.SIZES, "vocab_size": 301, "intermediate_size": 160, "hidden_size": 128}
    import transformers

    config = transformers.LlamaConfig(**sizes, head_dim=32, tie_word_embeddings=False)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    kind = getattr(gguf.GGMLQuantizationType, request.param)
    return model_files.write_gguf(path, model, "llama", kind)


@pytest.mark.parametrize("size", [2, 4])
def test_a_ggufs_blocks_are_divided_as_they_are(blocks: Path, size: int) -> None:
    ranks = compare(blocks, size, 1e-5, kernels="reference", gguf_dequantize="0", kv_dtype="fp32")
    whole = load(blocks, kernels="reference", gguf_dequantize="0").decoder.nbytes
    held = [backend.decoder.nbytes for backend in ranks.backends]
    # Five blocks of down are not alike for all, and four ranks share two KV heads.
    assert whole <= sum(held) < 1.15 * whole and max(held) < 1.6 * whole / size
    # The kernels round what a row multiplies to 8 bits: a sum in another order can move that by one.
    compare(blocks, size, 0.02, kernels="auto", gguf_dequantize="0", kv_dtype="fp32")
    # Plain numbers may be cut anywhere.
    compare(blocks, size, 1e-5, gguf_dequantize="1")


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantization_makes_the_same_blocks_of_a_part(quantization: str, tmp_path: Path) -> None:
    path = save_tiny_model(tmp_path, "qwen2", **SIZES)
    ranks = compare(path, 2, 1e-5, kernels="reference", quantization=quantization)
    whole = load(path, kernels="reference", quantization=quantization)
    for first, second in (("qkv", 0), ("down", 1)):
        parts = [getattr(backend.decoder.layers[0], first) for backend in ranks.backends]
        numbers = [part.dequantize(torch.float32) for part in parts]
        one = getattr(whole.decoder.layers[0], first).dequantize(torch.float32)
        if first == "down":
            assert torch.equal(torch.cat(numbers, second), one)
        else:
            assert torch.equal(numbers[0][:64], one[:64]) and torch.equal(numbers[1][:64], one[64:128])


def test_a_step_of_other_requests_changes_no_bit(tmp_path: Path) -> None:
    """Ranks add up in one order, whatever the number of rows."""
    path = save_tiny_model(tmp_path, "llama", **SIZES)
    ranks = Ranks(path, 4)
    tables = page_ranges(ranks.backends[0], [len(prompt) for prompt in PROMPTS])
    together = ranks.logits(PROMPTS, tables)
    for prompt, table, among in zip(PROMPTS, tables, together, strict=True):
        assert torch.equal(ranks.logits([prompt], [table])[0], among)


REFUSED: list[tuple[dict[str, Any], dict[str, object], str]] = [
    ({}, {"tensor_parallel_size": 3}, "is 3; it must be 1, 2 or 4 for this model: it has 4 attention heads"),
    ({"num_attention_heads": 12, "num_key_value_heads": 4, "hidden_size": 96}, {"tensor_parallel_size": 3},
     "is 3; it must be 1, 2 or 4 for this model: it has 4 KV heads"),
    ({"intermediate_size": 16}, {"tensor_parallel_size": 2},
     "is 2; it must be 1 for this model: down_proj has 1 blocks of 16 columns"),
    ({"head_dim": 8, "hidden_size": 32}, {"tensor_parallel_size": 4, "quantization": "int8"},
     r"is 4; it must be 1 for this model: the 8 columns of o_proj for a rank are no whole blocks of 32 "
     r"\(QUANTIZATION=none makes plain numbers of them\)"),
    ({}, {"lora_adapters": "a=/b"}, "LORA_ADAPTERS is 'a=/b'; it must be unset with TENSOR_PARALLEL_SIZE=2"),
    ({}, {"lora_root": "/b"}, "LORA_ROOT is '/b'; it must be unset"),
    ({}, {"prefix_cache_file": "/b/c"}, "PREFIX_CACHE_FILE is '/b/c'; it must be unset"),
    ({}, {"compile_model": "1", "kernels": "reference"}, "COMPILE_MODEL is '1'; it must be 0 or auto here"),
    ({}, {"engine_fast_decode": True}, "it must be 1 for this model: ENGINE_FAST_DECODE"),
]  # fmt: skip


@pytest.mark.parametrize(("features", "settings", "sentence"), REFUSED)
def test_what_cannot_be_divided_is_refused_before_a_process_starts(
    features: dict[str, Any],
    settings: dict[str, object],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*given: object) -> Callable[[], None]:
        raise AssertionError("a process was started")

    monkeypatch.setattr("mini_sglang.backend.parallel.leader.Followers", never)
    path = save_tiny_model(tmp_path, "llama", **{**SIZES, **features})
    with pytest.raises(InvalidValueError, match=sentence):
        load(path, **{"tensor_parallel_size": 2, **settings})
