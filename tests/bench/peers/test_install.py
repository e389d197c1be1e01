"""An environment is made whole or not at all, whatever pip, the disk and the user do in between."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mini_sglang.bench.peers import install as install_module
from mini_sglang.bench.peers.base import Peer, Recipe
from mini_sglang.bench.peers.install import Install, locked, reason_of
from mini_sglang.bench.peers.registry import MARK, environment, interpreter, mark_of, version
from mini_sglang.bench.process import PeerError

FAKE_PIP = """
import sys, time
print("Collecting everything")
{}
"""


@pytest.fixture
def fake_pip(tmp_path):
    """A command in pip's place that runs a line of Python."""

    def make(line: str) -> tuple[str, str]:
        script = tmp_path / f"pip{len(list(tmp_path.glob('pip*')))}.py"
        script.write_text(FAKE_PIP.format(line))
        return (sys.executable, str(script))

    return make


def test_real_pip_makes_an_environment_apart_from_this_one(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": "import helper\n"}, needs=("helper",))
    make_wheel("helper", "3", {"helper.py": ""})
    peer = tiny()
    said, shown = [], []
    assert Install(peer, say=said.append, show=shown.append).run() is True

    python = interpreter(peer)
    assert Path(python).is_relative_to(environment(peer))
    assert version(peer) == "1.2"
    mark = mark_of(peer)
    assert mark["packages"] == {"helper": "3", "tiny": "1.2"}
    script = "import tiny, importlib.util as u; print(u.find_spec('torch'), u.find_spec('mini_sglang'))"
    done = subprocess.run([python, "-I", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["None", "None"]
    assert any("1 of 1: pip install" in line for line in said)
    assert any("helper" in line for line in shown)
    with pytest.raises(ModuleNotFoundError):
        __import__("tiny")


def test_what_is_there_is_left_as_it_is_unless_asked_or_the_recipe_changed(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": ""})
    peer = tiny()
    Install(peer).run()
    witness = environment(peer) / "witness"
    witness.touch()

    assert Install(peer, pip=("/nowhere/pip",)).run() is False
    assert witness.exists()

    make_wheel("tiny", "1.3", {"tiny.py": ""})
    assert Install(peer).run(again=True) is True
    assert not witness.exists() and version(peer) == "1.3"

    witness.touch()
    changed = tiny(steps=(*peer.recipe.steps, peer.recipe.steps[0]))
    assert Install(changed).run() is True
    assert not witness.exists()


def test_a_failing_pip_leaves_nothing_and_its_reason(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": ""}, needs=("nobody-has-this>=4",))
    peer = tiny()
    with pytest.raises(
        PeerError, match=r"^tiny: pip install --no-index .* failed with status 1: ERROR: "
    ) as said:
        Install(peer).run()
    assert "nobody-has-this>=4" in str(said.value)
    assert not environment(peer).exists()
    log = environment(peer).with_name("tiny.log")
    assert str(log) in str(said.value) and "nobody-has-this" in log.read_text()
    with pytest.raises(PeerError, match="tiny is not installed: mini-sglang bench install tiny"):
        interpreter(peer)


def test_packages_that_cannot_be_imported_are_no_environment(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": "raise ImportError('the CPU is too old')"})
    with pytest.raises(PeerError, match=r"import tiny failed with status 1: ImportError: the CPU is too old"):
        Install(tiny()).run()
    assert mark_of(tiny()) is None and not environment(tiny()).exists()


def test_ctrl_c_stops_pip_and_leaves_nothing(tiny, fake_pip):
    peer = tiny()
    pip = fake_pip("time.sleep(600)")

    def interrupt(line: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Install(peer, pip=pip, show=interrupt).run()
    assert not environment(peer).exists()
    assert [word for word in commands() if pip[1] in word] == []
    with locked(environment(peer).with_name("tiny.lock"), "tiny"):
        pass


KILLED = """
import sys
from mini_sglang.bench.peers.base import Peer, Recipe
from mini_sglang.bench.peers.install import Install
peer = Peer("tiny", "Tiny", "tiny", "gguf", recipe=Recipe((("tiny",),), disk_gb=0.01))
Install(peer, pip=(sys.executable, sys.argv[1]), show=lambda line: print(line, flush=True)).run()
"""


def test_a_killed_install_is_begun_anew_once_its_pip_has_ended(tiny, make_wheel, fake_pip, tmp_path):
    release = tmp_path / "release"
    pip = fake_pip(f"import pathlib\nwhile not pathlib.Path({str(release)!r}).exists(): time.sleep(0.02)")
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, pip[1]],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])},
    )
    assert "Collecting everything" in process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()

    make_wheel("tiny", "1.2", {"tiny.py": ""})
    peer = tiny()
    half = environment(peer)
    assert half.exists() and mark_of(peer) is None
    with pytest.raises(PeerError, match="not installed"):
        interpreter(peer)
    (half / "half").touch()
    # Its pip lives on and may still write there.
    with pytest.raises(PeerError, match=r"tiny is being installed by another process\."):
        Install(peer).run()
    release.touch()
    while True:
        try:
            made = Install(peer).run()
            break
        except PeerError as error:
            assert "another process" in str(error)
            time.sleep(0.05)
    assert made and not (half / "half").exists() and version(peer) == "1.2"


def test_an_environment_without_its_mark_is_not_used(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": ""})
    peer = tiny()
    Install(peer).run()
    (environment(peer) / MARK).unlink()
    with pytest.raises(PeerError, match="not installed"):
        interpreter(peer)
    assert version(peer) is None
    assert Install(peer).run() is True


def test_the_mark_comes_after_everything_else(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": "import mended\n"})
    seen = []

    def finish(packages: Path) -> list[str]:
        seen.append(mark_of(peer))
        (packages / "mended.py").touch()
        return ["mended"]

    peer = tiny(finish=finish)
    said = []
    Install(peer, say=said.append).run()
    assert seen == [None] and "tiny: mended" in said and mark_of(peer)


def test_a_finish_that_finds_another_layout_is_a_sentence(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": ""})
    peer = tiny(finish=lambda packages: [(packages / "missing").read_text()])
    with pytest.raises(PeerError, match=r"tiny: what pip left could not be mended: .*missing"):
        Install(peer).run()
    assert not environment(peer).exists()


def test_a_full_disk_is_told_before_anything_is_fetched(tiny, monkeypatch):
    monkeypatch.setattr(
        install_module.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 3 * 10**8)
    )
    with pytest.raises(
        PeerError, match=r"tiny takes 5 GB on disk, and .* has 0\.3 GB left; MINI_SGLANG_CACHE"
    ):
        Install(tiny(disk_gb=5.0), pip=("/nowhere/pip",)).run()


def test_a_python_without_wheels_is_told_before_anything_is_fetched(tiny, tmp_path):
    minor = sys.version_info.minor
    with pytest.raises(
        PeerError, match=rf"tiny is installed with Python 3\.7 to 3\.8, .* is 3\.{minor}; --python"
    ):
        Install(tiny(python=(7, 8)), pip=("/nowhere/pip",)).run()
    missing = str(tmp_path / "python9")
    with pytest.raises(PeerError, match=r"python9' cannot be run as a Python interpreter"):
        Install(tiny(), python=missing).run()


def test_what_cannot_be_installed_says_why(tiny):
    with pytest.raises(PeerError, match="nothing to install"):
        Install(Peer("far", "Far", None, "gguf"))
    peer = tiny()
    away = Peer("tiny", "Tiny", "tiny", "gguf", recipe=peer.recipe, runs_here=lambda: "wrong planet.")
    with pytest.raises(PeerError, match=r"tiny cannot run here: wrong planet\."):
        Install(away)


def test_pip_is_kept_from_this_process_packages(tiny, fake_pip, monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("PIP_USER", "1")
    out = tmp_path / "seen.json"
    pip = fake_pip(f"import json, os\njson.dump([dict(os.environ), sys.argv], open({str(out)!r}, 'w'))")
    Install(tiny(module=""), pip=pip).run()
    variables, argv = json.loads(out.read_text())
    assert "PYTHONPATH" not in variables and variables["PIP_USER"] == "0"
    assert argv[1] == "--python" and Path(argv[2]).is_relative_to(environment(tiny()))
    assert argv[3] == "install" and argv[-1] == "tiny"


def test_the_reason_is_the_last_error_or_the_last_line():
    assert reason_of(["ERROR: first", "ERROR: second", "[notice] an update"]) == "ERROR: second"
    assert reason_of(["Collecting x", "Killed"]) == "Killed"
    assert reason_of([]) == "it said nothing"


def test_a_shared_environment_is_made_once(tiny, make_wheel):
    make_wheel("tiny", "1.2", {"tiny.py": ""})
    one = tiny()
    other = Peer("tiny-too", "Tiny too", "tiny", "gguf", recipe=one.recipe, environment="tiny")
    Install(one).run()
    assert interpreter(other) == interpreter(one)
    assert Install(other, pip=("/nowhere/pip",)).run() is False


def test_recipes_are_told_apart_by_what_is_done_after_pip():
    def mend(packages: Path) -> list[str]:
        return []

    plain, mended = Recipe((("x",),)), Recipe((("x",),), finish=mend)
    assert install_module.recipe_digest(plain) == install_module.recipe_digest(Recipe((("x",),)))
    assert install_module.recipe_digest(plain) != install_module.recipe_digest(mended)
    assert install_module.recipe_digest(plain) != install_module.recipe_digest(Recipe((("x",), ("y",))))


def commands() -> list[str]:
    """The command lines of every process."""
    lines = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(entry.read_text().replace("\0", " "))
        except OSError:
            continue
    return lines
