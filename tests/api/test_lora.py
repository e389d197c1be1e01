"""Adapters over HTTP: chosen per request, loaded and unloaded, and never from where they should not be."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.api.serving import Client, Server, serving, settle
from tests.backend.lora.tiny_adapters import peft_greedy, save_tiny_adapter
from tests.backend.tiny_models import tiny_model
from tests.tiny_folders import tiny_folder

PROMPT = "A prompt that is longer than two of the pages of the cache."
ASK = {"prompt": PROMPT, "max_new_tokens": 8, "ignore_eos": True, "return_token_ids": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("served")
    tiny_folder(root / "model", max_position_embeddings=2048)
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048)
    for seed, name in enumerate(("one", "two")):
        save_tiny_adapter(root / "adapters" / name, model, seed=seed)
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str | None, list[int]]:
    """PEFT's answers to ``ASK``, by the adapter."""
    model = tiny_model("llama", vocab_size=259, max_position_embeddings=2048)
    ids = [3 + sorted(_alphabet()).index(character) for character in _as_bytes(PROMPT)]
    folders = {None: None, "one": root / "adapters" / "one", "two": root / "adapters" / "two"}
    return {name: peft_greedy(model, folder, ids, 8) for name, folder in folders.items()}


def _alphabet() -> list[str]:
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


def _as_bytes(text: str) -> str:
    """ASCII as the byte-level alphabet writes it."""
    return text.replace(" ", "\u0120")


@pytest.fixture
def client(root: Path) -> Iterator[Client]:
    with serving(
        root / "model",
        dtype="fp32",
        lora_adapters=f"first={root / 'adapters' / 'one'}",
        lora_root=root / "adapters",
        max_loras=2,
    ) as client:
        yield client


def refused(client: Client, path: str, status: int, **body: Any) -> str:
    response = client.post(path, json=body)
    assert response.status_code == status, response.text
    return str(response.json()["error"]["message"])


def test_each_request_chooses(client: Client, expected: dict[str | None, list[int]]) -> None:
    assert client.ask(**ASK)["token_ids"] == expected[None]
    for name in ("lora", "lora_path"):
        assert client.ask(**ASK, **{name: "first"})["token_ids"] == expected["one"]
    assert client.ask(**ASK, lora=None)["token_ids"] == expected[None]
    client.ask("/load_lora_adapter", lora_name="second", lora_path="two")

    def ask(name: str | None) -> list[int]:
        found: list[int] = client.ask(**ASK, **({"lora": name} if name else {}))["token_ids"]
        return found

    names = [None, "first", "second"] * 4
    with ThreadPoolExecutor(12) as threads:
        answers = list(threads.map(ask, names))
    keys = {None: None, "first": "one", "second": "two"}
    assert answers == [expected[keys[name]] for name in names]
    engine = client.get("/metrics?format=json").json()["engines"][0]
    assert engine["loras"] == 2 and engine["lora_requests"] == 10
    assert client.get("/metrics?format=json").json()["lora_requests"] == {"first": 6, "second": 4}
    text = client.get("/metrics").text
    assert 'mini_sglang_lora_requests_total{lora="first"} 6' in text
    assert 'mini_sglang_engine_loras{engine="0"} 2' in text


def test_prefixes_are_kept_apart(client: Client) -> None:
    cached = [client.ask(**ASK, **more)["cached_tokens"] for more in ({}, {"lora": "first"}) * 2]
    assert cached[:2] == [0, 0] and cached[2] == cached[3] > 16
    assert client.ask(**ASK, lora="first", cache_salt="x")["cached_tokens"] == 0


