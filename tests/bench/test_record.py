"""What every benchmark's JSON says of itself."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from datetime import datetime
from pathlib import Path

import pytest

from mini_sglang.bench.record import Record, read_record
from mini_sglang.errors import MiniSglangError

WRITER = """
import sys, time
from pathlib import Path
print(time.time())
time.sleep(2)
from mini_sglang.bench.record import Record
argv = ["/somewhere/else/__main__.py", "bench", "kernels", "--shape", "8 8"]
Record("kernels", {"rounds": 3}, argv=argv).write(Path(sys.argv[1]))
"""


def test_a_record_starts_with_its_process_and_says_how_to_run_it_again(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    before = time.time()
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path)], check=True, capture_output=True, text=True
    )
    found = read_record(path)
    started = datetime.fromisoformat(found["started"])
    assert started.tzinfo is not None
    # In whole seconds, and the system's clock of processes counts in hundredths.
    assert before - 2 < started.timestamp() < float(done.stdout) + 0.5
    assert found["command"] == "python -m mini_sglang bench kernels --shape '8 8'"
    assert (found["kind"], found["settings"]) == ("kernels", {"rounds": 3})


def test_a_command_is_named_without_the_folder_it_lies_in() -> None:
    record = Record("local", {}, argv=["/home/somebody/local_bench.py", "--peers", "all"])
    assert record.as_json()["command"] == "local_bench.py --peers all"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{}", json.dumps({"format": 2, "kind": "local"}), json.dumps({"format": 1, "kind": "x"})],
)
def test_what_is_no_record_is_refused_by_its_name(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(MiniSglangError, match=r"other\.json"):
        read_record(path)


def test_a_record_that_cannot_be_written_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(MiniSglangError, match="nowhere"):
        Record("serve", {}).write(tmp_path / "nowhere" / "serve.json")
