"""Fixtures: the two servers, started once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from tests.api.openai.harness import TEMPLATE, ScriptedEngine, Server, model_server, scripted_server
from tests.tiny_folders import tiny_folder


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tiny_folder(
        tmp_path_factory.mktemp("openai") / "tiny-chat", seed=3, max_position_embeddings=4096
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": TEMPLATE}))
    return folder


@pytest.fixture(scope="session")
def scripted(model_folder: Path) -> Iterator[tuple[Server, ScriptedEngine]]:
    with scripted_server(model_folder) as pair:
        yield pair


@pytest.fixture
def engine(scripted: tuple[Server, ScriptedEngine]) -> ScriptedEngine:
    scripted[1].say("Hello.")
    return scripted[1]


@pytest.fixture
def client(scripted: tuple[Server, ScriptedEngine]) -> OpenAI:
    return scripted[0].client


@pytest.fixture(scope="session")
def tiny(model_folder: Path) -> Iterator[Server]:
    with model_server(model_folder) as server:
        yield server
