"""Files lie: each case is one sentence on stderr and exit status 2, never a traceback."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mini_sglang.cli import main
from mini_sglang.logs import LOGGER_NAME
from tests.tiny_folders import tiny_folder


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("model"))


def edit_config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return edit


def truncate(name: str, keep: float) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return cut


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def index_of_a_missing_shard(folder: Path) -> None:
    weight_map = {"model.embed_tokens.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def only_pickles(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


CASES: dict[str, tuple[Callable[[Path], None], str]] = {
    "no weights": (remove("model.safetensors"), "safetensors"),
    "truncated weights": (truncate("model.safetensors", 0.5), "model.safetensors"),
    "truncated header": (truncate("model.safetensors", 0.001), "model.safetensors"),
    "missing shard": (index_of_a_missing_shard, "model-00002-of-00002.safetensors"),
    "pickles only": (only_pickles, "pickle"),
    "unknown architecture": (edit_config(model_type="mamba2", architectures=["Mamba2ForCausalLM"]), "amba2"),
    "wrong shape": (edit_config(intermediate_size=128), "128"),
    "senseless config": (edit_config(num_attention_heads="four"), "num_attention_heads"),
    "no config": (remove("config.json"), "config.json"),
    "broken config": (truncate("config.json", 0.5), "config.json"),
    "no tokenizer": (remove("tokenizer.json"), "tokenizer"),
    "broken tokenizer": (truncate("tokenizer.json", 0.5), "tokenizer.json"),
}


def run_cli(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mini_sglang", "generate", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture
def run_cli_here(capsys: pytest.CaptureFixture[str], past_set_aside: None) -> Iterator[Callable[..., Any]]:
    """``run_cli`` in this process, without a start that imports torch; what it raises fails the test."""

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        status = main(["generate", *arguments])
        return subprocess.CompletedProcess(arguments, status, *capsys.readouterr())

    logger = logging.getLogger(LOGGER_NAME)
    level, handlers, propagates = logger.level, logger.handlers[:], logger.propagate
    yield run
    logger.setLevel(level)
    logger.handlers[:], logger.propagate = handlers, propagates


def assert_one_sentence(result: subprocess.CompletedProcess[str], *words: str) -> None:
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    errors = [line for line in result.stderr.splitlines() if line.startswith("mini-sglang: ")]
    assert len(errors) == 1, result.stderr
    for word in words:
        assert word in errors[0]


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_folder(
    pristine: Path, tmp_path: Path, case: str, run_cli_here: Callable[..., Any]
) -> None:
    damage, word = CASES[case]
    folder = tmp_path / "model"
    shutil.copytree(pristine, folder)
    damage(folder)
    assert_one_sentence(run_cli_here("-m", str(folder), "--dtype", "fp32", "Hello"), word)


def test_a_gguf_cut_in_half_and_one_with_a_foreign_magic(starter_gguf: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.gguf"
    with starter_gguf.open("rb") as file:
        half.write_bytes(file.read(starter_gguf.stat().st_size // 2))
    assert_one_sentence(run_cli("-m", str(half), "Hello"), "half.gguf")
    foreign = tmp_path / "foreign.gguf"
    foreign.write_bytes(b"PK\x03\x04" + b"\0" * 4096)
    assert_one_sentence(run_cli("-m", str(foreign), "Hello"), "foreign.gguf")


def test_a_path_that_is_not_there(tmp_path: Path) -> None:
    assert_one_sentence(run_cli("-m", str(tmp_path / "nothing"), "Hello"), "nothing")


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["--temperature", "nan"], "temperature"),
        (["--max-new-tokens", "0"], "max_new_tokens"),
        (["--max-new-tokens", "-1"], "max_new_tokens"),
        (["--top-p", "7"], "top_p"),
        (["--page-size-tokens", "0"], "page_size_tokens"),
    ],
)
def test_bad_parameters_are_refused_before_the_model_is_loaded(arguments: list[str], word: str) -> None:
    assert_one_sentence(run_cli("-m", "/nowhere/at/all", *arguments, "Hello"), word)


def test_an_empty_prompt_and_one_that_is_too_long(pristine: Path) -> None:
    assert_one_sentence(run_cli("-m", str(pristine), "--raw", ""), "prompt")
    assert_one_sentence(run_cli("-m", str(pristine), "--raw", "word " * 1000), "512")


def test_the_pristine_folder_does_answer(pristine: Path) -> None:
    result = run_cli("-m", str(pristine), "--dtype", "fp32", "--max-new-tokens", "4", "Hello")
    assert result.returncode == 0 and "Traceback" not in result.stderr
