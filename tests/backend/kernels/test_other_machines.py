"""The kernels without Python: every variant, for aarch64 too where it can be compiled and emulated, and under
the compiler's sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mini_sglang.backend.kernels import build
from tests.backend.kernels.twins import VARIANTS

DRIVER = Path(__file__).with_name("driver.cpp")
Results = dict[str, bytes]


def compile_driver(
    folder: Path, variants: Sequence[str], compiler: Sequence[str], flags: Sequence[str] = ()
) -> Path:
    """The driver and some variants in one program."""
    common = [*compiler, *build._FLAGS, *flags, "-I", str(build.SOURCES), "-c"]
    commands = [
        [*common, *build._VARIANTS[variant][0], f"-DVARIANT={variant}", str(build.SOURCES / "variant.cpp")]
        for variant in variants
    ]
    commands += [[*common, str(source)] for source in (build.SOURCES / "api.cpp", DRIVER)]
    objects = [str(folder / f"{number}.o") for number in range(len(commands))]
    build._run_together([[*command, "-o", o] for command, o in zip(commands, objects, strict=True)])
    program = folder / "driver"
    build._run([*compiler, *build._FLAGS, *flags, *objects, "-o", str(program)])
    return program


def results(program: Sequence[str | Path], threads: int, variant: str) -> Results:
    """What the driver prints, by name."""
    done = subprocess.run([*program, str(threads), variant], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = (line.rsplit(" ", 1) for line in done.stdout.splitlines())
    return {name: bytes.fromhex(value) for name, value in lines}


@pytest.fixture(scope="module")
def native(library: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The driver on the library that all variants are in."""
    program = tmp_path_factory.mktemp("driver") / "driver"
    compiler = build._find_compiler(os.environ)
    rest = ["-pthread", "-I", str(build.SOURCES), str(DRIVER), str(library), f"-Wl,-rpath,{library.parent}"]
    subprocess.run([*compiler, *build._FLAGS, *rest, "-o", str(program)], check=True)
    return program


def assert_sound(found: Results) -> None:
    """The results are there, finite, and such as do not depend on the number of rows."""
    kept = {name: value for name, value in found.items() if name.startswith("unpacked")}
    assert len(kept) == 8 and set(kept.values()) == {b"\1"}
    numbers = {name: np.frombuffer(value, np.float32) for name, value in found.items() if name not in kept}
    for name, values in numbers.items():
        if name.split()[0] in ("packed", "pool"):
            continue
        assert len(values) > 30 and np.isfinite(values).all() and values.std() > 0.01
        if name.startswith("product"):
            whole = numbers[f"{name.rsplit(' ', 1)[0]} 21"]
            np.testing.assert_array_equal(values, whole[: len(values)])


def test_every_variant_gives_the_same_but_for_rounding(native: Path) -> None:
    generic = results([native], 1, "generic")
    assert_sound(generic)
    for variant in VARIANTS:
        found = results([native], 1, variant)
        for threads in (2, 3):
            assert results([native], threads, variant) == found
        assert_sound(found)
        for name, value in found.items():
            if name.startswith(("packed", "unpacked")):
                assert value == generic[name]
            elif not name.startswith("pool"):
                ours, plain = (np.frombuffer(x, np.float32) for x in (value, generic[name]))
                # x in bfloat16 has 8 bits; a last bit of a key or value may round the other way in the pool.
                # In a layer a number may be rounded to another step of 8 bits.
                near = name.startswith(("product BF16", "layer")) or "attention" in name
                rough = 2.0**-6 if near else 1e-4
                assert np.abs(ours - plain).max() <= rough * np.abs(plain).max()


def test_aarch64_gives_the_bits_of_the_generic_variant(native: Path, tmp_path: Path) -> None:
    """The generic variant neither contracts nor reorders, so that every IEEE machine gives its bits.

    Without a cross compiler and an emulator this machine's own is asked, with other optimisations.
    """
    expected = results([native], 2, "generic")
    cross = shutil.which("aarch64-linux-gnu-g++")
    emulator = shutil.which("qemu-aarch64") or shutil.which("qemu-aarch64-static")
    if cross:
        program = compile_driver(tmp_path, ["generic"], [cross], ["-static"])
        assert not emulator or results([emulator, program], 2, "generic") == expected
    program = compile_driver(tmp_path, ["generic"], build._find_compiler(os.environ), ["-O3"])
    assert results([program], 2, "generic") == expected


def test_nothing_is_read_or_written_out_of_bounds(native: Path, tmp_path: Path) -> None:
    compiler = build._find_compiler(os.environ)
    checks = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    (tmp_path / "probe.cpp").write_text("int main() {}")
    probe = [*compiler, *checks, str(tmp_path / "probe.cpp"), "-o", str(tmp_path / "probe")]
    if subprocess.run(probe).returncode:
        checks = ["-D_GLIBCXX_ASSERTIONS"]  # a compiler that came without the sanitizers
    variants = sorted({"generic", VARIANTS[-1]})
    program = compile_driver(tmp_path, variants, compiler, ["-O0", *checks])
    for variant in variants:
        for threads in (1, 3):
            assert results([program], threads, variant) == results([native], 1, variant)
