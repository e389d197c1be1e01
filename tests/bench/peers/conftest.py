"""A cache folder of its own for each test, and wheels made on the spot: nothing comes from a network."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from mini_sglang.bench.peers.base import Peer, Recipe
from mini_sglang.config import Settings

MakeWheel = Callable[..., Path]


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    monkeypatch.setenv("MINI_SGLANG_CACHE", str(tmp_path / "cache"))
    for name in ("SGLANG", "HF", "HF_BATCHING", "VLLM", "LLAMA", "TINY"):
        monkeypatch.delenv(f"BENCH_{name}_PYTHON", raising=False)
    return Settings.resolve()


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A folder that ``pip --find-links`` can install from."""
    folder = tmp_path / "index"
    folder.mkdir()
    return folder


@pytest.fixture
def make_wheel(index: Path) -> MakeWheel:
    """Put a wheel into the index: ``make_wheel("tiny", "1.2", {"tiny.py": "x = 1"}, needs=["other"])``."""

    def make(name: str, version: str, files: dict[str, str], needs: tuple[str, ...] = ()) -> Path:
        info = f"{name}-{version}.dist-info"
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        metadata += "".join(f"Requires-Dist: {need}\n" for need in needs)
        files = {
            **files,
            f"{info}/METADATA": metadata + "\nA text: with a colon.\n",
            f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        }
        record = "".join(f"{path},sha256={digest(text)},{len(text)}\n" for path, text in files.items())
        files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
        wheel = index / f"{name}-{version}-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for path, text in files.items():
                archive.writestr(path, text)
        return wheel

    return make


@pytest.fixture
def tiny(index: Path) -> Callable[..., Peer]:
    """A peer whose recipe installs the wheel ``tiny`` from the index."""

    def make(name: str = "tiny", **fields: object) -> Peer:
        step = ("--no-index", "--find-links", str(index), "tiny")
        recipe = Recipe(**{"steps": (step,), "module": "tiny", "disk_gb": 0.01, **fields})  # type: ignore[arg-type]
        return Peer(name, "Tiny", "tiny", "gguf", recipe=recipe)

    return make


def digest(text: str) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
