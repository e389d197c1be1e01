"""What 8-bit activations, and QUANTIZATION, cost: KL divergence and perplexity on real text.

    python benchmarks/quality.py [--model MODEL] [--quantization int8] [--text FILE] [--positions 2048]

The reference is the same model in float32 (a GGUF's blocks made dense), on torch's operators. The text is
cut into windows of 512 tokens, each run as one prefill.
"""

from __future__ import annotations

import argparse
import sys
from array import array
from pathlib import Path

import torch
from torch import Tensor

from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.batch import Batch, Limits
from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.backend.model_backend import ModelBackend, load_backend
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
    hidden = backend.decoder.forward(batch, backend.kv, PagedAttention())
    return backend.decoder.logits(hidden).double().log_softmax(-1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="by default what the engine would take")
    parser.add_argument("--quantization", default="none", help="int8 or int4, for a dense model")
    parser.add_argument("--text", type=Path, default=DEFAULT_TEXT)
    parser.add_argument("--positions", type=int, default=4 * WINDOW)
    args = parser.parse_args()

    common = {"model": args.model, "device": "cpu", "dtype": "fp32", "kv_token_budget": 2 * WINDOW}
    path = resolve_model(Settings.resolve(common), notify=lambda line: print(line, file=sys.stderr)).path
    kept = Settings.resolve({**common, "gguf_dequantize": "0", "quantization": args.quantization})
    plain = Settings.resolve({**common, "gguf_dequantize": "1", "kernels": "reference"})
    backends = {"reference": load_backend(path, plain), "kernels": load_backend(path, kept)}
    print(backends["kernels"].describe())
    tokenizer = load_tokenizer(path, cache_dir=kept.cache_path)
    ids = list(tokenizer.encode(args.text.read_text(encoding="utf-8")))[: args.positions + 1]

    divergence, agree = 0.0, 0
    losses = dict.fromkeys(backends, 0.0)
    count = len(ids) - 1
    for start in range(0, count, WINDOW):
        window = ids[start : min(start + WINDOW, count)]
        targets = torch.tensor(ids[start + 1 : start + 1 + len(window)])
        found = {name: log_probabilities(backend, window) for name, backend in backends.items()}
        for name, logs in found.items():
            losses[name] -= float(logs.gather(1, targets[:, None]).sum())
        expected, got = found["reference"], found["kernels"]
        divergence += float((expected.exp() * (expected - got)).sum())
        agree += int((expected.argmax(1) == got.argmax(1)).sum())
    perplexity = {name: float(torch.tensor(loss / count).exp()) for name, loss in losses.items()}
    change = perplexity["kernels"] / perplexity["reference"] - 1
    print(f"positions {count}, of {args.text}")
    print(f"mean KL divergence from the reference {divergence / count:.6f} (at most 0.01)")
    print(f"perplexity {perplexity['kernels']:.4f}, reference {perplexity['reference']:.4f}: {change:+.3%}")
    print(f"same most probable token at {agree / count:.2%} of the positions")
    return 0 if divergence / count <= 0.01 and abs(change) <= 0.01 else 1


if __name__ == "__main__":
    raise SystemExit(main())
