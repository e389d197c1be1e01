"""Building: found again, rebuilt when anything changes, one at a time, and a reason where it fails."""

from __future__ import annotations

import logging
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mini_sglang.backend.kernels import build
from mini_sglang.backend.kernels.build import BuildError, build_library
from mini_sglang.backend.kernels.library import NativeKernels, open_kernels
from mini_sglang.config import Settings
from tests.backend.kernels.twins import VARIANTS

CPU = torch.device("cpu")


def fake_compiler(folder: Path, script: str) -> Path:
    path = folder / "c++"
    path.write_text(f"#!{sys.executable}\n{script}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


# Prints its version and writes its last argument, noting every call.
RECORDER = """
import os, sys, pathlib
if "--version" in sys.argv:
    print(os.environ.get("FAKE_VERSION", "1"))
else:
    pathlib.Path(sys.argv[sys.argv.index("-o") + 1]).write_bytes(b"library")
    with open(pathlib.Path(__file__).with_name("calls"), "a") as calls:
        calls.write(" ".join(sys.argv[1:]) + "\\n")
"""


def links(folder: Path) -> int:
    calls = folder / "calls"
    return sum("-shared" in line for line in calls.read_text().splitlines()) if calls.exists() else 0


def compiled(folder: Path) -> set[str]:
    """The variants that the recorder was called for."""
    words = (folder / "calls").read_text().split()
    return {word.removeprefix("-DVARIANT=") for word in words if word.startswith("-DVARIANT=")}


AVX2, AVX512 = "avx2 f16c fma", "avx512bw avx512dq avx512f avx512vl"


@pytest.mark.parametrize(
    ("machine", "features", "best", "all_of_them"),
    [
        ("x86_64", "sse2", "generic", "generic"),
        ("x86_64", "avx2 fma", "generic", "generic"),
        ("x86_64", AVX2, "generic avx2", "generic avx2"),
        ("x86_64", f"{AVX2} {AVX512}", "generic avx2", "generic avx2"),
        ("x86_64", f"{AVX2} {AVX512} avx512_vnni", "generic avx512vnni", "generic avx2 avx512vnni"),
        (
            "x86_64",
            f"{AVX2} {AVX512} avx512_vnni avx512_bf16",
            "generic avx512bf16",
            "generic avx2 avx512vnni avx512bf16",
        ),
        ("x86_64", "", "generic avx2 avx512vnni avx512bf16", "generic avx2 avx512vnni avx512bf16"),
        ("aarch64", "asimd bf16 i8mm", "generic", "generic"),
        ("arm64", "", "generic", "generic"),
    ],
)
def test_which_variants_are_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, machine: str, features: str, best: str, all_of_them: str
) -> None:
    env = {"CXX": str(fake_compiler(tmp_path, RECORDER)), "PATH": ""}
    monkeypatch.setattr(build.platform, "machine", lambda: machine)
    monkeypatch.setattr(build, "_cpu_features", lambda: [machine, "", *features.split()])
    usual = build_library(tmp_path / "cache", None, env)
    assert compiled(tmp_path) == set(best.split())
    (tmp_path / "calls").unlink()
    whole = build_library(tmp_path / "cache", None, env, all_variants=True)
    if best == all_of_them:
        assert whole == usual and not (tmp_path / "calls").exists()
    else:
        assert whole != usual and compiled(tmp_path) == set(all_of_them.split())


def test_the_key_is_sources_compiler_version_and_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"CXX": str(fake_compiler(tmp_path, RECORDER)), "PATH": ""}
    lines: list[str] = []
    seen = {build_library(tmp_path / "cache", lines.append, env)}
    assert build_library(tmp_path / "cache", lines.append, env) in seen
    assert links(tmp_path) == 1 and len(lines) == 1 and "Compiling" in lines[0]
    assert compiled(tmp_path) == {"generic", VARIANTS[-1]}

    sources = tmp_path / "sources"
    shutil.copytree(build.SOURCES, sources)
    (sources / "pool.h").write_text((sources / "pool.h").read_text() + "\n// changed\n")
    changes = [
        lambda: monkeypatch.setattr(build, "SOURCES", sources),
        lambda: monkeypatch.setenv("FAKE_VERSION", "2"),
        lambda: monkeypatch.setattr(build, "_cpu_features", lambda: ["x86_64", "", "avx2", "another"]),
        lambda: monkeypatch.setattr(build, "_FLAGS", (*build._FLAGS, "-g")),
        lambda: env.update(CXX=env["CXX"] + " -DX"),
    ]
    for change in changes:
        change()
        path = build_library(tmp_path / "cache", None, env)
        assert path not in seen
        seen.add(path)
    assert links(tmp_path) == 1 + len(changes)
    left = {path.name for path in (tmp_path / "cache").iterdir()} - {"build.lock"}
    assert left == {path.name for path in seen}


