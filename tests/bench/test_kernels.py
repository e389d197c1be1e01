"""What ``bench kernels`` times is what it says, and its figures fit together."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from mini_sglang.backend.kernels.build import build_library
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.bench import kernel_tasks, kernels
from mini_sglang.bench.kernel_tasks import FORMATS, Sizes, Task, all_tasks
from mini_sglang.bench.machine import Limits
from mini_sglang.bench.report.prepare import prepare
from mini_sglang.bench.report.reading import read_source

TINY = Sizes(
    matrix=(32, 256),
    product_rows=(1, 3),
    decode_rows=(1, 2),
    between_rows=(1, 5),
    heads=(4, 2, 16),
    context=40,
    chunk=20,
    hidden=32,
    pool_bytes=100_000,
)
LIMITS = Limits(bandwidth_gb_s=20.0, matrix_gflop_s=100.0, threads=1)
ITEM = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share
    return build_library(folder / "kernels", all_variants=True)


@pytest.fixture(scope="module")
def native(library: Path) -> NativeKernels:
    return NativeKernels(library, 1)


@pytest.fixture(scope="module")
def tasks(native: NativeKernels) -> list[Task]:
    return list(all_tasks(native, TINY))


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(kernels, "IDLE_SECONDS", 0.0)


@pytest.fixture
def command(library: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[object]]:
    """The command with limits that are given and a library that is built; what it asked for."""
    asked: list[object] = []
    monkeypatch.setattr(kernels, "measure_limits", lambda threads: asked.append(threads) or LIMITS)
    monkeypatch.setattr("mini_sglang.backend.kernels.build.build_library", lambda *a, **k: library)
    threads = torch.get_num_threads()
    yield asked
    torch.set_num_threads(threads)


def test_every_kernel_is_there(tasks: list[Task]) -> None:
    found = {(task.kernel, task.weights, task.rows) for task in tasks}
    assert len(found) == len(tasks)
    formats = [*(format.name for format in FORMATS), "float32", "bfloat16", "float16"]
    kv = ("float32", "bfloat16", "float16", "int8")
    expected = {("product", name, rows) for name in formats for rows in (1, 3)}
    expected |= {("attention, decode", name, rows) for name in kv for rows in (1, 2)}
    expected |= {("attention, prefill", name, 20) for name in kv}
    between = ("norm", "rotation and KV write", "SiLU and product")
    expected |= {(name, "float32", rows) for name in between for rows in (1, 5)}
    assert found == expected


def test_bytes_and_operations_are_those_of_the_work(tasks: list[Task]) -> None:
    blocks = {format.name: format.block_bytes / format.block_size for format in FORMATS}
    heads, kv_heads, head_dim = TINY.heads
    for task in tasks:
        rows = task.rows
        if task.kernel == "product":
            per_weight = blocks.get(task.weights) or ITEM[task.weights]
            assert task.bytes == 32 * 256 * per_weight and task.flop == 2 * 32 * 256 * rows
        elif task.kernel.startswith("attention"):
            scales = 2 * kv_heads * 4 if task.weights == "int8" else 0
            token = 2 * kv_heads * head_dim * ITEM[task.weights] + scales
            decode = task.kernel.endswith("decode")
            pairs = rows * 40 if decode else sum(range(1, rows + 1))
            assert task.context == (40 if decode else 20)
            assert task.bytes == (rows * 40 if decode else rows) * token
            # A product with each key, and one with each value.
            assert task.flop == pairs * heads * 2 * 2 * head_dim
        elif task.kernel == "norm":
            # Two read, two written, and the weights.
            assert (task.bytes, task.flop) == (4 * (4 * 32 * rows + 32), None)
        elif task.kernel == "rotation and KV write":
            read, turned, kept = heads + 2 * kv_heads, heads + kv_heads, 2 * kv_heads
            assert task.bytes == 4 * rows * head_dim * (read + turned + kept)
        else:
            assert task.bytes == 4 * rows * 4 * 32 * 3


def test_ours_and_torchs_do_the_same_work(native: NativeKernels) -> None:
    """To within the rounding of what they are given: activations to 8 bits, or to the KV's type."""
    compared = 0
    for task in all_tasks(native, TINY):
        if task.torchs is None:
            assert task.weights == "int8"
            continue
        # The next call may read another copy of the data.
        for _ in range(3):
            ours, torchs = task.ours(), task.torchs()
            if ours is None:
                continue
            assert isinstance(ours, torch.Tensor) and isinstance(torchs, torch.Tensor)
            assert ours.shape == torchs.shape and torchs.float().abs().max() > 0
            off = (ours.float() - torchs.float()).norm() / torchs.float().norm()
            assert off < (1e-5 if task.weights == "float32" else 2e-2), (task.kernel, task.weights)
            compared += 1
    assert compared > 50


