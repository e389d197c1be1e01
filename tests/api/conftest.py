"""A tiny model with a long context, and an in-process server over it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.serving import CONTEXT, Client, serving
from tests.tiny_folders import tiny_folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=CONTEXT)


@pytest.fixture(scope="session")
def client(tiny_model: Path) -> Iterator[Client]:
    with serving(tiny_model) as found:
        yield found
