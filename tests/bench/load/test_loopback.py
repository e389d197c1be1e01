"""The commands against a server of known delays on the loopback: counts are exact, times within what a busy
machine may add."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from mini_sglang.bench.load import serve_cli, sweep_cli
from mini_sglang.bench.machine import Limits
from mini_sglang.bench.record import read_record
from mini_sglang.bench.wire.detect import detect
from mini_sglang.errors import MiniSglangError
from tests.bench.fake_server import Behaviour, fake_server
from tests.bench.streams import CACHE_TOLD, CACHED, IDS_TOLD, NAMES, PROMPT, spoken

pytestmark = pytest.mark.usefixtures("past_set_aside")

COUNT, NEW = 6, 8
LATE = 0.5
"""Seconds that a request may take longer than its server let it; sooner it can never be."""


def serve(url: str, path: Path, *words: str) -> tuple[int, dict[str, Any]]:
    """The exit status and the record."""
    common = ["--url", url, "--requests", str(COUNT), "--output-len", str(NEW), "--input-len", "5"]
    status = serve_cli.main([*common, "--warmup", "0", "--json", str(path), *words])
    return status, read_record(path)


@pytest.mark.parametrize("together", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_a_known_server_is_reported_as_what_it_is(name: str, together: int, tmp_path: Path) -> None:
    behaviour = Behaviour(name, together=together)
    with fake_server(behaviour) as url:
        words = ["--dialect", spoken(name), "--request-rate", "50"]
        status, record = serve(url, tmp_path / "x.json", *words)
    (row,) = record["rows"]
    assert (status, record["kind"]) == (0, "serve")
    assert (row["completed"], row["errors"], row["requests"]) == (COUNT, 0, COUNT)
    assert (row["output_tokens"], row["input_tokens"]) == (COUNT * NEW, COUNT * PROMPT)
    assert row["cached_tokens"] == (COUNT * CACHED if name in CACHE_TOLD else None)
    pieces = -(-NEW // together)
    if name in IDS_TOLD:
        assert all(len(run["times"]) == NEW for run in record["runs"])
    else:
        assert row["itl_of"] == ("tokens" if together == 1 else "pieces")
        assert all(len(run["times"]) == pieces for run in record["runs"])
    last = behaviour.first + (pieces - 1) * behaviour.each
    assert behaviour.first <= row["ttft"]["p50"] <= behaviour.first + LATE
    assert last <= row["e2e"]["p50"] <= last + LATE
    assert all(run["planned"] <= run["sent"] <= run["first"] <= run["end"] for run in record["runs"])


def test_what_fails_is_counted_by_its_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    faults: list[int | str | None] = [None, 429, 500, "reset", "cut", None]
    with fake_server(Behaviour("ours", fault=faults.__getitem__)) as url:
        words = ["--dialect", "ours", "--concurrency", "1", "--no-keep-alive"]
        status, record = serve(url, tmp_path / "x.json", *words)
    (row,) = record["rows"]
    assert (status, row["completed"], row["errors"]) == (0, 2, 4)
    kinds = row["errors_by_kind"]
    assert kinds["status 429"] == kinds["status 500"] == 1
    # The system tells of a connection that is torn down in one way or the other.
    assert kinds.get("reset", 0) + kinds.get("cut short", 0) == 2
    assert row["output_tokens"] == 2 * NEW
    assert "Status 429: no place left." in capsys.readouterr().out


@pytest.mark.parametrize("command", [serve_cli, sweep_cli])
def test_the_limits_of_this_machine_stand_beside_a_server_of_ours(
    command: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--warmup", "1", "--json", str(tmp_path / "x.json"), "--dialect", "ours", "--output-len", "4"]
    words += ["--requests", "2"] if command is serve_cli else ["--rates", "50", "--seconds", "0.1"]
    closed: list[bool] = []
    with fake_server(Behaviour("ours")) as url:
        server = SimpleNamespace(url=url, close=lambda: closed.append(True))
        monkeypatch.setattr(serve_cli, "start_ours", lambda given: server)
        monkeypatch.setattr(serve_cli, "measure_limits", lambda threads: Limits(12.5, 345.0, threads))
        monkeypatch.setenv("NUM_THREADS", "1")
        assert command.main(words) == 0
    assert closed == [True]
    limits = {"bandwidth_gb_s": 12.5, "matrix_gflop_s": 345.0, "threads": 1}
    assert read_record(tmp_path / "x.json")["limits"] == limits
    assert "reads 12.5 GB/s, multiplies 345 GFLOP/s in bf16." in capsys.readouterr().out


def test_the_limits_of_another_machine_are_not_known(tmp_path: Path) -> None:
    with fake_server(Behaviour("ours")) as url:
        words = ["--dialect", "ours", "--concurrency", "3"]
        assert serve(url, tmp_path / "x.json", *words)[1]["limits"] is None


def test_nobody_listens(tmp_path: Path) -> None:
    with fake_server(Behaviour("ours")) as url:
        pass
    status, record = serve(url, tmp_path / "x.json", "--dialect", "ours", "--concurrency", "3")
    assert status == 1 and record["rows"][0]["errors_by_kind"] == {"refused": COUNT}
    with pytest.raises(MiniSglangError, match="Nobody answers at"):
        serve(url, tmp_path / "x.json")


def test_answers_that_end_early_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with fake_server(Behaviour("ours", missing=3)) as url:
        _, record = serve(url, tmp_path / "x.json", "--dialect", "ours", "--concurrency", "6")
    assert record["rows"][0]["output_tokens"] == COUNT * (NEW - 3)
    assert f"{COUNT} answers ended before the tokens that were asked for" in capsys.readouterr().out


def test_turns_hold_the_real_answers(tmp_path: Path) -> None:
    behaviour = Behaviour("vllm")
    with fake_server(behaviour) as url:
        words = ["--dialect", "vllm", "--dataset", "multi-turn", "--turns", "3", "--concurrency", "1"]
        _, record = serve(url, tmp_path / "x.json", *words)
    made = list(range(100, 100 + NEW))
    first, second, third = (body["prompt"] for body in behaviour.bodies[:3])
    assert len(first) == 5 and first + made == second[: 5 + NEW]
    assert second + made == third[: 2 * (5 + NEW)]
    assert [run["turn"] for run in record["runs"]] == [0, 1, 2, 0, 1, 2]


@pytest.mark.parametrize(
    ("owner", "speaks"),
    [
        ("mini-sglang", "ours"),
        ("vllm", "vllm"),
        ("sglang", "sglang"),
        ("llamacpp", "llama-server"),
        ("somebody", "openai"),
    ],
)
def test_a_server_is_known_by_its_models_owner(owner: str, speaks: str) -> None:
    with fake_server(Behaviour("ours", owner=owner)) as url:
        found = asyncio.run(detect(url))
        assert (found.dialect.name, found.url, found.model) == (speaks, url, "fake")
        assert asyncio.run(detect(f"{url}/generate")).dialect.name == speaks
        # An endpoint's own path says more.
        for path, name in (
            ("/v1/chat/completions", "openai-chat"),
            ("/v1/completions", "openai"),
            ("/completion", "llama-server"),
            ("/api/generate", "ollama"),
        ):
            at = asyncio.run(detect(url + path))
            assert (at.dialect.name, at.url) == (name, url)
        assert asyncio.run(detect(url + "/v1/completions", "vllm")).dialect.name == "vllm"
    with fake_server(Behaviour("ollama")) as url:
        assert asyncio.run(detect(url)).dialect.name == "ollama"


def test_a_sweep_stops_where_the_server_is_full(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.json"
    # Three to warm up and four at each of two rates, then it refuses all.
    fault = [None] * 11 + [429] * 1000
    behaviour = Behaviour("ours", first=0.5, fault=fault.__getitem__)
    with fake_server(behaviour) as url:
        words = [
            "--url",
            url,
            "--dialect",
            "ours",
            "--rates",
            "5,10,20,40",
            "--seconds",
            "0.1",
            "--least",
            "4",
        ]
        status = sweep_cli.main([*words, "--output-len", "2", "--json", str(path), "--warmup", "3"])
    record = read_record(path)
    assert status == 0 and record["kind"] == "sweep"
    assert [row["request_rate"] for row in record["rows"]] == [5.0, 10.0, 20.0]
    assert "Full at 20 requests/s: its output is 0% of what was offered" in capsys.readouterr().out
    assert {run["rate"] for run in record["runs"]} == {5.0, 10.0, 20.0}
    # A prompt that an earlier rate had asked would be answered from the server's cache.
    prompts = [tuple(body["prompt"]) for body in behaviour.bodies]
    assert len(prompts) == 3 + 3 * 4 and len(set(prompts)) == len(prompts)


def test_the_record_has_no_key_and_says_what_was_asked(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    with fake_server(Behaviour("openai")) as url:
        serve(url, path, "--dialect", "openai", "--api-key", "secret", "--seed", "7", "--concurrency", "2")
    text = path.read_text(encoding="utf-8")
    settings = json.loads(text)["settings"]
    assert "secret" not in json.dumps(settings)
    assert (settings["dataset"], settings["seed"], settings["dialect"]) == ("random", 7, "openai")
    assert settings["url"] == url


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["--request-rate", "0"], "--request-rate"),
        (["--request-rate", "nan"], "--request-rate"),
        (["--request-rate", "2", "--concurrency", "2"], "--concurrency"),
        (["--request-rate", "inf", "--duration", "2"], "--request-rate"),
        (["--concurrency", "0"], "--concurrency"),
        (["--requests", "0"], "--requests"),
        (["--duration", "-1"], "--duration"),
        (["--input-len", "5:2"], "--input-len"),
        (["--output-len", "0"], "--output-len"),
        (["--output-len", "x"], "--output-len"),
        (["--range-ratio", "2"], "--range-ratio"),
        (["--dataset", "nonsense"], "--dataset"),
        (["--extra", "[]"], "--extra"),
        (["--goodput", "x:1"], "--goodput"),
        (["--temperature", "nan"], "--temperature"),
        (["--vocab", "1"], "--vocab"),
        (["--json", "/no/such/folder/x.json"], "--json"),
        (["--nonsense"], "--nonsense"),
        (["--dialect", "soap"], "dialect 'soap'"),
    ],
)
def test_bad_options_are_one_sentence_before_anything_is_sent(words: list[str], name: str) -> None:
    with pytest.raises(MiniSglangError, match=name):
        serve_cli.main(["--url", "http://127.0.0.1:1", *words])