@pytest.mark.parametrize("variant", build._VARIANTS)
def test_a_variant_runs_here_or_at_least_compiles(tmp_path: Path, library: Path, variant: str) -> None:
    if variant in VARIANTS:
        assert NativeKernels(library, 1, variant).variant == variant
    elif platform.machine() in build._X86:
        flags = build._VARIANTS[variant][0]
        build._run(
            [
                *build._find_compiler(os.environ),
                *(*build._FLAGS, *flags, f"-DVARIANT={variant}", "-c", str(build.SOURCES / "variant.cpp")),
                *("-o", str(tmp_path / "object.o")),
            ]
        )
        assert (tmp_path / "object.o").stat().st_size > 0


def test_two_processes_compile_once(tmp_path: Path) -> None:
    fake_compiler(tmp_path, RECORDER.replace("else:", "else:\n    import time; time.sleep(0.2)"))
    code = (
        "import sys, pathlib\n"
        "from mini_sglang.backend.kernels.build import build_library\n"
        "print(build_library(pathlib.Path(sys.argv[1]), None, {'CXX': sys.argv[2]}))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "cache"), str(tmp_path / "c++")]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    paths = {process.communicate(timeout=60)[0].strip() for process in both}
    assert [process.returncode for process in both] == [0, 0]
    assert len(paths) == 1 and Path(paths.pop()).is_file() and links(tmp_path) == 1


@pytest.mark.parametrize(
    ("script", "reason"),
    [(None, "no C++ compiler found"), ("raise SystemExit('boom')", "failed"), (RECORDER, "cannot load")],
)
def test_without_a_library_torch_does_the_work(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    script: str | None,
    reason: str,
) -> None:
    if script is not None:
        fake_compiler(tmp_path, script)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        kernels, used = open_kernels("auto", CPU, tmp_path / "cache", 1)
    assert kernels is None and used.startswith("torch: ") and reason in used
    assert reason in caplog.text and ("boom" in caplog.text or reason != "failed")


def test_a_named_compiler_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="CXX, no-such-compiler"):
        build_library(tmp_path, None, {"CXX": "no-such-compiler"})


def test_a_folder_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    env = {"CXX": str(fake_compiler(tmp_path, RECORDER))}
    with pytest.raises(BuildError, match="cannot build in"):
        build_library(tmp_path / "file" / "cache", None, env)


def test_reference_and_other_devices_build_nothing(tmp_path: Path) -> None:
    assert open_kernels("reference", CPU, tmp_path / "cache", 1) == (None, "torch: KERNELS=reference")
    kernels, used = open_kernels("auto", torch.device("meta"), tmp_path / "cache", 1)
    assert kernels is None and used == "torch: the device is meta"
    assert not (tmp_path / "cache").exists()


def test_the_best_variant_is_taken_and_one_that_is_not_there_is_refused(
    library: Path,
) -> None:
    usual = build_library(Settings.resolve().cache_path / "kernels")  # the one that engines take
    for path, present in ((library, VARIANTS), (usual, {"generic", VARIANTS[-1]})):
        assert NativeKernels(path, 1).variant == VARIANTS[-1]
        for variant in present:
            assert NativeKernels(path, 1, variant).variant == variant
        for variant in {*build._VARIANTS, "such-thing"} - set(present):
            with pytest.raises(BuildError, match=f"no {variant} kernels for this CPU"):
                NativeKernels(path, 1, variant)
