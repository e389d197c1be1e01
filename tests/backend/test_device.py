"""Threads, memory and the size of the KV pool, on made-up /proc and cgroup trees."""

from __future__ import annotations

import os
from pathlib import Path

import psutil
import pytest
import torch

from mini_sglang.backend.device import (
    choose_device,
    choose_dtype,
    choose_threads,
    core_share,
    cpu_has_bf16,
    free_memory,
    keep_to_share,
)
from mini_sglang.backend.kv.pool import kv_pages_for
from mini_sglang.errors import InvalidValueError

CPU = torch.device("cpu")
MIB = 1 << 20


def test_shares_of_cores_keep_hyperthreads_and_sockets_together(tmp_path: Path) -> None:
    # Two sockets of two cores with two threads each, numbered as Linux does it.
    for cpu in range(8):
        topology = tmp_path / f"cpu{cpu}" / "topology"
        topology.mkdir(parents=True)
        (topology / "physical_package_id").write_text(f"{cpu // 2 % 2}\n")
        (topology / "core_id").write_text(f"{cpu % 2}\n")
    halves = [core_share(range(8), index, 2, tmp_path) for index in range(2)]
    assert [sorted(half) for half in halves] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [sorted(core_share(range(8), i, 4, tmp_path)) for i in range(4)] == [
        [0, 4],
        [1, 5],
        [2, 6],
        [3, 7],
    ]
    thirds = [core_share(range(8), index, 3, tmp_path) for index in range(3)]
    assert sorted(core for third in thirds for core in third) == list(range(8))
    assert core_share({3, 5}, 0, 2, tmp_path / "none") == [3] and core_share({3, 5}, 0, 3) == []


@pytest.mark.usefixtures("eight_cores")
def test_a_share_of_fewer_cores_than_threads_is_not_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[list[int]] = []
    monkeypatch.setattr(os, "sched_setaffinity", lambda pid, cores: kept.append(cores), raising=False)
    assert keep_to_share(1, 2, threads=4) == kept[0] and len(kept[0]) == 4
    assert keep_to_share(1, 2, threads=5) == keep_to_share(0, 9, threads=1) == [] and len(kept) == 1


class Machine:
    """A /proc and a cgroup tree under a folder."""

    def __init__(self, root: Path, cgroup: str) -> None:
        self.proc, self.cgroup_root = root / "proc", root / "cgroup"
        (self.proc / "self").mkdir(parents=True)
        (self.proc / "self" / "cgroup").write_text(cgroup)

    def write(self, path: str, text: str) -> None:
        file = self.cgroup_root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text + "\n")

    def threads(self) -> int:
        return choose_threads(0, self.proc, self.cgroup_root)

    def free(self) -> int:
        return free_memory(CPU, self.proc, self.cgroup_root)


@pytest.fixture
def eight_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


@pytest.mark.usefixtures("eight_cores")
def test_threads_follow_affinity_quota_and_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(tmp_path, "0::/outer/inner\n")
    assert machine.threads() == 8
    machine.write("outer/cpu.max", "300000 100000")
    machine.write("outer/inner/cpu.max", "max 100000")
    assert machine.threads() == 3
    machine.write("outer/inner/cpu.max", "50000 100000")
    assert machine.threads() == 1
    assert choose_threads(5, machine.proc, machine.cgroup_root) == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    assert choose_threads(0, tmp_path / "none", tmp_path / "none") == 2


@pytest.mark.usefixtures("eight_cores")
def test_version_1_quota_is_read_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "4:memory:/job\n3:cpu,cpuacct:/job\n")
    machine.write("cpu/job/cpu.cfs_quota_us", "400000")
    machine.write("cpu/job/cpu.cfs_period_us", "100000")
    assert machine.threads() == 4
    machine.write("cpu/job/cpu.cfs_quota_us", "-1")
    assert machine.threads() == 8


