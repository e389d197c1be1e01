"""Settings: one declaration each, checked once, never a silent fallback."""

from __future__ import annotations

from pathlib import Path

import pytest

from mini_sglang.config import DEFAULT_MODEL, Settings, default_text, setting_fields, settings_table
from mini_sglang.errors import InvalidValueError

README = Path(__file__).parent.parent / "README.md"


def test_defaults_need_no_environment() -> None:
    settings = Settings.resolve(env={})
    assert settings.model == DEFAULT_MODEL and settings.chosen == frozenset()
    assert all(getattr(settings, spec.name) == spec.default for spec in setting_fields())


def test_keyword_wins_over_variable_wins_over_default() -> None:
    env = {"PAGE_SIZE_TOKENS": "4", "PREFIX_CACHE": "off"}
    settings = Settings.resolve({"page_size_tokens": 8}, env)
    assert settings.page_size_tokens == 8 and settings.prefix_cache is False
    assert settings.chosen == {"page_size_tokens", "prefix_cache"}
    assert Settings.resolve({"page_size_tokens": None}, env).page_size_tokens == 4


def test_a_model_named_by_keyword_wins_over_a_local_folder_in_the_environment() -> None:
    env = {"MODEL_LOCAL_DIR": "/models/a", "MODEL_NAME": "b"}
    assert Settings.resolve({}, env).model_local_dir == Path("/models/a")
    settings = Settings.resolve({"model": "c"}, env)
    assert settings.model == "c" and settings.model_local_dir is None
    both = Settings.resolve({"model": "c", "model_local_dir": "d"}, env)
    assert both.model_local_dir == Path("d")


@pytest.mark.parametrize(
    ("value", "meant"), [(1, "1"), (False, "0"), ("yes", "1"), ("off", "0"), ("auto", "auto")]
)
def test_a_choice_of_0_and_1_takes_every_spelling_of_them(value: object, meant: str) -> None:
    assert Settings.resolve({"gguf_dequantize": value}, {}).gguf_dequantize == meant
    with pytest.raises(InvalidValueError):
        Settings.resolve({"gguf_dequantize": 2}, {})


@pytest.mark.parametrize("keyword", ["dtype", "model_dtype", "torch_dtype"])
def test_a_setting_answers_to_its_variables_in_lower_case(keyword: str) -> None:
    assert Settings.resolve({keyword: "float32"}, {}).dtype == "fp32"


@pytest.mark.parametrize("variable", ["MODEL_DTYPE", "TORCH_DTYPE"])
def test_both_names_of_a_variable_work(variable: str) -> None:
    assert Settings.resolve({}, {variable: "bf16"}).dtype == "bf16"


@pytest.mark.parametrize(
    "name, value",
    [
        ("PAGE_SIZE_TOKENS", "0"),
        ("PAGE_SIZE_TOKENS", "257"),
        ("PAGE_SIZE_TOKENS", "1.5"),
        ("PAGE_SIZE_TOKENS", "x"),
        ("PAGE_SIZE_TOKENS", "1" * 5000),
        ("PREFIX_CACHE", "2"),
        ("PREFIX_CACHE_POLICY", "fifo"),
        ("DOWNLOAD_TIMEOUT", "nan"),
        ("DOWNLOAD_TIMEOUT", "inf"),
        ("MODEL_DTYPE", "int3"),
        ("QUANTIZATION", "int3"),
        ("KV_TOKEN_BUDGET", "-1"),
    ],
)
def test_a_bad_value_names_the_variable_the_value_and_what_is_allowed(name: str, value: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        Settings.resolve({}, {name: value})
    message = str(caught.value)
    assert message.startswith(name) and value[:100] in message and "must be" in message
    assert len(message) < 500


@pytest.mark.parametrize(
    "overrides",
    [
        {"page_size_tokens": True},
        {"page_size_tokens": 1.5},
        {"page_size_tokens": float("nan")},
        {"page_size_tokens": [4]},
        {"prefix_cache": 3},
        {"dtype": 32},
        {"model": ""},
        {"page_sizes": 4},
        {"dtype": "fp32", "torch_dtype": "bf16"},
    ],
)
def test_a_bad_keyword_is_refused(overrides: dict[str, object]) -> None:
    with pytest.raises(InvalidValueError):
        Settings.resolve(overrides, {})


def test_settings_are_frozen() -> None:
    with pytest.raises(AttributeError):
        Settings.resolve({}, {}).page_size_tokens = 3  # type: ignore[misc]


def test_every_setting_has_help_a_section_and_its_own_variables() -> None:
    seen: set[str] = set()
    for spec in setting_fields():
        assert spec.metadata["help"] and spec.metadata["section"] and default_text(spec)
        for variable in spec.metadata["env"]:
            assert variable not in seen
            seen.add(variable)


def test_the_readme_has_the_generated_table() -> None:
    assert settings_table() in README.read_text(encoding="utf-8")
