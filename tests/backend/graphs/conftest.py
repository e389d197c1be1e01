"""Every model of these tests is loaded as if its device could record."""

from __future__ import annotations

import importlib.util
from functools import partial

import pytest
import torch
from torch import Tensor

from mini_sglang.backend import device_sampling, loader
from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.graphs import recorder as recorders
from mini_sglang.backend.kernels.triton import few_rows
from mini_sglang.backend.kernels.triton.launch import FewRowsLaunch
from mini_sglang.backend.kernels.triton.ranking import TritonRanking
from tests.backend.graphs.recorder import FaithfulRecorder

# Triton has no wheels but for Linux.
collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
if not collect_ignore_glob:
    from tests.backend.interpreting import hasten

    hasten()


@pytest.fixture(autouse=True)
def tiles_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a second to sort a thousand numbers, and as long for a small tile as for a large one."""
    small = partial(TritonRanking, number=64, room=256, peaks=128)
    monkeypatch.setattr(device_sampling, "TritonRanking", small)
    monkeypatch.setattr(few_rows, "few_rows_launch", lambda *sizes: FewRowsLaunch(64, 128, 4))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> FaithfulRecorder:
    """What models loaded from now on record with."""
    recorder = FaithfulRecorder()
    monkeypatch.setattr(recorders, "CudaRecorder", lambda device: recorder)
    cuda = torch.device("cuda")
    monkeypatch.setattr(
        loader, "choose_recorder", lambda settings, device: recorders.choose_recorder(settings, cuda)
    )
    return recorder


@pytest.fixture
def even_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have torch multiply row by row, so that a product's bits do not depend on how many rows there are."""
    linear = torch.nn.functional.linear

    def each(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not x.numel():
            return linear(x, weight, bias)
        rows = x.reshape(-1, 1, x.shape[-1]).unbind()
        return torch.cat([linear(row, weight, bias) for row in rows]).view(*x.shape[:-1], len(weight))

    monkeypatch.setattr(torch.nn.functional, "linear", each)


@pytest.fixture
def short_spans(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have Triton's attention split sequences of more than 16 positions, into four parts at most."""
    monkeypatch.setattr(TritonAttention.__init__, "__defaults__", (16, 4))
