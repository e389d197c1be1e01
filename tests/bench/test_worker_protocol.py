"""The worker's end and ours: ids with their times, and what a process and its children took."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from mini_sglang.bench.process import WORKERS, PeerError, Process

ENGINE = """
import subprocess, sys, time
from worker_protocol import Answer, Stream, serve

CHILD = '''
import time
block = bytearray(b"x" * (200 << 20))
end = time.process_time() + 0.5
while time.process_time() < end:
    pass
print("ready", flush=True)
time.sleep(600)
'''

class Engine:
    about = {"versions": {"fake": "1"}, "notes": []}

    def __init__(self, options):
        print("an engine may print what it likes")
        self.child = None

    def run(self, ids, new, cold):
        stream = Stream(len(ids))
        for step in range(new):
            for index, prompt in enumerate(ids):
                stream.add(index, [prompt[0] + step])
        return stream.answer()

    def work(self):
        self.child = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE)
        return self.child.stdout.readline().decode().strip()

    def end(self):
        self.child.kill()
        self.child.wait()

    def fail(self):
        raise ValueError("no such thing")

serve(Engine)
"""


@pytest.fixture
def protocol():
    spec = importlib.util.spec_from_file_location("worker_protocol", WORKERS / "worker_protocol.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["worker_protocol"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["worker_protocol"]


@pytest.fixture
def engine(tmp_path: Path):
    script = tmp_path / "run_fake.py"
    script.write_text(ENGINE)
    process = Process(script, sys.executable, {})
    yield process
    process.close()


def test_a_stream_times_each_id_from_its_own_start(protocol, monkeypatch):
    clock = iter([100.0, 101.0, 102.5, 103.0, 104.0])
    monkeypatch.setattr(protocol.time, "perf_counter", lambda: next(clock))
    stream = protocol.Stream(2)
    stream.add(1, [7])
    stream.add(0, [5, 6])
    stream.add(1, [8])
    answer = stream.answer()
    assert answer.ids == [[5, 6], [7, 8]]
    assert answer.times == [[2.5, 2.5], [1.0, 3.0]]
    assert (answer.seconds, answer.first, answer.firsts, answer.ends) == (4.0, 1.0, [2.5, 1.0], [2.5, 3.0])


def test_a_stream_without_ids_has_no_first(protocol):
    answer = protocol.Stream(1).answer()
    assert answer.ids == [[]] and answer.first is None and answer.times == [[]]


def test_ids_cross_with_a_time_for_each(engine):
    reply = engine.ask(ids=[[10], [20]], new=3, cold=True)
    assert reply["ids"] == [[10, 11, 12], [20, 21, 22]]
    assert [len(times) for times in reply["times"]] == [3, 3]
    for times in reply["times"]:
        assert times == sorted(times) and times[0] >= 0 and times[-1] <= reply["seconds"]


def test_children_count_while_they_run_and_after(engine):
    before = engine.about and engine.ask(ids=[[1]], new=1, cold=True)
    assert before["peak_bytes"] < 150 << 20
    running = engine.ask(do="work")
    assert running["answer"] == "ready"
    assert running["cpu_seconds"] >= 0.45
    assert running["peak_bytes"] >= before["peak_bytes"] + (200 << 20)
    ended = engine.ask(do="end")
    assert ended["cpu_seconds"] < 0.45, "what the child worked was counted before"


def test_a_failure_is_told_and_the_next_request_answered(engine):
    with pytest.raises(PeerError, match="fake: ValueError: no such thing"):
        engine.ask(do="fail")
    assert engine.ask(ids=[[1]], new=1, cold=True)["ids"] == [[1]]