def test_the_cgroup_s_limit_bounds_the_free_memory(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/job\n")
    assert machine.free() > 0
    machine.write("job/memory.max", str(100 * MIB))
    machine.write("job/memory.current", str(70 * MIB))
    machine.write("job/memory.stat", f"anon 5\ninactive_file {20 * MIB}")
    assert machine.free() == 50 * MIB
    machine.write("memory.max", str(80 * MIB))
    machine.write("memory.current", str(75 * MIB))
    assert machine.free() == 5 * MIB
    machine.write("memory.max", "max")
    machine.write("job/memory.max", "max")
    assert machine.free() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_linux_tells_what_it_can_still_give(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "0::/\n")
    (machine.proc / "meminfo").write_text("MemTotal: 9000 kB\nMemFree: 10 kB\nMemAvailable:    5000 kB\n")
    assert machine.free() == 5000 * 1024
    # The whole machine's, by another reader of the same file.
    free = free_memory(torch.device("cpu"), cgroup_root=tmp_path / "none")
    assert free == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_version_1_memory_limit_is_read_too(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "9:memory:/job\n")
    machine.write("memory/job/memory.limit_in_bytes", str(100 * MIB))
    machine.write("memory/job/memory.usage_in_bytes", str(60 * MIB))
    assert machine.free() == 40 * MIB


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512_bf16 vnni", True),
        ("flags\t\t: fpu avx2", False),
        ("Features\t: fp asimd bf16", True),
        ("Features\t: fp asimd", False),
        ("", False),
    ],
)
def test_auto_dtype_on_a_cpu_depends_on_its_bf16(tmp_path: Path, line: str, expected: bool) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    assert cpu_has_bf16(tmp_path) is expected
    assert cpu_has_bf16(tmp_path / "none") is False
    assert choose_dtype("auto", CPU) is (torch.bfloat16 if cpu_has_bf16() else torch.float32)
    assert choose_dtype("bf16", CPU) is torch.bfloat16


def test_gpu_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda" == choose_device("cuda").type
    for has_bf16 in (True, False):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, has=has_bf16: has)
        expected = torch.bfloat16 if has_bf16 else torch.float16
        assert choose_dtype("auto", torch.device("cuda")) is expected
    with pytest.raises(InvalidValueError, match=r"MODEL_DTYPE is 'bf16'; .* this GPU has no bf16"):
        choose_dtype("bf16", torch.device("cuda"))
    monkeypatch.setattr(torch.backends.mps, "is_macos_or_newer", lambda major, minor: False)
    assert choose_dtype("auto", torch.device("mps")) is torch.float16
    with pytest.raises(InvalidValueError, match="macOS 14"):
        choose_dtype("bf16", torch.device("mps"))


def pages(
    budget: int = 0, page_size: int = 16, per_token: int = 1024, free: int = 1 << 30, device: str = "cpu"
) -> int:
    return kv_pages_for(
        token_budget=budget,
        page_size=page_size,
        bytes_per_token=per_token,
        free_bytes=free,
        context_length=8192,
        max_batch_size=64,
        device=torch.device(device),
    )


def test_the_pool_s_size() -> None:
    assert pages(100) == 6
    assert pages(2, page_size=1) == 2
    # 131,072 tokens are of use: 64 Ki and 1 Ki for each of 64 requests.
    assert pages(free=1 << 40) == 131_072 // 16
    assert pages(free=100 * MIB) == 40 * MIB // 1024 // 16
    assert pages(free=100 * MIB, device="mps") == 40 * MIB // 1024 // 16
    assert pages(free=100 * MIB, device="cuda") == 80 * MIB // 1024 // 16
    with pytest.raises(InvalidValueError, match="at least 2"):
        pages(1, page_size=1)
    with pytest.raises(InvalidValueError, match="at most 1048576"):
        pages(2_000_000)
    with pytest.raises(InvalidValueError, match="free memory is '0 MiB'"):
        pages(free=1000)
