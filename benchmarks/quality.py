"""What 8-bit activations, QUANTIZATION and KV_DTYPE cost: KL divergence and perplexity on real text.

    python benchmarks/quality.py [--model MODEL] [--quantization int8] [--kv-dtype fp32 fp16 bf16 int8]
                                 [--dtype fp32] [--dequantize] [--fp8] [--text FILE] [--positions 2048]

The reference is the same model in float32 (a GGUF's blocks made dense), on torch's operators. The text is
cut into windows of 512 tokens, each run as one prefill. ``--fp8`` does what QUANTIZATION=fp8 does on a GPU:
the layers' matrices are rounded to e4m3, and what they are multiplied by.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from pathlib import Path

import torch
from torch import Tensor

from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.fp8 import Fp8Weight
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.step import SequenceStep
from mini_sglang.config import Settings
from mini_sglang.text.tokenizer import load_tokenizer

WINDOW = 512
DEFAULT_TEXT = Path("/usr/share/common-licenses/GPL-3")


@torch.inference_mode()
def log_probabilities(backend: ModelBackend, ids: list[int]) -> Tensor:
    """After each of ``ids``, float64 ``[len(ids), V]``."""
    pages = array("i", range(-(-len(ids) // backend.page_size)))
    step = SequenceStep(ids, 0, pages, prompt_targets=[0] * len(ids))
    limits = Limits(backend.page_size, backend.num_pages, backend.vocab_size, backend.context_length)
    batch = Batch.build([step], limits, torch.device("cpu"))
    hidden = backend.decoder.forward(batch, backend.kv, backend.attention)
    return backend.decoder.logits(hidden).double().log_softmax(-1)


def make_fp8(backend: ModelBackend) -> None:
    """Round the matrices of the layers to e4m3."""
    decoder = backend.decoder
    for layer in decoder.layers:
        for name in ("qkv", "o", "gate_up", "down"):
            dense = getattr(layer, name).dequantize(torch.float32)
            setattr(layer, name, Fp8Weight.of(dense, decoder.dtype))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="by default what the engine would take")
    parser.add_argument("--quantization", default="none", help="int8 or int4, for a dense model")
    parser.add_argument("--kv-dtype", nargs="+", default=["auto"], help="each is measured")
    parser.add_argument("--dtype", default="auto", help="of plain weights")
    parser.add_argument("--dequantize", action="store_true", help="make a GGUF's blocks plain weights")
    parser.add_argument("--fp8", action="store_true", help="on torch's operators, as a GPU multiplies e4m3")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT)
    parser.add_argument("--positions", type=int, default=4 * WINDOW)
    args = parser.parse_args()

    common = {"model": args.model, "device": "cpu", "kv_token_budget": 2 * WINDOW}
    path = resolve_model(Settings.resolve(common), notify=lambda line: print(line, file=sys.stderr)).path
    plain = {"dtype": "fp32", "gguf_dequantize": "1", "kernels": "reference"}
    kept = {
        "dtype": args.dtype,
        "gguf_dequantize": str(int(args.dequantize)),
        "quantization": args.quantization,
    }
    if args.fp8:
        kept |= {"gguf_dequantize": "1", "kernels": "reference"}
    settings = {"reference": Settings.resolve({**common, **plain})}
    for kind in args.kv_dtype:
        settings[f"KV {kind}"] = Settings.resolve({**common, **kept, "kv_dtype": kind})
    backends = {name: load_backend(path, each) for name, each in settings.items()}
    for name, backend in backends.items():
        if args.fp8 and name != "reference":
            make_fp8(backend)
    tokenizer = load_tokenizer(path, cache_dir=settings["reference"].cache_path)
    ids = list(tokenizer.encode(args.text.read_text(encoding="utf-8")))[: args.positions + 1]

    divergence = dict.fromkeys(backends, 0.0)
    agree = dict.fromkeys(backends, 0)
    losses = dict.fromkeys(backends, 0.0)
    count = len(ids) - 1
    for start in range(0, count, WINDOW):
        window = ids[start : min(start + WINDOW, count)]
        targets = torch.tensor(ids[start + 1 : start + 1 + len(window)])
        found = {name: log_probabilities(backend, window) for name, backend in backends.items()}
        expected = found["reference"]
        for name, logs in found.items():
            losses[name] -= float(logs.gather(1, targets[:, None]).sum())
            divergence[name] += float((expected.exp() * (expected - logs)).sum())
            agree[name] += int((expected.argmax(1) == logs.argmax(1)).sum())
    perplexity = {name: float(torch.tensor(loss / count).exp()) for name, loss in losses.items()}
    within = True
    print(f"{count} positions of {args.text}; reference perplexity {perplexity['reference']:.4f}")
    for name, backend in backends.items():
        if name == "reference":
            continue
        what = backend.describe()
        change = perplexity[name] / perplexity["reference"] - 1
        print(
            f"{name:8} ({what['kernels']}, {what['dtype']}, KV {what['kv_dtype']}): "
            f"mean KL divergence {divergence[name] / count:.6f} (at most 0.01), "
            f"perplexity {perplexity[name]:.4f} ({change:+.3%}), "
            f"same most probable token {agree[name] / count:.2%}"
        )
        within &= divergence[name] / count <= 0.01 and abs(change) <= 0.01
    return 0 if within else 1


if __name__ == "__main__":
    raise SystemExit(main())
