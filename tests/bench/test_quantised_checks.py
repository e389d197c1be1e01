"""The checks of quantised products that run on a card pass on a CPU, and find what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mini_sglang.backend.kernels.triton.block_weight import TritonWeight

pytest.importorskip("triton")

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))


@pytest.mark.parametrize("place", range(4))
def test_a_check_passes(place: int) -> None:
    from benchmarks.gpu.quantised_checks import QUANTISED

    assert QUANTISED[place][2](CPU, torch.float32, True) < 1e-4


def test_a_wrong_product_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu.quantised_checks import products

    own = TritonWeight.linear
    monkeypatch.setattr(TritonWeight, "linear", lambda weight, x, bias=None: own(weight, x, bias) + 0.01)
    assert products(CPU, torch.float32, True) > 1e-3
