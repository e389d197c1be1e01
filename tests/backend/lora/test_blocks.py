"""Adapters over models in ggml's blocks."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
import torch

from mini_sglang.backend.kernels.adapters import NativeAdapters
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.backend.lora.store import TorchAdapters
from mini_sglang.backend.lora.weights import read_weights
from mini_sglang.backend.step import SequenceStep
from mini_sglang.backend.weights import StackedWeight
from tests.backend.harness import load, page_ranges, step_logits
from tests.backend.loading.model_files import tiny_model, write_gguf
from tests.backend.lora.tiny_adapters import peft_logits, save_tiny_adapter


@pytest.mark.parametrize("kernels_setting", ["auto", "reference"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1", "Q4_1 and others"])
def test_a_model_in_blocks(tmp_path: Path, kind: str, kernels_setting: str) -> None:
    """Against PEFT over the numbers that the blocks stand for."""
    q8, q4, q40 = (gguf.GGMLQuantizationType[name] for name in ("Q8_0", "Q4_1", "Q4_0"))
    others = {"v_proj": q8, "up_proj": q40} if " " in kind else {}
    model = tiny_model("llama-tied")
    path = write_gguf(tmp_path / "m.gguf", model, "llama", q8 if kind == "Q8_0" else q4, others=others)
    # The same numbers, dense, by way of the file.
    plain = load(path, gguf_dequantize=0, kernels="reference")
    with torch.no_grad():
        for index, layer in enumerate(plain.decoder.layers):
            block = model.model.layers[index]
            q, k = block.self_attn.q_proj.weight, block.self_attn.k_proj.weight
            dense = layer.qkv.dequantize(torch.float32).split([len(q), len(k), len(k)])
            for name, values in zip(("q_proj", "k_proj", "v_proj"), dense, strict=True):
                getattr(block.self_attn, name).weight.copy_(values)
            block.self_attn.o_proj.weight.copy_(layer.o.dequantize(torch.float32))
            gate, up = layer.gate_up.dequantize(torch.float32).chunk(2)
            block.mlp.gate_proj.weight.copy_(gate)
            block.mlp.up_proj.weight.copy_(up)
            block.mlp.down_proj.weight.copy_(layer.down.dequantize(torch.float32))
        model.model.embed_tokens.weight.copy_(plain.decoder.embedding.dequantize(torch.float32))
    folder = save_tiny_adapter(tmp_path / "a", model, r=16, seed=4)
    ids = list(range(4, 40))
    expected, without = peft_logits(model, folder, ids), peft_logits(model, None, ids)
    backend = load(path, gguf_dequantize=0, kernels=kernels_setting)
    assert isinstance(backend.decoder.layers[0].qkv, StackedWeight) == (" " in kind)
    assert backend.adapters is not None
    own = backend.adapters.read(open_adapter("a", folder))
    assert backend.adapters.attach(own) == 1
    (pages,) = page_ranges(backend, [len(ids)])
    (found,) = step_logits(backend, [SequenceStep(ids, 0, pages, adapter=1)])
    if not isinstance(backend.adapters.math, NativeAdapters):
        torch.testing.assert_close(found, expected, atol=1e-4 * float(expected.std()), rtol=1e-4)
        return
    # The kernels round what blocks are multiplied by to 8 bits, of which this model makes a thousandfold.
    (unchanged,) = step_logits(backend, [SequenceStep(ids, 0, pages)])
    assert (found - expected).abs().mean() < 2 * (unchanged - without).abs().mean()
    # The same products with what torch adds to them.
    twin = TorchAdapters(torch.device("cpu"), 1)
    twin.set(0, read_weights(open_adapter("a", folder), backend.decoder.config, 64))
    backend.adapters.math = twin
    (other,) = step_logits(backend, [SequenceStep(ids, 0, pages, adapter=1)])
    assert (found - other).abs().max() < 1e-3 * expected.std() < 1e-2 * (found - unchanged).abs().max()
