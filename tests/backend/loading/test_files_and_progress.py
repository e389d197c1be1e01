"""Which files make a model, and the bar that shows how they come."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest

from mini_sglang.backend.loading import files
from mini_sglang.backend.loading.progress import progress_bar, size_text
from mini_sglang.errors import ModelLoadError


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        ([], None),
        (["README.md", "a/b.Q4_K_M.gguf"], None),
        (["anything-at-all.gguf"], "anything-at-all.gguf"),
        (["m.IQ2_XS.gguf"], "m.IQ2_XS.gguf"),
        (["m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-Q2_K.gguf"], "m-Q4_K_M.gguf"),
        (["m.f16.gguf", "m.q5_0.gguf"], "m.q5_0.gguf"),
        (["m-BF16.gguf", "m-F16.gguf"], "m-BF16.gguf"),
        (["m-Q4_0_4_4.gguf", "m-Q4_0.gguf"], "m-Q4_0.gguf"),
        (["m-Q4_K_M-00001-of-00002.gguf", "m-Q4_K_M-00002-of-00002.gguf", "m-Q8_0.gguf"], "m-Q8_0.gguf"),
        (["mmproj-m-F16.gguf", "m-Q6_K.gguf"], "m-Q6_K.gguf"),
    ],
)
def test_choose_gguf(names: list[str], chosen: str | None) -> None:
    assert files.choose_gguf(names) == chosen


@pytest.mark.parametrize(
    "names", [["m-IQ1_S.gguf", "m-IQ2_S.gguf"], ["m-00001-of-00002.gguf", "m-00002-of-00002.gguf"]]
)
def test_choose_gguf_has_no_good_one(names: list[str]) -> None:
    with pytest.raises(ModelLoadError, match="gguf"):
        files.choose_gguf(names)


@pytest.mark.parametrize(
    "index",
    ["", "[]", "{}", '{"weight_map": {}}', '{"weight_map": []}', '{"weight_map": {"a": ["x"]}}', "[" * 10**5],
)
def test_broken_index(tmp_path: Path, index: str) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(index)
    with pytest.raises(ModelLoadError, match="weight index"):
        files.shard_names(path)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_bar_on_a_terminal_shows_size_and_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress_bar(10_000_000, "tiny/whole") as bar:
        bar.update(4_000_000)
        bar.update(6_000_000)
        bar.update(-1_000_000)
    assert "tiny/whole" in screen.getvalue() and "10.0M" in screen.getvalue()
    assert re.search(r"B/s", screen.getvalue())


def test_a_bar_counts_other_things_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    with progress_bar(1200, "Recording", unit="graph") as bar:
        bar.update(1200)
    assert "/1200 [" in screen.getvalue() and "graph/s" in screen.getvalue()


def test_no_bar_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    with progress_bar(10, "x") as bar:
        bar.update(10)
    assert pipe.getvalue() == ""


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "1 kB"), (98_362_432, "98.4 MB"), (999_600_000, "1 GB")],
)
def test_size_text(size: int, text: str) -> None:
    assert size_text(size) == text
