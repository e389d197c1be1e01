"""What LoRA adapters cost: seconds a decode step takes without any, with one, and with four mixed.

    python benchmarks/lora_bench.py MODEL [--rank 16] [--rounds 30]

Random adapters over all seven matrices of each layer. The cases take turns, so that a busy machine is busy
for all of them; given is each one's fastest step, and the median of its ratio to the step without adapters
beside it. Prefill is of 512 tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from array import array
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.loader import expected_tensors
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.types import SamplingParams

CONTEXT, PROMPT = 64, 512
PARAMS = SamplingParams()


def random_adapter(folder: Path, backend: ModelBackend, rank: int, seed: int) -> Path:
    """An adapter of every matrix of every layer, as PEFT saves one."""
    folder.mkdir()
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for name, shape in expected_tensors(backend.decoder.config).items():
        if "_proj.weight" not in name:
            continue
        stem = "base_model.model." + name.removesuffix(".weight")
        tensors[f"{stem}.lora_A.weight"] = 0.02 * torch.randn(rank, shape[1], generator=generator)
        tensors[f"{stem}.lora_B.weight"] = 0.02 * torch.randn(shape[0], rank, generator=generator)
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": "all-linear"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def steps(backend: ModelBackend, adapters: Sequence[int], streams: int, tokens: int) -> list[SequenceStep]:
    """A step of ``streams`` sequences with ``tokens`` new ones each, after ``CONTEXT`` where they decode."""
    start = CONTEXT if tokens == 1 else 0
    pages = -(-(start + tokens) // backend.page_size)
    return [
        SequenceStep(
            range(100, 100 + tokens),
            start,
            array("i", range(i * pages, (i + 1) * pages)),
            SampleSpec(PARAMS, 0, 0),
            adapter=adapters[i % len(adapters)],
        )
        for i in range(streams)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    settings = Settings.resolve({"kv_token_budget": 16384, "max_lora_rank": options.rank})
    backend = load_backend(options.model, settings)
    assert backend.adapters is not None
    with tempfile.TemporaryDirectory() as folder:
        ids = []
        for seed in range(4):
            path = random_adapter(Path(folder) / str(seed), backend, options.rank, seed)
            started = time.perf_counter()
            ids.append(backend.adapters.attach(backend.adapters.read(open_adapter(f"a{seed}", path))))
            loading = time.perf_counter() - started
    kinds = {"none": [0], "one": ids[:1], "four mixed": ids}
    rows = [("decode, 1 stream", 1, 1), ("decode, 16 streams", 16, 1), ("prefill, 512 tokens", 1, PROMPT)]
    size = (Path(options.model).name, options.rank, loading)
    print("{}, rank {}; an adapter loads in {:.2f} s; {}".format(*size, backend.describe()["kernels"]))
    for name, streams, tokens in rows:
        cases = {kind: steps(backend, chosen, streams, tokens) for kind, chosen in kinds.items()}
        for case in cases.values():
            backend.run(case)
        seconds: dict[str, list[float]] = {kind: [] for kind in cases}
        for _ in range(options.rounds if tokens == 1 else max(3, options.rounds // 6)):
            for kind, case in cases.items():
                started = time.perf_counter()
                backend.run(case)
                seconds[kind].append(time.perf_counter() - started)
        for kind, found in seconds.items():
            ratios = [one / none for one, none in zip(found, seconds["none"], strict=True)]
            fastest, ratio = min(found) / min(seconds["none"]), statistics.median(ratios)
            shown = f"{1000 * min(found):8.2f} ms   x{fastest:.2f} (median of pairs x{ratio:.2f})"
            print(f"  {name:20} {kind:11} {shown}")


if __name__ == "__main__":
    main()
