"""A saved prefix cache: what comes back, and files that are refused and change nothing."""

from __future__ import annotations

import json
import random
import stat
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from mini_sglang.engine.cache_file import CacheFile
from mini_sglang.errors import CacheFileError, InvalidValueError
from mini_sglang.types import SamplingParams

from .fake_backend import Driver, FakeBackend, make_core, reference

ONE = SamplingParams(max_new_tokens=1)
GREEDY = SamplingParams(max_new_tokens=6, ignore_eos=True)
PROMPT = [2 + i % 9 for i in range(40)]
ADAPTER = "0af3|poet@" + "0c" * 32


def driver_with(num_pages: int = 64, page_size: int = 4, **settings: object) -> Driver:
    settings.setdefault("prefill_cache_size", 0)
    return Driver(make_core(FakeBackend(num_pages, page_size), **settings))


def filled(**settings: object) -> Driver:
    driver = driver_with(**settings)
    driver.run(PROMPT[:22], ONE)
    driver.run([*PROMPT[:12], *[30] * 10], ONE)
    driver.run(PROMPT[:22], ONE, namespace="0af3")
    driver.run(PROMPT[:22], ONE, namespace=ADAPTER)
    for namespace in NOT_SAVED:
        driver.run([7] * 8, ONE, namespace=namespace)
    return driver


NOT_SAVED = ("(canary)", "adapter", "|adapter", "|adapter@0af3")


