"""F6: weights that lie, hubs that are down, disks that are full: one sentence, and an exit that is not 0."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from benchmarks.reliability.report import Row, Size
from benchmarks.reliability.server import ROOT, Server, tiny_folder

WITHIN = 30.0
"""Seconds within which a start that cannot succeed must have ended."""
FILE_BYTES = 16 << 10
"""Where a disk is to be full: the longest file that a process may write."""
WEIGHTS = "model.safetensors"
MODEL = "tiny/model"
COMMANDS = {
    "serve": ["serve", "--port", "0"],
    "generate": ["generate", "--max-new-tokens", "4", "Hello"],
}


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command did. ``left`` are temporary files it left behind."""

    status: int
    out: str
    said: str
    seconds: float
    left: list[str]

    def faults(self, word: str) -> list[str]:
        """What is wrong with it as an end that was due; ``word`` must be in its sentence."""
        errors = [line for line in self.said.splitlines() if line.startswith("mini-sglang: ")]
        found: list[str] = []
        if self.status != 2:
            found.append(f"status {self.status}")
        if len(errors) != 1 or word not in errors[0]:
            found.append(f"{len(errors)} sentences: {self.said[-300:]!r}")
        if "Traceback" in self.said or " ERROR " in self.said:
            found.append("more than the sentence")
        if self.out:
            found.append(f"{self.out[:80]!r} on standard output")
        if self.left:
            found.append(f"it leaves {self.left}")
        return found


def run(command: str, model: str, *, file_bytes: int = 0, **variables: str) -> Outcome:
    """Run a command that is expected to end by itself.

    Args:
        file_bytes: the longest file it may write; 0 is any.
    """
    from mini_sglang.config import setting_fields

    known = {name for spec in setting_fields() for name in spec.metadata["env"]}
    environment = {name: value for name, value in os.environ.items() if name not in known}
    chosen = {"NUM_THREADS": "1", "KV_TOKEN_BUDGET": "4096", "MODEL_DTYPE": "fp32", "PYTHONPATH": str(ROOT)}

    def limit() -> None:
        if file_bytes:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))

    with tempfile.TemporaryDirectory(prefix="reliability-") as temporary:
        started = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "mini_sglang", *COMMANDS[command], "--model", model],
            env=environment | chosen | variables | {"TMPDIR": temporary},
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=4 * WITHIN,
            preexec_fn=limit,
            check=False,
        )
        seconds = time.monotonic() - started
        return Outcome(done.returncode, done.stdout, done.stderr, seconds, _names(Path(temporary)))


def cut(name: str, keep: float) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return damage


def flip(place: int) -> Callable[[Path], None]:
    """Flip a bit of the header of the weights."""

    def damage(folder: Path) -> None:
        data = bytearray((folder / WEIGHTS).read_bytes())
        data[place] ^= 1
        (folder / WEIGHTS).write_bytes(data)

    return damage


def configure(**changes: object) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return damage


def index(shard: str) -> Callable[[Path], None]:
    """An index of which one weight is in the file ``shard``."""

    def damage(folder: Path) -> None:
        names = [name for name in _header(folder) if name != "__metadata__"]
        first = "model-00001-of-00002.safetensors"
        weights = dict.fromkeys(names, first) | {names[0]: shard}
        shutil.copy(folder / WEIGHTS, folder.parent / "outside.safetensors")
        (folder / WEIGHTS).rename(folder / first)
        (folder / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weights}))

    return damage


def not_a_number(folder: Path) -> None:
    """One weight of the first layer is NaN."""
    at = _header(folder)["model.layers.0.mlp.up_proj.weight"]["data_offsets"][0]
    data = bytearray((folder / WEIGHTS).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little") + at
    data[start : start + 4] = b"\0\0\xc0\x7f"
    (folder / WEIGHTS).write_bytes(data)


def _names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def _header(folder: Path) -> dict[str, dict[str, list[int]]]:
    data = (folder / WEIGHTS).read_bytes()
    header: dict[str, dict[str, list[int]]] = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return header


FOLDERS: Mapping[str, tuple[Callable[[Path], None], str]] = {
    "weights cut in half": (cut(WEIGHTS, 0.5), WEIGHTS),
    "weights cut in their header": (cut(WEIGHTS, 0.001), WEIGHTS),
    "a flipped bit in the header's length": (flip(5), WEIGHTS),
    "a flipped bit in the header": (flip(9), WEIGHTS),
    "weights of another shape": (configure(intermediate_size=128), "128"),
    "a weight that is NaN": (not_a_number, "not finite"),
    "a missing shard": (index("model-00002-of-00002.safetensors"), "model-00002-of-00002.safetensors"),
    "../ in a shard's name": (index("../outside.safetensors"), "../outside.safetensors"),
}


def folder_case(case: str, command: str, pristine: Path) -> tuple[Outcome, str]:
    """Run a command on a damaged folder; what it did, and the word its sentence must have."""
    damage, word = FOLDERS[case]
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name) / "model"
        shutil.copytree(pristine, folder)
        damage(folder)
        before = _names(folder)
        outcome = run(command, str(folder))
        if _names(folder) != before:
            outcome.left.append("another model folder than it found")
        return outcome, word


