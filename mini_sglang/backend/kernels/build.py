"""Compiling the C++ sources of this package at first use, and finding the result again.

The library has a generic variant in it and the best one for the CPU's instruction sets; which one runs is
chosen when it is opened, by what the CPU reports then.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
_FLAGS = (
    "-std=c++17",
    "-O2",
    "-fPIC",
    "-pthread",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-Wno-psabi",
    "-w",
)
_AVX2 = ("-mavx2", "-mfma", "-mf16c")
_AVX512 = (*_AVX2, "-mavx512f", "-mavx512vl", "-mavx512bw", "-mavx512dq", "-mavx512vnni")
_AVX2_FEATURES = frozenset({"avx2", "fma", "f16c"})
_AVX512_FEATURES = _AVX2_FEATURES | {"avx512f", "avx512vl", "avx512bw", "avx512dq", "avx512_vnni"}
# The instruction sets of variant.cpp, from the slowest to the fastest: flags of the compiler, and what Linux
# calls the features they need.
_VARIANTS: Mapping[str, tuple[Sequence[str], frozenset[str]]] = MappingProxyType(
    {
        "generic": ((), frozenset()),
        "avx2": (_AVX2, _AVX2_FEATURES),
        "avx512vnni": (_AVX512, _AVX512_FEATURES),
        "avx512bf16": ((*_AVX512, "-mavx512bf16"), _AVX512_FEATURES | {"avx512_bf16"}),
    }
)
_COMPILE_SECONDS = 300
_X86 = {"x86_64", "AMD64", "amd64"}


class BuildError(Exception):
    """The kernels cannot be had here; the message says why, for ``describe`` and the log."""


def build_library(
    cache: Path,
    notify: Callable[[str], None] | None = None,
    env: Mapping[str, str] = os.environ,
    *,
    all_variants: bool = False,
) -> Path:
    """The shared library for this machine, compiled unless ``cache`` has it.

    It is found by a hash of the sources, the compiler's path and version, the flags, the variants in it, and
    the CPU's features. Several processes may call this at once: one compiles, the others wait.

    Args:
        cache: a folder, made if it is not there.
        notify: called with a line for the user before compiling, which takes some seconds.
        env: ``CXX`` names the compiler; else ``c++``, ``g++`` or ``clang++`` of ``PATH``.
        all_variants: every variant that this CPU can run, not only the best and the generic one.

    Raises:
        BuildError: no compiler, a compiler that fails, or a folder that cannot be written.
    """
    compiler = _find_compiler(env)
    variants = _variants(all_variants)
    key = _key(compiler, variants)
    library = cache / f"kernels-{key}.so"
    try:
        if library.is_file():
            return library
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        with FileLock(cache / "build.lock", timeout=_COMPILE_SECONDS):
            if not library.is_file():
                name = Path(compiler[0]).name
                if notify is not None:
                    notify(f"Compiling the CPU kernels with {name}, once for this machine")
                _compile(compiler, library, variants)
    except Timeout:
        raise BuildError(f"another process holds {cache / 'build.lock'}") from None
    except OSError as error:
        raise BuildError(f"cannot build in {cache}: {error.strerror or error}") from None
    return library


def _find_compiler(env: Mapping[str, str]) -> list[str]:
    """The compiler's command, its first word an absolute path."""
    if named := env.get("CXX", "").strip():
        words = shlex.split(named)
        if found := shutil.which(words[0], path=env.get("PATH")):
            return [found, *words[1:]]
        raise BuildError(f"the C++ compiler of CXX, {named}, is not there")
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name, path=env.get("PATH")):
            return [found]
    raise BuildError("no C++ compiler found")


def _key(compiler: Sequence[str], variants: Mapping[str, Sequence[str]]) -> str:
    digest = hashlib.sha256()
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h")]):
        digest.update(f"{source.name}\0".encode() + source.read_bytes() + b"\0")
    version = _run([*compiler, "--version"])
    for part in (*compiler, version, *_FLAGS, repr(variants), *_cpu_features()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()[:20]


def _variants(all_variants: bool) -> dict[str, Sequence[str]]:
    """The variants to compile, and their flags; all of x86 where the CPU's features are unknown."""
    features = set(_cpu_features()[2:])
    runnable = {
        name: flags
        for name, (flags, needed) in _VARIANTS.items()
        if not needed or (platform.machine() in _X86 and (not features or needed <= features))
    }
    if all_variants or not features:
        return runnable
    return {name: runnable[name] for name in ("generic", [*runnable][-1])}


def _cpu_features(cpuinfo: Path = Path("/proc/cpuinfo")) -> list[str]:
    """What the first CPU says it can do; elsewhere than on Linux only its kind."""
    try:
        lines = cpuinfo.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.lower().startswith(("flags", "features"))), "")
    return [platform.machine(), platform.processor(), *sorted(flags.partition(":")[2].split())]


def _compile(compiler: Sequence[str], library: Path, variants: Mapping[str, Sequence[str]]) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as name:
        folder = Path(name)
        commands = [
            [*compiler, *_FLAGS, *flags, f"-DVARIANT={variant}", "-c", str(SOURCES / "variant.cpp"), "-o"]
            for variant, flags in variants.items()
        ]
        commands.append([*compiler, *_FLAGS, "-c", str(SOURCES / "api.cpp"), "-o"])
        objects = [str(folder / f"{number}.o") for number in range(len(commands))]
        _run_together([[*command, object] for command, object in zip(commands, objects, strict=True)])
        made = folder / library.name
        _run([*compiler, "-shared", "-pthread", *objects, "-o", str(made)])
        made.replace(library)


def _run(command: Sequence[str]) -> str:
    return _run_together([command])[0]


def _run_together(commands: Sequence[Sequence[str]]) -> list[str]:
    """Run compiler commands side by side; what each printed.

    Raises:
        BuildError: one of them failed.
    """
    running = [
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for command in commands
    ]
    try:
        outputs = [process.communicate(timeout=_COMPILE_SECONDS)[0] for process in running]
    except subprocess.TimeoutExpired:
        raise BuildError(f"the C++ compiler took over {_COMPILE_SECONDS} seconds") from None
    finally:
        for process in running:
            if process.poll() is None:
                process.kill()
                process.wait()
    for process, command, output in zip(running, commands, outputs, strict=True):
        if process.returncode:
            logger.warning("%s failed:\n%s", shlex.join(command), output[-2000:])
            raise BuildError(f"the C++ compiler {command[0]} failed; the log has its output")
    return outputs
