"""The starter model: out of a wheel that pip brings, checked, once, and with a sentence where it fails."""

from __future__ import annotations

import hashlib
import os
import sys
import threading
import time
import zipfile
from collections.abc import Sequence
from pathlib import Path

import pytest

from mini_sglang.backend.loading import starter as module
from mini_sglang.backend.loading.starter import Starter, starter_model
from mini_sglang.errors import ModelNotFoundError

CONTENT = b"GGUF" + bytes(range(256)) * 400
STARTER = Starter(
    name="Tiny",
    package="tiny-starter",
    version="1.2",
    file_name="tiny.gguf",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)
NOBODY = ("no-such-program-anywhere",)


def make_wheel(
    folder: Path, content: bytes = CONTENT, members: Sequence[str] = ("tiny_starter/tiny.gguf",)
) -> Path:
    folder.mkdir(exist_ok=True)
    wheel = folder / "tiny_starter-1.2-py3-none-any.whl"
    info = "tiny_starter-1.2.dist-info"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for member in members:
            archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-starter\nVersion: 1.2\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return wheel


def fake_pip(tmp_path: Path, wheel: Path | None, body: str = "") -> tuple[str, ...]:
    """A program that stands for pip: it notes that it ran, and copies ``wheel`` to where --dest says."""
    script = tmp_path / "fake_pip.py"
    script.write_text(
        "import os, shutil, sys, time\n"
        f"open({str(tmp_path / 'runs')!r}, 'a').write(f'{{os.getpid()}}\\n')\n"
        f"{body}\n"
        f"wheel = {str(wheel or '')!r}\n"
        "if wheel: shutil.copy(wheel, sys.argv[sys.argv.index('--dest') + 1])\n"
    )
    return (sys.executable, str(script))


def get(cache: Path, pip: Sequence[str] | None = None, timeout: float = 30.0) -> Path:
    options = {} if pip is None else {"pip": pip}
    return starter_model(cache, lambda line: None, timeout, starter=STARTER, **options)


def fails(cache: Path, pip: Sequence[str] | None = None, timeout: float = 30.0) -> str:
    with pytest.raises(ModelNotFoundError) as caught:
        get(cache, pip, timeout)
    if cache.is_dir():
        assert {path.name for path in cache.iterdir()} <= {"starter.lock"}
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip sees this folder of wheels and nothing else."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "links"))
    (tmp_path / "links").mkdir()
    return tmp_path / "links"


def test_real_pip_brings_it_and_later_calls_need_none(tmp_path: Path, links: Path) -> None:
    make_wheel(links)
    cache = tmp_path / "new" / "cache"
    path = get(cache)
    assert path == cache / "tiny.gguf" and path.read_bytes() == CONTENT
    assert {entry.name for entry in cache.iterdir()} == {"tiny.gguf", "starter.lock"}
    assert get(cache, NOBODY) == path


def test_real_pip_that_finds_nothing(tmp_path: Path, links: Path) -> None:
    assert "pip cannot download it (Could not find a version" in fails(tmp_path / "cache")


def test_python_without_pip(tmp_path: Path) -> None:
    assert "has no pip" in fails(tmp_path / "cache", (sys.executable, "-I", "-S", "-m", "pip"))
    assert "pip cannot be started" in fails(tmp_path / "cache", NOBODY)


@pytest.mark.parametrize("cut", [0, 100, 700, -30])
def test_damaged_wheel(tmp_path: Path, cut: int) -> None:
    wheel = make_wheel(tmp_path / "links")
    wheel.write_bytes(wheel.read_bytes()[:cut])
    assert "is damaged" in fails(tmp_path / "cache", fake_pip(tmp_path, wheel))


def test_wheel_with_a_flipped_bit(tmp_path: Path) -> None:
    wheel = make_wheel(tmp_path / "links")
    content = bytearray(wheel.read_bytes())
    content[200] ^= 4
    wheel.write_bytes(content)
    assert "is damaged" in fails(tmp_path / "cache", fake_pip(tmp_path, wheel))


@pytest.mark.parametrize(
    ("content", "members", "says"),
    [
        (CONTENT[:-1] + b"x", ("tiny_starter/tiny.gguf",), "another SHA-256"),
        (CONTENT + b"x", ("tiny_starter/tiny.gguf",), "does not hold"),
        (CONTENT, ("tiny_starter/other.gguf",), "does not hold"),
        (CONTENT, ("a/tiny.gguf", "b/tiny.gguf"), "does not hold"),
    ],
)
def test_wheel_with_something_else(tmp_path: Path, content: bytes, members: Sequence[str], says: str) -> None:
    wheel = make_wheel(tmp_path / "links", content, members)
    assert says in fails(tmp_path / "cache", fake_pip(tmp_path, wheel))


def test_pip_that_fails_or_brings_nothing(tmp_path: Path) -> None:
    assert "no wheel of tiny-starter" in fails(tmp_path / "cache", fake_pip(tmp_path, None))
    body = "print('ERROR: the moon is full.', file=sys.stderr); sys.exit(3)"
    assert "(the moon is full)" in fails(tmp_path / "cache", fake_pip(tmp_path, None, body))
    assert "(status 4)" in fails(tmp_path / "cache", fake_pip(tmp_path, None, "sys.exit(4)"))


def test_pip_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 3.0)
    message = fails(tmp_path / "cache", fake_pip(tmp_path, None, "time.sleep(3600)"), timeout=1.0)
    assert "downloads nothing of tiny-starter any more" in message
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "runs").read_text()), 0)


def test_a_download_that_grows_is_not_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_GRACE_SECONDS", 0.0)
    grow = (
        "for _ in range(7):\n"
        "    open(os.path.join(os.environ['TMPDIR'], 'x'), 'ab').write(b'x' * 1000)\n"
        "    time.sleep(0.5)"
    )
    wheel = make_wheel(tmp_path / "links")
    assert get(tmp_path / "cache", fake_pip(tmp_path, wheel, grow), timeout=2.5).read_bytes() == CONTENT


def test_half_a_file_is_not_taken_for_whole(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    (cache / "tiny.gguf").write_bytes(CONTENT[:-1])
    (cache / ".starter-killed").mkdir()
    (cache / ".starter-killed" / "half.whl").write_bytes(b"half")
    pip = fake_pip(tmp_path, make_wheel(tmp_path / "links"))
    assert get(cache, pip).read_bytes() == CONTENT
    assert not (cache / ".starter-killed").exists()


def test_several_at_once_download_once(tmp_path: Path) -> None:
    pip = fake_pip(tmp_path, make_wheel(tmp_path / "links"), "time.sleep(0.3)")
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(get(tmp_path / "c", pip))) for _ in range(4)]
    for thread in threads:
        thread.start()
        time.sleep(0.01)
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "c" / "tiny.gguf"] * 4
    assert len((tmp_path / "runs").read_text().split()) == 1


def test_cache_that_cannot_be_written_or_is_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    pip = fake_pip(tmp_path, make_wheel(tmp_path / "links"))
    assert "cannot be kept at" in fails(tmp_path / "file" / "cache", pip)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    assert "where 1 kB are free" in fails(tmp_path / "cache", pip)


def test_the_real_one_is_what_the_package_carries(starter_gguf: Path) -> None:
    """The constants are those of the file that the package index gives."""
    assert starter_gguf.stat().st_size == module.STARTER.size
    assert hashlib.sha256(starter_gguf.read_bytes()).hexdigest() == module.STARTER.sha256
