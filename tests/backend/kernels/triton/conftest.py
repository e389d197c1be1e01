"""Triton has no wheels but for Linux."""

import importlib.util
from functools import partial

import pytest

from mini_sglang.backend import device_sampling
from mini_sglang.backend.kernels.triton.ranking import TritonRanking

collect_ignore_glob = [] if importlib.util.find_spec("triton") else ["test_*.py"]
if not collect_ignore_glob:
    from tests.backend.interpreting import hasten

    hasten()


@pytest.fixture(autouse=True)
def few_are_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter takes a second to sort a thousand numbers; what is too few is looked at again."""
    small = partial(TritonRanking, number=8, room=64, peaks=32)
    monkeypatch.setattr(device_sampling, "TritonRanking", small)