@pytest.mark.parametrize("page_size", [1, 4, 16])
def test_a_cache_comes_back(tmp_path: Path, page_size: int) -> None:
    path = tmp_path / "cache.safetensors"
    before = filled(num_pages=256 // page_size, page_size=page_size)
    saved = before.core.cache.save(path)
    after = driver_with(num_pages=256 // page_size, page_size=page_size)
    assert after.core.cache.load(path) == saved > 0
    after.core.check()
    assert after.core.stats()["prefix_loaded_tokens"] == saved
    for prompt, namespace in (
        (PROMPT[:22], ""),
        ([*PROMPT[:12], *[30] * 10], ""),
        (PROMPT[:22], "0af3"),
        (PROMPT[:22], ADAPTER),
    ):
        answer = after.run([*prompt, 31], GREEDY, namespace=namespace)
        assert answer.token_ids == reference([*prompt, 31], GREEDY).token_ids
        assert answer.cached_tokens == 22 // page_size * page_size
    # What other names stand for may have changed.
    for namespace in NOT_SAVED:
        assert after.run([*[7] * 8, 31], GREEDY, namespace=namespace).cached_tokens == 0


def test_both_tiers_are_saved(tmp_path: Path) -> None:
    before = driver_with(num_pages=8, page_token_budget=64)
    before.run(PROMPT[:20], ONE)
    before.run([30] * 30, ONE)
    used = before.core.stats()["host_tokens_used"]
    assert used > 0
    assert before.core.cache.save(tmp_path / "c") == 28 + used
    for settings, expected in (
        ({"num_pages": 64}, (20, 28)),
        ({"num_pages": 8, "page_token_budget": 64}, (20, 28)),
        ({"num_pages": 8}, (4, 28)),
    ):
        after = driver_with(**settings)  # type: ignore[arg-type]
        after.core.cache.load(tmp_path / "c")
        after.core.check()
        latest = after.run([*[30] * 28, 31], ONE).cached_tokens
        assert (after.run([*PROMPT[:20], 31], ONE).cached_tokens, latest) == expected or latest == 28


def test_less_room_keeps_what_was_used_last(tmp_path: Path) -> None:
    before = driver_with()
    for number in range(4):
        before.run([2 + number] * 12, ONE)
    before.run([2] * 12, ONE)
    before.core.cache.save(tmp_path / "c")
    for settings in ({"num_pages": 6}, {"prefix_cache_token_budget": 24}):
        after = driver_with(**settings)  # type: ignore[arg-type]
        assert after.core.cache.load(tmp_path / "c") == 24
        after.core.check()
        found = [after.core.cache.cached_tokens([2 + number] * 12) for number in range(4)]
        assert found == [12, 0, 0, 12]


def test_the_order_of_eviction_comes_back(tmp_path: Path) -> None:
    before = driver_with()
    for number in (3, 1, 2, 0):
        before.run([2 + number] * 12, ONE)
    before.core.cache.save(tmp_path / "c")
    after = driver_with()
    after.core.cache.load(tmp_path / "c")
    left = []
    for _ in range(4):
        left.append([n for n in range(4) if after.core.cache.cached_tokens([2 + n] * 12)])
        after.core.cache._evict(3)
    assert left == [[0, 1, 2, 3], [0, 1, 2], [0, 2], [0]]


def test_loading_beside_what_is_cached_adds_what_is_missing(tmp_path: Path) -> None:
    filled().core.cache.save(tmp_path / "c")
    after = driver_with()
    after.run(PROMPT[:14], ONE)
    added = after.core.cache.load(tmp_path / "c")
    assert after.core.cache.load(tmp_path / "c") == 0
    after.core.check()
    assert after.core.stats()["kv_tokens_cached"] == 12 + added
    assert after.run([*PROMPT[:20], 31], GREEDY).token_ids == reference([*PROMPT[:20], 31], GREEDY).token_ids


def test_it_is_a_safetensors_file_of_this_user_alone(tmp_path: Path) -> None:
    path = tmp_path / "cache.safetensors"
    driver = filled()
    saved = driver.core.cache.save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(tmp_path.iterdir()) == [path]
    with safe_open(path, "np") as file:
        assert file.metadata()["format"] == "mini-sglang prefix cache"
        tokens, parents, kv = (file.get_tensor(name) for name in ("tokens", "parents", "kv"))
    assert tokens.shape == (saved // 4, 4) and tokens.dtype == np.int32 and kv.dtype == np.uint8
    # The path of each page spells the beginning of one of the prompts.
    prompts = [PROMPT[:20], [*PROMPT[:12], *[30] * 8]]
    for page in range(len(tokens)):
        path_tokens: list[int] = []
        at = page
        while at >= 0:
            path_tokens = [*tokens[at].tolist(), *path_tokens]
            at = int(parents[at])
        assert path_tokens in [prompt[: len(path_tokens)] for prompt in prompts]


def test_an_empty_cache_can_be_saved(tmp_path: Path) -> None:
    assert driver_with().core.cache.save(tmp_path / "c") == 0
    assert driver_with().core.cache.load(tmp_path / "c") == 0


Damage = Callable[[bytes], bytes]


def change_header(change: Callable[[dict[str, object]], None]) -> Damage:
    def damage(data: bytes) -> bytes:
        length = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + length])
        change(header)
        new = json.dumps(header).encode()
        return len(new).to_bytes(8, "little") + new + data[8 + length :]

    return damage


def flip(place: float) -> Damage:
    def damage(data: bytes) -> bytes:
        start = 8 + int.from_bytes(data[:8], "little")
        at = start + int((len(data) - 1 - start) * place)
        return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]

    return damage


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda data: b"", "is not a saved prefix cache: it is empty"),
        (lambda data: b"GGUF" + data, "is not a saved prefix cache"),
        (lambda data: data[:6], "is not a saved prefix cache"),
        (lambda data: data[:200], "is not a saved prefix cache"),
        (lambda data: data[:-1], r"is damaged: it has \d+ bytes of \d+"),
        (lambda data: data + b"\0", r"is damaged: it has \d+ bytes of \d+"),
        (flip(0.0), "is damaged: its checksum is wrong"),
        (flip(0.5), "is damaged: its checksum is wrong"),
        (flip(1.0), "is damaged: its checksum is wrong"),
        (change_header(lambda header: header.pop("__metadata__")), "is not a saved prefix cache"),
        (change_header(lambda header: header.pop("tokens")), "its tensors do not fit each other"),
        (
            change_header(lambda header: header["__metadata__"].update(version="9")),  # type: ignore[attr-defined]
            "is not a saved prefix cache: its header says",
        ),
    ],
)
def test_a_damaged_file_is_refused_and_changes_nothing(tmp_path: Path, damage: Damage, sentence: str) -> None:
    path = tmp_path / "c"
    filled().core.cache.save(path)
    path.write_bytes(damage(path.read_bytes()))
    driver = driver_with(page_token_budget=64)
    driver.run(PROMPT[:9], ONE)
    before, slots = driver.core.stats(), list(driver.core._backend.slots)  # type: ignore[attr-defined]
    with pytest.raises(CacheFileError, match=sentence) as caught:
        driver.core.cache.load(path)
    assert str(caught.value).endswith(".") and str(path) in str(caught.value)
    assert driver.core.stats() == before
    assert driver.core._backend.slots == slots  # type: ignore[attr-defined]
    driver.core.check()


