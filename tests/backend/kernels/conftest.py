"""One library for all tests of this folder, built from the sources of the working tree."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from mini_sglang.backend.kernels.build import build_library
from mini_sglang.backend.kernels.library import NativeKernels
from tests.backend.kernels.twins import VARIANTS


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    return build_library(folder / "kernels", all_variants=True)


@pytest.fixture(scope="session", params=VARIANTS)
def kernels(library: Path, request: pytest.FixtureRequest) -> NativeKernels:
    """Every variant that this CPU can run, with two threads."""
    return NativeKernels(library, 2, request.param)
