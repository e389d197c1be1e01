"""What a start imports: nothing of CUDA's on a CPU or on MPS, and MPS runs on torch's operators in fp16."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]

# Refuses what is for CUDA alone, and runs a model. As MPS: torch says there is one, and what is put there
# lies on the CPU, so that all but the device's own code is as it would be.
PROGRAM = """
import sys

CUDA_ONLY = ("triton", "flashinfer", "flash_attn", "cupy")

class Guard:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in CUDA_ONLY:
            raise AssertionError(f"{name} is imported, which is for CUDA alone")

sys.meta_path.insert(0, Guard())

import contextlib, json
import torch
from torch.overrides import TorchFunctionMode

class Elsewhere(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        def moved(value):
            return torch.device("cpu") if isinstance(value, torch.device) and value.type == "mps" else value

        given = {name: moved(value) for name, value in (kwargs or {}).items()}
        return func(*map(moved, args), **given)

device, folder, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
mode = contextlib.nullcontext()
if device == "mps":
    torch.backends.mps.is_available = lambda: True
    torch.backends.mps.is_macos_or_newer = lambda major, minor: True
    torch.mps.recommended_max_memory = lambda: 8 << 30
    torch.mps.driver_allocated_memory = lambda: 1 << 30
    mode = Elsewhere()

from array import array
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.device import choose_device
from mini_sglang.backend.step import SampleSpec, SequenceStep
from mini_sglang.config import Settings
from mini_sglang.types import SamplingParams
from pathlib import Path

with mode:
    resolved = Settings.resolve({"device": device, "kv_token_budget": 256, **settings}, {})
    chosen = choose_device("auto" if device == "mps" else device)
    backend = load_backend(Path(folder), resolved)
    spec = SampleSpec(SamplingParams(temperature=0.7), 1, 0)
    pages = array("i", range(backend.num_pages))
    tokens = [backend.run([SequenceStep([5, 6, 7], 0, pages, spec)])[0].token_id]
    tokens.append(backend.run([SequenceStep(tokens[:1], 3, pages, spec)])[0].token_id)
    backend.free_memory() if device != "mps" else None
print(json.dumps({
    "chosen": chosen.type,
    "described": backend.describe(),
    "operations": type(getattr(backend.decoder, "operations", None)).__name__,
    "attention": type(backend.attention).__name__,
    "sampler": type(backend.sampler).__name__,
    "tokens": tokens,
    "modules": sorted(name for name in sys.modules if name.partition(".")[0] in CUDA_ONLY),
}))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"), "qwen3")


def start(device: str, folder: Path, **settings: object) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    # What other tests run Triton's interpreter with; without it Triton is for CUDA alone.
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, device, str(folder), json.dumps(settings)],
        capture_output=True,
        text=True,
        env=environment,
        cwd=ROOT,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("kernels", ["auto", "reference"])
def test_a_cpu_start_imports_nothing_for_cuda(folder: Path, kernels: str) -> None:
    found = start("cpu", folder, kernels=kernels)
    assert found["modules"] == [] and found["chosen"] == "cpu"
    assert all(0 <= token < 259 for token in found["tokens"])


def test_mps_runs_on_torchs_operators_in_fp16(folder: Path) -> None:
    found = start("mps", folder)
    assert found["modules"] == [] and found["chosen"] == "mps"
    described = found["described"]
    assert (described["dtype"], described["kv_dtype"]) == ("float16", "float16")
    assert (found["operations"], found["attention"]) == ("TorchOperations", "PagedAttention")
    assert found["sampler"] == "Sampler" and described["compile"] == "off"
    assert described["attention"].startswith("paged, ")
    assert all(0 <= token < 259 for token in found["tokens"])


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kernels": "triton"}, "KERNELS"),
        ({"attn_impl": "triton"}, "ATTN_IMPL"),
        ({"attn_impl": "flashinfer"}, "ATTN_IMPL"),
        ({"attn_impl": "flash_attention_2"}, "ATTN_IMPL"),
        ({"tensor_parallel_size": 2}, "TENSOR_PARALLEL_SIZE"),
    ],
)
def test_what_needs_cuda_is_refused_on_mps_by_a_sentence(
    folder: Path, settings: dict[str, object], says: str
) -> None:
    with pytest.raises(AssertionError, match=f"InvalidValueError: {says} is "):
        start("mps", folder, **settings)