def test_any_byte_may_be_wrong(tmp_path: Path) -> None:
    """A flipped bit, anywhere, is refused in a sentence."""
    path = tmp_path / "c"
    filled().core.cache.save(path)
    whole, draw = path.read_bytes(), random.Random(3)
    for _ in range(400):
        data = bytearray(whole)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        driver = driver_with()
        with pytest.raises(CacheFileError):
            driver.core.cache.load(path)
        driver.core.check()


def test_a_file_of_another_model_or_layout_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    driver = filled()
    driver.core.cache.save(path)
    other = Driver(make_core(FakeBackend(64, 8)))
    with pytest.raises(
        CacheFileError, match="belongs to another model or other settings: its layout is 4 tok"
    ):
        other.core.cache.load(path)
    assert other.core.stats()["kv_tokens_free"] == 64 * 8
    with pytest.raises(
        CacheFileError, match=r"its weights is abc, here it is None|its weights is None, here"
    ):
        CacheFile(path, {**driver.core._backend.store.identity(), "weights": "abc"}, 96)  # type: ignore[attr-defined]


def test_a_missing_file_and_a_folder_that_is_not_there(tmp_path: Path) -> None:
    driver = filled()
    with pytest.raises(CacheFileError, match="cannot be read: No such file"):
        driver.core.cache.load(tmp_path / "none")
    with pytest.raises(CacheFileError, match=r"cannot be saved to .*: No such file"):
        driver.core.cache.save(tmp_path / "none" / "c")
    for act in (
        driver_with(prefix_cache=False).core.cache.save,
        driver_with(prefix_cache=False).core.cache.load,
    ):
        with pytest.raises(InvalidValueError, match="PREFIX_CACHE is 0; it must be on"):
            act(tmp_path / "c")


def test_a_file_that_is_none_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(CacheFileError, match="is not a saved prefix cache"):
        filled().core.cache.save(path)
    assert path.read_text() == "mine"
    # One of another model is replaced.
    filled(page_size=8).core.cache.save(tmp_path / "c")
    filled().core.cache.save(tmp_path / "c")
    assert driver_with().core.cache.load(tmp_path / "c") > 0


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c"
    driver = filled()
    driver.core.cache.save(path)
    old = path.read_bytes()

    def fail(pages: object, slots: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver.core._backend.store, "read", fail)  # type: ignore[attr-defined]
    with pytest.raises(OSError, match="No space"):
        driver.core.cache.save(path)

    def fail_late(pages: object, slots: object):  # type: ignore[no-untyped-def]
        yield b"\0"
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(driver.core._backend.store, "read", fail_late)  # type: ignore[attr-defined]
    with pytest.raises(CacheFileError, match=r"cannot be saved to .*: No space left on device"):
        driver.core.cache.save(path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
