"""The recorded step against the decoder's own: the same bits, in the hidden states and in the KV pool."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SequenceStep
from mini_sglang.backend.weights import StackedWeight
from tests.backend.harness import load, page_ranges, step
from tests.backend.kernels.twins import VARIANTS
from tests.backend.loading.model_files import tiny_model, write_gguf
from tests.backend.tiny_models import save_tiny_model

Q4_0, Q4_1, Q8_0, F16, BF16 = (
    gguf.GGMLQuantizationType[name] for name in ("Q4_0", "Q4_1", "Q8_0", "F16", "BF16")
)
FAST = VARIANTS[-1] != "generic"
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("mistral", {"sliding_window": 9}),
    "qwen3": ("qwen3", {"head_dim": 32, "attention_bias": True}),
    "smollm3": ("smollm3", {"no_rope_layer_interval": 2}),
}
MIXED = {"v_proj": Q8_0, "gate_proj": Q4_0, "up_proj": BF16, "down_proj": F16}
PROMPTS = [[3 + (7 * i + 5 * j) % 90 for j in range(n)] for i, n in enumerate((1, 40, 16, 33))]


def batch_of(backend: ModelBackend, steps: list[SequenceStep]) -> Batch:
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    return Batch.build(steps, limits, torch.device("cpu"))


@torch.inference_mode()
def assert_equal_steps(backend: ModelBackend, prompts: list[list[int]] = PROMPTS) -> None:
    """Decodes of several sizes, a prefill of which every row is wanted, chunks with some of them or none."""
    program, decoder, kv = backend.program, backend.decoder, backend.kv
    assert program is not None
    tables = page_ranges(backend, [len(prompt) + 24 for prompt in prompts])
    for prompt, table in zip(prompts, tables, strict=True):
        decoder.forward(batch_of(backend, [step(prompt, 0, table, sample=True)]), kv, backend.attention)
    before = kv.data.clone()

    def run(forward: Any) -> tuple[list[Tensor], Tensor]:
        kv.data.copy_(before)
        hidden = []
        lengths = [len(prompt) for prompt in prompts]
        for turn in range(9):
            chosen = range(len(prompts)) if turn % 2 else (1, 3)
            steps = [step([9 + turn], lengths[i], tables[i], sample=True) for i in chosen]
            hidden.append(forward(batch_of(backend, steps)).clone())
            for i in chosen:
                lengths[i] += 1
        short = step([5, 6, 7], lengths[0], tables[0], sample=False)
        wanted = SequenceStep(short.token_ids, short.start, short.pages, prompt_targets=[0] * 3)
        hidden.append(forward(batch_of(backend, [wanted])).clone())
        lengths[0] += 3
        chunks = [([5, 6, 7, 8], 0, False), ([4], 1, True), ([9, 8], 2, True), ([7, 6, 5], 3, True)]
        for some in (chunks, chunks[2:], chunks[:1]):
            steps = [step(ids, lengths[i], tables[i], sample=sample) for ids, i, sample in some]
            hidden.append(forward(batch_of(backend, steps)).clone())
            assert len(hidden[-1]) == sum(sample for _, _, sample in some)
            for ids, i, _ in some:
                lengths[i] += len(ids)
        return hidden, kv.data.clone()

    ours, our_kv = run(program.forward)
    plain, plain_kv = run(lambda batch: decoder.forward(batch, kv, backend.attention))
    for one, other in zip(ours, plain, strict=True):
        assert bool(one.isfinite().all()) and torch.equal(one, other)
    assert torch.equal(our_kv.view(torch.uint8), plain_kv.view(torch.uint8))
    assert not torch.equal(our_kv.view(torch.uint8), before.view(torch.uint8))


@pytest.mark.parametrize("case", CASES)
def test_a_dense_model(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    backend = load(save_tiny_model(tmp_path, family, **overrides))
    assert (backend.program is not None) == FAST
    if FAST:
        assert_equal_steps(backend)


@pytest.mark.parametrize("kv_dtype", ["auto", "fp32", "fp16", "bf16", "int8"])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_a_dense_model_of_every_dtype(dtype: str, kv_dtype: str, tmp_path: Path) -> None:
    if not FAST:
        assert load(save_tiny_model(tmp_path), dtype=dtype).program is None
        return
    path = save_tiny_model(tmp_path, "qwen3", head_dim=32, attention_bias=True)
    assert_equal_steps(load(path, dtype=dtype, kv_dtype=kv_dtype))


@pytest.mark.parametrize("kv_dtype", ["auto", "fp32", "bf16", "int8"])
@pytest.mark.parametrize(
    "others", [{}, {"v_proj": Q8_0, "gate_proj": Q4_0, "up_proj": BF16, "down_proj": F16}]
)
@pytest.mark.parametrize("family", ["llama-tied", "qwen2"])  # without and with biases of q, k and v
def test_a_model_in_blocks(
    family: str, others: dict[str, gguf.GGMLQuantizationType], kv_dtype: str, tmp_path: Path
) -> None:
    architecture = family.removesuffix("-tied")
    path = write_gguf(tmp_path / "m.gguf", tiny_model(family), architecture, Q4_1, others=others)
    backend = load(path, gguf_dequantize=0, dtype="auto", **({"kv_dtype": kv_dtype} if FAST else {}))
    assert isinstance(backend.decoder.layers[0].qkv, StackedWeight) == bool(others)
    assert isinstance(backend.decoder.layers[0].gate_up, StackedWeight) == bool(others)
    assert (backend.program is not None) == FAST
    if FAST:
        assert_equal_steps(backend)


@pytest.mark.parametrize("kv_dtype", ["fp16", "int8"])
@pytest.mark.parametrize("window", [None, 600])
def test_decodes_beyond_a_span(kv_dtype: str, window: int | None, tmp_path: Path) -> None:
    overrides = {"num_hidden_layers": 2, "max_position_embeddings": 2048, "sliding_window": window}
    path = save_tiny_model(tmp_path, "mistral", **overrides)
    if not FAST:
        assert load(path).program is None
        return
    prompts = [[3 + (7 * i + 5 * j) % 90 for j in range(n)] for i, n in enumerate((1200, 510, 20, 1023))]
    backend = load(path, kv_dtype=kv_dtype, kv_token_budget=4096, num_threads=2, dtype="auto")
    assert_equal_steps(backend, prompts)


@pytest.mark.parametrize("threads", [2, 3])
@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16", "int8"])
def test_steps_that_are_divided_among_the_threads(kv_dtype: str, threads: int, tmp_path: Path) -> None:
    """By sequences of one row, of several, of both; by rows (see ``test_division.py`` for which are)."""
    if not FAST:
        assert load(save_tiny_model(tmp_path)).program is None
        return
    path = write_gguf(tmp_path / "m.gguf", tiny_model("llama"), "llama", Q4_1)
    backend = load(path, gguf_dequantize=0, dtype="auto", kv_dtype=kv_dtype, num_threads=threads)
    program, decoder, kv = backend.program, backend.decoder, backend.kv
    assert program is not None
    lengths = [9 + i % 2 for i in range(14 * threads)]
    tables = page_ranges(backend, [*(length + 20 for length in lengths), 256, 256])
    some, many = [3, 5, 7, 9], [3 + (7 * i) % 90 for i in range(250)]
    starts = [step([3 + i] * length, 0, tables[i], sample=True) for i, length in enumerate(lengths)]
    decodes = [step([4 + i], length, tables[i], sample=True) for i, length in enumerate(lengths)]
    chunks = [step(some, length + 1, tables[i], sample=i % 3 == 0) for i, length in enumerate(lengths)]
    mixed = [*chunks[:2], *decodes[2:-2], *chunks[-2:]]
    long = [step(many, 0, tables[-1], sample=True), step(many[50:], 0, tables[-2], sample=True)]
    batches = [starts, decodes, chunks, mixed, [*long, *decodes], long]
    before = kv.data.clone()

    def run(forward: Any) -> tuple[list[Tensor], Tensor]:
        kv.data.copy_(before)
        return [forward(batch_of(backend, steps)).clone() for steps in batches], kv.data.clone()

    with torch.inference_mode():
        ours, our_kv = run(program.forward)
        plain, plain_kv = run(lambda batch: decoder.forward(batch, kv, backend.attention))
    for one, other in zip(ours, plain, strict=True):
        assert bool(one.isfinite().all()) and torch.equal(one, other)
    assert torch.equal(our_kv.view(torch.uint8), plain_kv.view(torch.uint8))


@pytest.mark.parametrize("kv_dtype", ["fp32", "bf16"])
def test_a_step_of_many_rows_goes_through_in_pieces(kv_dtype: str, tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    backend = load(tmp_path, max_batch_size=70, max_prefill_tokens=130, kv_dtype=kv_dtype if FAST else "auto")
    program, kv = backend.program, backend.kv
    assert (program is not None) == FAST
    if program is None:
        return
    assert program.max_rows == 130
    prompts = [[3 + (7 * i + 5 * j) % 90 for j in range(n)] for i, n in enumerate((1, 300, 128, 129, 250))]
    tables = page_ranges(backend, [len(prompt) for prompt in prompts])
    steps = []
    for prompt, table in zip(prompts, tables, strict=True):
        one = step(prompt, 0, table, sample=True)
        steps.append(SequenceStep(prompt, 0, table, one.sample, prompt[1:], 3))
    before = kv.data.clone()
    ours, our_kv = backend.run(steps), kv.data.clone()
    kv.data.copy_(before)
    with torch.inference_mode():
        batch = batch_of(backend, steps)
        whole = backend._results(steps, batch, backend.decoder.forward(batch, kv, backend.attention))
    assert ours == whole and all(len(one.prompt_logprobs) > 60 for one in ours[1:])
    assert torch.equal(our_kv.view(torch.uint8), kv.data.view(torch.uint8))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_other_models_have_none(tmp_path: Path, dtype: str) -> None:
    assert load(save_tiny_model(tmp_path / "a"), dtype=dtype, kernels="reference").program is None
    # The kernels' attention does not take heads of 24 numbers, nor its norm rows of 72.
    assert load(save_tiny_model(tmp_path / "b", "qwen3", head_dim=24), dtype=dtype).program is None
    assert load(save_tiny_model(tmp_path / "c", hidden_size=72, head_dim=16), dtype=dtype).program is None