def test_openai_clients_name_it_as_the_model(client: Client, expected: dict[str | None, list[int]]) -> None:
    want = client.ask("/detokenize", tokens=expected["one"])["text"]
    plain = {"prompt": PROMPT, "max_tokens": 8, "ignore_eos": True, "temperature": 0}
    for more in ({"model": "first"}, {"lora": "first"}, {"model": "model", "lora_path": "first"}):
        answer = client.ask("/v1/completions", **plain, **more)
        assert answer["choices"][0]["text"] == want and answer["model"] == "first"
    assert client.ask("/v1/completions", **plain)["model"] == "model"
    chat = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "model": "first"}
    assert client.ask("/v1/chat/completions", **chat)["model"] == "first"
    assert client.ask("/v1/responses", input="Hi", max_output_tokens=4, model="first")["model"] == "first"
    base, adapter = client.get("/v1/models").json()["data"]
    assert (base["id"], adapter["id"], adapter["parent"]) == ("model", "first", "model")
    assert client.get("/v1/models/first").json() == adapter
    message = refused(client, "/v1/completions", 404, **plain, model="nobody")
    assert message == "The model 'nobody' is not served here; 'model', 'first' are."
    assert "name of a loaded adapter (first)" in refused(client, "/v1/completions", 400, **plain, lora="x")
    assert "name of a loaded adapter (first)" in refused(client, "/generate", 400, **ASK, lora="x")
    assert "left out" in refused(client, "/generate", 400, **ASK, lora="first", lora_path="x")


@pytest.mark.parametrize("prefix", ["", "/v1"])
def test_loading_and_unloading(
    client: Client, root: Path, expected: dict[str | None, list[int]], prefix: str
) -> None:
    load, unload = f"{prefix}/load_lora_adapter", f"{prefix}/unload_lora_adapter"
    answer = client.ask(load, lora_name="team/x", lora_path="two")
    assert answer == {
        "success": True,
        "message": "The adapter team/x is loaded.",
        "loaded_adapters": ["first", "team/x"],
    }
    assert client.ask(**ASK, lora="team/x")["token_ids"] == expected["two"]
    assert client.get("/v1/models/team/x").json()["parent"] == "model"
    assert "no loaded adapter has" in refused(client, load, 400, lora_name="team/x", lora_path="two")
    assert "MAX_LORAS" in refused(client, load, 400, lora_name="y", lora_path="two")
    assert "other than the model's own" in refused(client, load, 400, lora_name="model", lora_path="two")
    for name in ("", "a b", "x" * 200, "@", "../x"):
        refused(client, load, 400, lora_name=name, lora_path="two")
    assert client.ask(unload, lora_name="team/x")["loaded_adapters"] == ["first"]
    assert "name of a loaded adapter (first)" in refused(client, unload, 400, lora_name="team/x")
    refused(client, "/generate", 400, **ASK, lora="team/x")
    # Another one under the same name.
    client.ask(load, lora_name="team/x", lora_path="one")
    again = client.ask(**ASK, lora="team/x")
    assert again["token_ids"] == expected["one"]


def test_damage_and_escapes_are_refused_and_change_nothing(client: Client, root: Path) -> None:
    damaged = root / "adapters" / "damaged"
    shutil.copytree(root / "adapters" / "one", damaged, dirs_exist_ok=True)
    weights = damaged / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    load = "/load_lora_adapter"
    assert "incomplete" in refused(client, load, 400, lora_name="x", lora_path="damaged")
    config = damaged / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"use_dora": True}))
    assert "DoRA is not supported" in refused(client, load, 400, lora_name="x", lora_path="damaged")
    for place in ("../model", str(root / "model"), "nothing", "..", "a\u0000b"):
        message = refused(client, load, 400, lora_name="x", lora_path=place)
        assert "LORA_ROOT" in message or "adapter" in message
    assert client.get("/metrics?format=json").json()["engines"][0]["loras"] == 1
    assert [model["id"] for model in client.get("/v1/models").json()["data"]] == ["model", "first"]


