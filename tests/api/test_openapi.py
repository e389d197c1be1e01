"""Generated requests against the document: nothing it does not tell of, and never a fault of the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from mini_sglang.api.openai.document import paths
from mini_sglang.api.openapi import document as openapi_document
from tests.api.serving import Server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]
OPERATIONS = [
    (path, method) for path, methods in openapi_document("0", paths())["paths"].items() for method in methods
]


@pytest.fixture(scope="module")
def document(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    log = tmp_path_factory.mktemp("log") / "log"
    server = Server(tiny_model, log, CONTEXT_LENGTH="48", KV_TOKEN_BUDGET="1024").wait_ready()
    yield schemathesis.openapi.from_url(f"http://127.0.0.1:{server.port}/openapi.json")
    server.close()
    assert "Traceback" not in server.said


@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE], ids=["fit", "misfit"])
@pytest.mark.parametrize("path, method", OPERATIONS)
def test_the_document_is_true(document: Any, path: str, method: str, mode: GenerationMode) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        return  # nothing that could be wrong

    @given(case=operation.as_strategy(generation_mode=mode))
    @settings(
        max_examples=25,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    def ask(case: Any) -> None:
        case.call_and_validate(checks=CHECKS)

    ask()
