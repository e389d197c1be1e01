"""docs/models.md says what the tests run."""

from __future__ import annotations

from pathlib import Path

from mini_sglang.backend.models.config import SUPPORTED_FAMILIES
from tests.backend.transformers_models.families import NATIVE, table

DOC = Path(__file__).parents[3] / "docs" / "models.md"


def test_the_list_of_models_is_that_of_the_tests() -> None:
    assert table() in DOC.read_text(encoding="utf-8")


def test_every_native_family_is_listed() -> None:
    assert sorted(model_type for _, model_type in NATIVE) == sorted(SUPPORTED_FAMILIES)
