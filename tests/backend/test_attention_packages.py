"""flash_attn and flashinfer behind ``Attention``: what they are told, and where they are refused.

The packages need a GPU: here they are replaced by what their documentation says they do.
"""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest
import torch

from mini_sglang.backend.attention.base import PLAIN, AttentionForm
from mini_sglang.backend.attention.choice import Heads, choose_attention
from mini_sglang.backend.attention.flash import FlashAttention
from mini_sglang.backend.attention.flashinfer import FlashInferAttention
from mini_sglang.errors import InvalidValueError
from tests.backend import fake_packages
from tests.backend.kernels.triton.scene import LAYER, Scene

STEPS = {
    "decodes": [(1, 0), (1, 300), (1, 255), (1, 256)],
    "chunks": [(40, 0), (3, 500), (17, 33)],
    "mixed": [(40, 0), (1, 300), (3, 256), (1, 0)],
}
CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flash_attn", "flashinfer"):
        module = getattr(fake_packages, name)()
        module.__spec__ = ModuleSpec(name, None)
        monkeypatch.setitem(sys.modules, name, module)


@pytest.mark.parametrize("form", [PLAIN, AttentionForm(0.3, 5.0)], ids=["plain", "scale and softcap"])
@pytest.mark.parametrize("window", [None, 1, 20, 300])
@pytest.mark.parametrize("sequences", STEPS.values(), ids=STEPS)
def test_they_give_what_the_twin_gives(
    sequences: list[tuple[int, int]], window: int | None, form: AttentionForm
) -> None:
    flash, infer = FlashAttention(), FlashInferAttention()
    for shape in ((4, 2, 64), (2, 2, 64)):
        for seed in range(2):
            Scene(sequences, shape, 256, torch.float16, seed).check(flash, window, form)
        for page_size in (1, 16):
            Scene(sequences, shape, page_size, torch.float16).check(infer, window, form)


def test_flashinfer_plans_once_for_layers_of_a_kind() -> None:
    scene, attention = Scene(STEPS["mixed"], (4, 2, 64), dtype=torch.float16), FlashInferAttention()
    for _ in range(2):
        step = attention.begin(scene.batch, scene.kv)
        for window in (None, 20, None, 20, None):
            step(LAYER, window, scene.query, scene.key, scene.value)
    assert sorted(wrapper.plans for wrapper in attention._wrappers.values()) == [2, 2, 2, 2]


PLAIN_HEADS = [Heads(8, 2, 128, 128)]
REFUSALS: list[tuple[str, dict[str, Any], str]] = [
    ("flashinfer", {"device": torch.device("cpu")}, "runs on CUDA alone, and the device is cpu"),
    ("flash_attention_2", {"device": torch.device("mps")}, "runs on CUDA alone, and the device is mps"),
    ("flashinfer", {"capability": (7, 5)}, "compute capability 8.0"),
    ("flashinfer", {"missing": True}, "flashinfer is not installed"),
    ("flash_attention_2", {"missing": True}, "flash_attn is not installed"),
    ("flashinfer", {"dtype": torch.float32}, "computes in float32"),
    ("flash_attention_2", {"page_size": 16}, "pages of 256 tokens, and PAGE_SIZE_TOKENS is 16"),
    ("flashinfer", {"layers": [Heads(8, 2, 96, 96)]}, "head sizes of 64, 128 and 256"),
    ("flash_attention_2", {"layers": [Heads(8, 2, 100, 100)]}, "multiples of 8, up to 256"),
    ("flash_attention_2", {"layers": [Heads(8, 2, 288, 288)]}, "multiples of 8, up to 256"),
    ("flashinfer", {"layers": [Heads(8, 2, 128, 64)]}, "values as wide as keys"),
    (
        "flash_attention_2",
        {"layers": [*PLAIN_HEADS, Heads(8, 2, 128, 128, AttentionForm(sinks=torch.zeros(8)))]},
        "no attention sinks",
    ),
]


@pytest.mark.parametrize(("name", "given", "reason"), REFUSALS)
def test_what_they_cannot_is_refused_with_the_reason(
    name: str, given: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    capability = given.pop("capability", (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    if given.pop("missing", False):
        monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    asked = {"layers": PLAIN_HEADS, "dtype": torch.bfloat16, "device": CUDA, "page_size": 256, "triton": True}
    with pytest.raises(InvalidValueError, match=reason) as caught:
        choose_attention(name, **(asked | given))
    assert caught.value.field == "ATTN_IMPL"


def test_where_they_can_they_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    for name, kind in (("flashinfer", FlashInferAttention), ("flash_attention_2", FlashAttention)):
        chosen = choose_attention(name, PLAIN_HEADS, torch.bfloat16, CUDA, 256, True)
        assert isinstance(chosen, kind) and chosen.name == name


def test_triton_is_the_default_on_cuda_for_heads_it_has() -> None:
    asked = (torch.bfloat16, CUDA, 16)
    for name in ("auto", "paged", "triton"):
        chosen = choose_attention(name, PLAIN_HEADS, *asked, True)
        assert getattr(chosen, "name", "") == "triton"
    assert choose_attention("auto", PLAIN_HEADS, *asked, False) is None
    wide = [*PLAIN_HEADS, Heads(8, 2, 576, 512)]
    assert choose_attention("auto", wide, *asked, True) is None
    with pytest.raises(InvalidValueError, match="at most 512 numbers"):
        choose_attention("triton", wide, *asked, True)


def test_importing_the_package_imports_none_of_them(tmp_path: Path) -> None:
    """Not on a CPU, whose users have none of them."""
    import subprocess

    code = (
        "import sys, mini_sglang.backend.loader, mini_sglang.backend.transformers_models.backend\n"
        "assert not {'flash_attn', 'flashinfer'} & set(sys.modules)\n"
        "assert not [name for name in sys.modules if name.endswith('_kernels') and 'triton' in name]\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