def test_a_request_that_runs_keeps_its_adapter(client: Client) -> None:
    body = {**ASK, "max_new_tokens": 400, "lora": "first", "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        lines = response.iter_lines()
        next(lines)
        answer = client.ask("/unload_lora_adapter", lora_name="first")
        assert answer["loaded_adapters"] == []
        last = json.loads(list(lines)[-1])
    assert last["event"] == "done" and last["completion_tokens"] == 400
    settle(lambda: client.get("/metrics?format=json").json()["engines"][0]["loras"] == 0, "its end")


def test_without_a_root_nobody_loads(root: Path) -> None:
    with serving(root / "model") as client:
        for path in ("/load_lora_adapter", "/v1/unload_lora_adapter"):
            assert "LORA_ROOT" in refused(client, path, 403, lora_name="x", lora_path=str(root))
        assert "there is none" in refused(client, "/generate", 400, **ASK, lora="x")


def test_the_key_is_asked_for(root: Path) -> None:
    with serving(root / "model", lora_root=root / "adapters", api_key="secret") as client:
        body = {"lora_name": "x", "lora_path": "one"}
        refused(client, "/load_lora_adapter", 401, **body)
        allowed = client.post("/load_lora_adapter", json=body, headers={"x-api-key": "secret"})
        assert allowed.status_code == 200


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize(
    "value", ["x=/nowhere/at/all", "model={adapters}/one", "x={model}", "x={adapters}/one"]
)
def test_a_start_with_what_is_no_adapter_fails(
    root: Path, tmp_path: Path, value: str, isolation: str
) -> None:
    value = value.format(adapters=root / "adapters", model=root / "model")
    # The last is refused by the engine, once that is ready.
    variables = {"LORA_ADAPTERS": value, "MAX_LORA_RANK": "7", "ENGINE_ISOLATION": isolation}
    server = Server(root / "model", tmp_path / "log", **variables)
    try:
        assert server.process.wait(60) == 2
        last = server.said.splitlines()[-1]
        assert last.startswith("mini-sglang: ") and ("LORA_ADAPTERS" in last or "adapter" in last)
        assert "Traceback" not in server.said
    finally:
        server.close()


def test_engines_in_processes_have_it_all_and_again_after_a_death(
    root: Path, tmp_path: Path, expected: dict[str | None, list[int]]
) -> None:
    server = Server(
        root / "model",
        tmp_path / "log",
        ENGINE_ISOLATION="process",
        NUM_ENGINES="2",
        MODEL_DTYPE="fp32",
        LORA_ADAPTERS=f"first={root / 'adapters' / 'one'}",
        LORA_ROOT=str(root / "adapters"),
    )

    def post(path: str, **body: Any) -> tuple[int, Any]:
        status, _, data = server.request("POST", path, body)
        return status, json.loads(data)

    def engines(name: str) -> list[Any]:
        return [engine.get(name) for engine in server.metrics()["engines"]]

    try:
        server.wait_ready()
        settle(lambda: engines("loras") == [1, 1], "both engines")
        damaged = root / "adapters" / "cut"
        shutil.copytree(root / "adapters" / "one", damaged, dirs_exist_ok=True)
        (damaged / "adapter_model.safetensors").write_bytes(b"cut")
        assert post("/load_lora_adapter", lora_name="x", lora_path="cut")[0] == 400
        assert post("/load_lora_adapter", lora_name="second", lora_path="two")[0] == 200
        settle(lambda: engines("loras") == [2, 2], "both engines")

        def check() -> None:
            for name, key in (("first", "one"), ("second", "two"), (None, None)) * 2:
                status, answer = post("/generate", **ASK, **({"lora": name} if name else {}))
                assert status == 200 and answer["token_ids"] == expected[key]

        check()
        victims = [
            int(pid)
            for pid in _children(server.process.pid)
            if b"process_main" in Path(f"/proc/{pid}/cmdline").read_bytes()
        ]
        assert len(victims) == 2
        os.kill(victims[0], signal.SIGKILL)
        settle(lambda: sum(engines("restarts")) == 1 and engines("state") == ["ready"] * 2, "the restart")
        settle(lambda: engines("loras") == [2, 2], "its adapters")
        check()
        assert post("/unload_lora_adapter", lora_name="first")[0] == 200
        settle(lambda: engines("loras") == [1, 1], "the unloading")
        assert post("/generate", **ASK, lora="first")[0] == 400
        assert server.end() == 0
    finally:
        server.close()


def _children(pid: int) -> list[str]:
    """Of every thread: the one that started a process is its parent's task."""
    found: list[str] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += (task / "children").read_text().split()
    return found
