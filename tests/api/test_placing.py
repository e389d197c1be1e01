"""Which engine runs on which GPUs, on machines made up; the GPUs themselves are not here."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest

from mini_sglang.api import starting
from mini_sglang.api.placing import Placement, place
from mini_sglang.api.starting import Model
from mini_sglang.backend.gpus import Need, ask_need, visible_gpus
from mini_sglang.backend.parallel.choice import size_that_fits
from mini_sglang.backend.parallel.need_main import need
from mini_sglang.config import Settings
from mini_sglang.errors import ModelLoadError
from tests.api.serving import settle

GIB = 1 << 30


def settings(**more: object) -> Settings:
    return Settings.resolve(more, {})


def placed(monkeypatch: pytest.MonkeyPatch, visible: str, need: Need, **more: object) -> Placement:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr("mini_sglang.api.placing.ask_need", lambda settings, path: need)
    return place(settings(**more), Path("model"))


def numbers(placement: Placement) -> tuple[int, int, int]:
    """Engines, ranks of each, and engines that share a group."""
    own = placement.settings
    return own.num_engines, own.tensor_parallel_size, placement.settings_of_engine().num_engines


def test_an_engine_for_each_gpu_or_group(monkeypatch: pytest.MonkeyPatch) -> None:
    four = placed(monkeypatch, "4,5,6,7", Need(gpus=4, size=1))
    assert four.groups == ("4", "5", "6", "7") and numbers(four) == (4, 1, 1)
    assert four.environment(2) == {"CUDA_VISIBLE_DEVICES": "6"}
    pairs = placed(monkeypatch, "4,5,6,7,8", Need(gpus=5, size=2))
    assert pairs.groups == ("4,5", "6,7") and numbers(pairs) == (2, 2, 1)
    more = placed(monkeypatch, "0,1", Need(gpus=2, size=1), num_engines=3)
    assert more.groups == ("0", "1") and numbers(more) == (3, 1, 2)
    assert more.environment(2) == {"CUDA_VISIBLE_DEVICES": "0"}


def test_enable_multi_device_0_keeps_to_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    one = placed(monkeypatch, "4,5", Need(gpus=2, size=1), enable_multi_device=False)
    assert one.groups == ("4",) and numbers(one) == (1, 1, 1)
    group = placed(monkeypatch, "0,1,2,3", Need(gpus=4, size=2), enable_multi_device=False, num_engines=2)
    assert group.groups == ("0,1",) and numbers(group) == (2, 2, 2)


def test_what_has_one_device_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    need = Need(gpus=4, size=1)
    for visible, more in (
        ("0", {}), ("", {}), ("0,1", {"device": "cpu"}), ("0,1", {"engine_isolation": "thread"}),
    ):  # fmt: skip
        placement = placed(monkeypatch, visible, need, **more)
        assert placement.groups == () and placement.environment(0) == {}
        assert placement.settings == placement.settings_of_engine() == settings(**more)
    # A driver is there, and a torch made for CPUs.
    assert placed(monkeypatch, "0,1", Need(gpus=0, size=1)).groups == ()


def test_visible_gpus_are_read_as_cuda_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-1a, 3,-1,2")
    assert visible_gpus() == ["GPU-1a", "3"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    monkeypatch.setattr("mini_sglang.backend.gpus._driver_count", lambda: 3)
    assert visible_gpus() == ["0", "1", "2"]


def test_a_model_takes_as_many_gpus_as_it_needs_to_fit() -> None:
    free = [80 * GIB, 80 * GIB, 40 * GIB, 80 * GIB]
    assert size_that_fits(60 * GIB, free, [1, 2, 4]) == 1
    assert size_that_fits(100 * GIB, free, [1, 2, 4]) == 2
    assert size_that_fits(140 * GIB, free, [1, 4]) == size_that_fits(1000 * GIB, free, [1, 2, 4, 8]) == 4
    assert size_that_fits(100 * GIB, free[:1], [1, 2]) == 1


def test_another_process_looks_at_the_model_and_the_gpus(tiny_model: Path) -> None:
    assert ask_need(settings(device="cpu"), tiny_model) == Need(gpus=0, size=1)
    # What that process does.
    assert need(tiny_model, settings(device="cpu", tensor_parallel_size=2)) == Need(gpus=0, size=2)
    with pytest.raises(ModelLoadError, match="TENSOR_PARALLEL_SIZE is 3; it must be 1, 2 or 4"):
        ask_need(settings(device="cpu", tensor_parallel_size=3), tiny_model)


def test_each_engines_process_finds_its_gpus_in_its_environment(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(
        model=str(tiny_model), device="cpu", dtype="fp32", kv_token_budget=512, num_engines=2, num_threads=1
    )
    monkeypatch.setattr(starting, "place", lambda settings, path: Placement(settings, ("6", "7")))
    pool = Model(given, lambda line: None).start_pool()
    try:
        settle(lambda: pool.state == "ready", "both engines")
        found = [
            process.environ().get("CUDA_VISIBLE_DEVICES")
            for process in psutil.Process().children()
            if "process_main" in " ".join(process.cmdline())
        ]
        assert sorted(map(str, found)) == ["6", "7"] and "CUDA_VISIBLE_DEVICES" not in os.environ
    finally:
        pool.close()