class Hubs:
    """Two hubs that have the model, and the caches of one client.

    ``state`` of ``run`` is how they are: "up", "refusing" (every request has status 503), "silent", "nobody"
    (the connection is refused), or a fault of ``FakeHub`` that the weights meet.
    """

    def __init__(self, folder: Path, caches: Path) -> None:
        self._files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self._caches = caches

    def run(self, command: str, state: str = "up", **more: int) -> Outcome:
        from tests.backend.loading.fake_hub import FakeHub, black_hole, nobody_home

        if state in ("silent", "nobody"):
            with (black_hole if state == "silent" else nobody_home)() as url:
                return run(command, MODEL, **self.variables(url), **more)
        with FakeHub({MODEL: self._files}) as hub:
            if state == "refusing":
                hub.status = 503
            elif state != "up":
                hub.faults[WEIGHTS] = state
            return run(command, MODEL, **self.variables(hub.url), **more)

    def variables(self, url: str) -> dict[str, str]:
        caches = {"HF_HOME": "hf", "MODELSCOPE_CACHE": "ms", "MINI_SGLANG_CACHE": "own"}
        variables = {name: str(self._caches / folder) for name, folder in caches.items()}
        return variables | {
            "HF_ENDPOINT": url,
            "MODELSCOPE_ENDPOINT": url,
            "NO_PROXY": "*",
            "DOWNLOAD_TIMEOUT": "5",
        }

    def cached(self) -> list[str]:
        """Files in the caches that are as long as weights, or parts of a download."""
        found = [path for path in self._caches.rglob("*") if path.is_file() and not path.is_symlink()]
        return [
            path.name for path in found if path.suffix == ".part" or path.stat().st_size > FILE_BYTES // 2
        ]


@contextmanager
def hubs(pristine: Path) -> Iterator[Hubs]:
    with tempfile.TemporaryDirectory(prefix="reliability-") as caches:
        yield Hubs(pristine, Path(caches))


def full_disk(command: str, pristine: Path) -> tuple[Outcome, str, list[str]]:
    """A limit on the length of a file stands in for a disk that is full: the same error of the same write."""
    with hubs(pristine) as world:
        return world.run(command, file_bytes=FILE_BYTES), "cannot be written", world.cached()


def read_only(command: str, pristine: Path) -> tuple[Outcome, str, list[str]]:
    """Files where the folders of the caches should be: root, too, can write nothing there."""
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        for folder in ("hf", "ms", "own"):
            (Path(name) / folder).write_text("in the way")
        world = Hubs(pristine, Path(name))
        return world.run(command), "cannot be written", world.cached()


def hub_down(command: str, pristine: Path, state: str, word: str) -> tuple[Outcome, str, list[str]]:
    with hubs(pristine) as world:
        return world.run(command, state), word, world.cached()


HUBS: Mapping[str, tuple[str, str]] = {
    "the hubs down": ("nobody", "cannot be reached"),
    "the hubs refusing": ("refusing", "503"),
    "the hubs silent": ("silent", "does not answer"),
    "weights flipped on their way": ("flipped", "checksum"),
}


def lying(size: Size) -> Row:
    """F6: every case with ``serve`` and with ``generate``; it has one size."""
    row = Row("F6", "files that lie, hubs and disks that fail")
    slowest = 0.0
    with tiny_folder() as pristine:
        for command in COMMANDS:
            cases: dict[str, tuple[Outcome, str, list[str]]] = {
                case: (*folder_case(case, command, pristine), []) for case in FOLDERS
            }
            for case, (state, word) in HUBS.items():
                cases[case] = hub_down(command, pristine, state, word)
            cases["a full disk"] = full_disk(command, pristine)
            cases["a cache that cannot be written"] = read_only(command, pristine)
            for case, (outcome, word, cached) in cases.items():
                bad = outcome.faults(word) + [f"it leaves {cached} in the cache"] * bool(cached)
                row.check(f"{command}, {case}: a sentence, status 2, nothing left", bad or "so", not bad)
                slowest = max(slowest, outcome.seconds)
        _from_the_cache(row, pristine)
    row.check(f"each within {WITHIN:g} s", f"{slowest:.1f} s", slowest < WITHIN, timed=True)
    return row


def _from_the_cache(row: Row, pristine: Path) -> None:
    """The hubs are down, and the model is there from before."""
    with hubs(pristine) as world:
        first = world.run("generate")
        row.check(
            "generate, the hubs up: an answer", first.said[-200:] if first.status else "so", first.status == 0
        )
        second = world.run("generate", "nobody")
        same = (second.status, second.out) == (0, first.out)
        row.check("generate, the hubs down, the model cached: the same answer", second.status, same)
        settings = {name.lower(): value for name, value in world.variables("http://127.0.0.1:9").items()}
        server = Server(Path(), world._caches / "log", model_local_dir="", model_name=MODEL, **settings)
        try:
            ready = server.wait_ready() is server
        finally:
            server.close()
        row.check("serve, the hubs down, the model cached: ready", ready, ready)
