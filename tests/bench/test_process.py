"""An engine's process: its time limit, and that nothing of it stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from mini_sglang.bench.process import PeerError, Process

FAKE = Path(__file__).parent / "fake_worker.py"
ROOT = Path(__file__).parents[2]


def started(**options: Any) -> Process:
    return Process(FAKE, sys.executable, options, seconds=120)


def test_a_time_limit_ends_the_process() -> None:
    process = started(do="hang")
    pid = process.usage.pid
    with pytest.raises(PeerError, match="within 1 s"):
        process.ask(1.0, ids=[[1]], new=1, cold=False)
    process.close()
    assert not psutil.pid_exists(pid)


def test_a_process_that_answers_in_time_goes_on() -> None:
    process = started()
    try:
        for _ in range(2):
            assert process.ask(60.0, ids=[[1]], new=2, cold=False)["ids"] == [[7, 7]]
            time.sleep(0.1)
    finally:
        process.close()


def test_a_child_that_outlives_the_process_does_not_keep_us_waiting() -> None:
    process = started(do="leave")
    group = process.usage.pid
    with pytest.raises(PeerError, match="within 5 s"):
        process.ask(5.0, ids=[[1]], new=1, cold=False)
    process.close()
    left = [one for one in psutil.process_iter() if _group(one) == group]
    # Its parent is gone, so nobody here can wait for it; it goes, or is a zombie until someone has.
    deadline = time.monotonic() + 30
    while any(_runs(one) for one in left) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(_runs(one) for one in left)


def test_close_ends_a_process_that_is_held() -> None:
    process = started()
    pid = process.usage.pid
    process.usage.hold()
    begun = time.monotonic()
    process.close()
    assert not psutil.pid_exists(pid)
    # It saw the end of its input, and was not ended for being late.
    assert time.monotonic() - begun < 15


@pytest.mark.parametrize("held", [False, True])
def test_a_process_ends_with_whom_it_works_for(held: bool) -> None:
    script = f"""
import sys, time
from pathlib import Path
from mini_sglang.bench.process import Process
process = Process(Path({str(FAKE)!r}), sys.executable, {{}})
if {held}:
    process.usage.hold()
print(process.usage.pid, flush=True)
time.sleep(600)
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    assert parent.stdout is not None
    worker = psutil.Process(int(parent.stdout.readline()))
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _runs(worker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(worker)


def test_usage_counts_what_a_process_works() -> None:
    process = started(spin=True)
    try:
        before = process.usage.cpu_seconds()
        time.sleep(1.0)
        process.usage.hold()
        held = process.usage.cpu_seconds()
        assert held > before
        time.sleep(0.5)
        assert process.usage.cpu_seconds() - held < 0.1
        process.usage.resume()
        assert process.usage.peak_bytes() > 1 << 20
    finally:
        process.close()
    assert process.usage.cpu_seconds() == 0 and process.usage.peak_bytes() == 0


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _group(process: psutil.Process) -> int | None:
    try:
        return os.getpgid(process.pid)
    except ProcessLookupError:
        return None