def test_figures_fit_together(tasks: list[Task]) -> None:
    found = list(kernels.measure(tasks, LIMITS, rounds=3))
    assert len(found) == len(tasks)
    for task, (row, run) in zip(tasks, found, strict=True):
        assert len(run["seconds"]) >= 3 and row["seconds"] == statistics.median(run["seconds"]) > 0
        assert row["gb_s"] * 1e9 * row["seconds"] == pytest.approx(row["bytes"]) == task.bytes
        assert row["share"] == pytest.approx(row["gb_s"] / 20.0)
        assert run["others"] >= 0
        if task.flop is None:
            assert row["gflop_s"] is row["torch_gflop_s"] is None
        else:
            assert row["gflop_s"] * 1e9 * row["seconds"] == pytest.approx(task.flop)
        if task.torchs is None:
            assert row["torch_seconds"] is row["torch_gflop_s"] is run["torch_seconds"] is None
        else:
            assert row["torch_seconds"] == statistics.median(run["torch_seconds"])
        assert kernels.line(row).split()[0] == task.kernel.split()[0]


def test_figures_of_known_times() -> None:
    task = Task("product", "Q8_0", 4, bytes=2_000_000, flop=8_000_000, ours=int, torchs=int)
    assert kernels.figures(task, [3e-4, 1e-4, 2e-4], [4e-4, 8e-4], LIMITS) == pytest.approx(
        {
            "seconds": 2e-4,
            "torch_seconds": 6e-4,
            "bytes": 2_000_000,
            "gb_s": 10.0,
            "share": 0.5,
            "gflop_s": 40.0,
            "torch_gflop_s": 8e-3 / 6e-4,
        }
    )


def test_rounds_are_timed_after_a_call_that_is_not() -> None:
    calls = []
    assert len(kernels.timed(lambda: calls.append(1), 5)) == 5 and len(calls) == 6


def test_the_table_and_its_json(
    tmp_path: Path,
    tasks: list[Task],
    command: list[object],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(kernel_tasks, "all_tasks", lambda kernels, sizes: command.append(sizes) or tasks[:6])
    path = tmp_path / "kernels.json"
    arguments = ["--threads", "1", "--rounds", "2", "--shape", "64", "512", "--json", str(path)]
    assert kernels.main(arguments) == 0
    threads, sizes = command
    assert threads == 1 and isinstance(sizes, Sizes) and sizes.matrix == (64, 512)
    said = capsys.readouterr().out
    assert "20.0 GB/s read, 100 GFLOP/s" in said and said.count("product ") == 6
    record = json.loads(path.read_text())
    assert record["kind"] == "kernels" and len(record["rows"]) == len(record["runs"]) == 6
    assert record["limits"] == {"bandwidth_gb_s": 20.0, "matrix_gflop_s": 100.0, "threads": 1}
    assert record["settings"]["rounds"] == 2 and "torch" in record["versions"]
    (section,) = prepare([read_source(path)]).sections
    assert len(section.tables[0].rows) == 6 and section.charts


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--threads", "-1"], "--threads is -1; it must be an integer of at least 0."),
        (["--rounds", "0"], "--rounds is 0; it must be an integer of at least 1."),
        (["--shape", "32", "100"], "--shape is (32, 100); it must be"),
        (["--threads", "many"], "--threads"),
    ],
)
def test_bad_arguments_are_one_sentence(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and error.count("\n") == 1


def test_an_instruction_set_that_is_not_here_is_one_sentence(
    command: list[object], capsys: pytest.CaptureFixture[str]
) -> None:
    assert kernels.main(["--variant", "avx1024", "--threads", "1"]) == 2
    *_, said = capsys.readouterr().err.splitlines()
    assert said == "mini-sglang: The kernels cannot be timed: no avx1024 kernels for this CPU."
