"""``local_bench.py`` end to end: real engines on tiny models, and what it refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from mini_sglang.bench import compare, local, local_cli, sides
from mini_sglang.bench.compare import Comparison
from mini_sglang.bench.conversation import SUITE, Conversation
from mini_sglang.bench.machine import Limits
from mini_sglang.bench.models import find_bench_model
from mini_sglang.bench.peers import registry
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers
from mini_sglang.bench.record import read_record
from mini_sglang.bench.reference import Reference
from mini_sglang.bench.runs import row
from mini_sglang.bench.sides import Seating, Side
from mini_sglang.config import Settings
from tests.tiny_folders import tiny_folder

ROOT = Path(__file__).parents[2]
FAKE = Path(__file__).parent / "fake_worker.py"
LONG = {"max_position_embeddings": 4096}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), **LONG)


@pytest.fixture(autouse=True)
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No peers but those of this Python, and no pauses."""
    monkeypatch.setattr(registry, "environment", lambda peer, settings=None: tmp_path / "peers" / peer.name)
    for peer in all_peers():
        monkeypatch.delenv(f"BENCH_{peer.upper().replace('-', '_')}_PYTHON", raising=False)
    monkeypatch.setattr(compare, "REST", 0.0)
    monkeypatch.setattr(local, "measure_limits", lambda threads: Limits(1.0, 2.0, threads))


def bench(*arguments: str) -> int:
    return local_cli.main([*arguments, "--threads", "1"])


def test_ours_and_hugging_face_in_float32_agree_with_the_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    status = bench(
        *("--model", str(folder), "--dtype", "fp32", "--max-new-tokens", "6"),
        *("--peers", "hf,sglang,llama,ollama", "--rounds", "2", "--json", str(file)),
    )
    printed = capsys.readouterr().out
    assert status == 0, printed
    found = read_record(file)
    assert found["kind"] == "local" and found["limits"]["bandwidth_gb_s"] == 1.0
    assert found["settings"]["turns"] == list(SUITE) and len(found["settings"]["reference"]["answers"]) == 3
    rows = {one["peer"]: one for one in found["rows"]}
    for name in ("ours", "hf"):
        made = rows[name]
        assert made["valid"] and made["group"] == "fp32", made
        assert (made["tokens"], made["agree"], made["same_until"]) == (18, 1.0, 18)
        assert made["tokens_per_s"] > 0 and made["ttft"] > 0 and made["itl"] >= 0 and made["peak_mb"] > 10
    assert rows["ours"]["ratio"] is None
    assert rows["hf"]["ratio"] == rows["ours"]["tokens_per_s"] / rows["hf"]["tokens_per_s"]
    reasons = {name: rows[name]["reason"] for name in ("sglang", "llama", "ollama")}
    assert "bench install sglang" in reasons["sglang"]
    assert "reads GGUF" in reasons["llama"] and "reads GGUF" in reasons["ollama"]
    assert all(reason in printed for reason in reasons.values())
    runs = [one for one in found["runs"] if one["peer"] == "ours"]
    assert [(one["round"], one["turn"]) for one in runs] == [(n, t) for n in (1, 2) for t in (1, 2, 3)]
    # The same work for all: the prompts of a round are equally long, and so are the answers.
    hf = [one for one in found["runs"] if one["peer"] == "hf"]
    assert [one["prompt_tokens"] for one in runs] == [one["prompt_tokens"] for one in hf]
    assert all(len(one["ids"][0]) == 6 and len(one["times"][0]) == 6 and one["valid"] for one in [*runs, *hf])


def test_a_prompt_alone_and_without_a_reference(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "out.json"
    arguments = ("--peers", "mini-sglang", "--no-reference", "--rounds", "1", "--max-new-tokens", "4")
    assert bench("Hello", "--model", str(folder), *arguments, "--json", str(file)) == 0
    (made,) = read_record(file)["rows"]
    assert (made["peer"], made["tokens"], made["agree"], made["same_until"]) == ("ours", 4, None, None)
    printed = capsys.readouterr()
    assert "No float32 reference was asked for" in printed.out
    # No terminal: nothing but the table, and that on standard output.
    assert printed.err == ""


def test_status_is_1_where_ours_fails(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def peers() -> dict[str, Peer]:
        found = all_peers()
        return {**found, "ours": Peer("ours", "mini-sglang", None, "any", "fails")}

    def start(side: Side, seconds: float) -> Any:
        return sides.Process(FAKE, sys.executable, {"more": -1 if side.name == "ours" else 0}, None, seconds)

    monkeypatch.setattr(sides, "all_peers", peers)
    monkeypatch.setattr(Side, "start", start)
    arguments = ("--peers", "hf", "--no-reference", "--rounds", "1", "--max-new-tokens", "4")
    assert bench("Hello", "--model", str(folder), *arguments) == 1
    assert "invalid: it gave 3 ids where 4 were asked for" in capsys.readouterr().out


def test_wrong_ids_show_in_agree(folder: Path) -> None:
    """Against transformers asked here, one id at a time, without any cache."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    found = find_bench_model(Settings.resolve({"model": str(folder)}), lambda line: None)
    conversation = Conversation(("Say something.",))

    def prompt(number: int, turn: int) -> list[int]:
        return conversation.prompt(found.tokenizer, number, turn)

    def choice(ids: list[int]) -> int:
        with torch.inference_mode():
            return int(model(torch.tensor([ids])).logits[0, -1].argmax())

    new = 5
    answer: list[int] = []
    for _ in range(new):
        answer.append(choice(prompt(1, 0) + answer))
    side = Side("wrong", "Wrong", "fp32", FAKE, sys.executable, {"token": answer[0]})
    (seat,) = Comparison(prompt, turns=1, new=new, rounds=2, answer_seconds=60.0).run([side])
    reference = Reference(folder, sys.executable, 1, 120.0)
    assert reference.answers(conversation, found.tokenizer, new, lambda line: None) == [answer]
    strange = replace(seat.runs[0], peer="strange", ids=[10**6] * new)
    unjudged = reference.judge([strange, *seat.runs], prompt, lambda line: None)
    assert unjudged.keys() == {"strange"} and strange.choices is None
    ids = [answer[0]] * new
    expected = [[choice(prompt(n, 0) + ids[:place]) for place in range(new)] for n in (1, 2)]
    assert [run.choices for run in seat.runs] == expected
    made = row(side, seat.runs, seat.reason, answers=[answer])
    right = sum(id == chosen for round_ in expected for id, chosen in zip(ids, round_, strict=True))
    assert made["valid"] and made["agree"] == right / (2 * new) < 1.0
    assert 1 <= made["same_until"] < new


def test_groups_are_of_one_form_of_the_weights_with_ours_in_each(
    starter_gguf: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sides, "interpreter", lambda peer, settings: sys.executable)

    def groups(model: Path, *names: str) -> list[list[Side]]:
        settings = Settings.resolve({"model": str(model)})
        found = find_bench_model(settings, lambda line: None)
        monkeypatch.setattr(type(found), "folder", lambda *args: folder)
        seating = Seating(found, "bf16", 2, 100, settings, lambda line: None)
        return seating.groups([all_peers()[name] for name in names])

    def shown(found: Sequence[Sequence[Side]]) -> list[list[tuple[str, str, bool]]]:
        return [[(side.name, side.group, side.missing is None) for side in group] for group in found]

    both = groups(starter_gguf, "llama", "hf", "openvino", "sglang")
    assert shown(both) == [
        [(name, "bf16", True) for name in ("ours", "hf", "sglang")],
        [(name, "gguf Q4_1", True) for name in ("ours", "llama", "openvino")],
    ]
    assert {side.options["model"] for side in both[0]} == {str(folder)}
    assert {side.options["model"] for side in both[1]} == {str(starter_gguf.resolve())}
    assert {(side.options["threads"], side.options["dtype"]) for group in both for side in group} == {
        (2, "bf16")
    }
    assert shown(groups(starter_gguf, "ours")) == [[("ours", "gguf Q4_1", True)]]
    assert shown(groups(folder, "ours")) == [[("ours", "bf16", True)]]
    assert shown(groups(folder, "llama")) == [[("ours", "bf16", True)], [("llama", "gguf", False)]]
    only_server = groups(starter_gguf, "hf-serve")[0][1]
    assert "runs only as a server" in (only_server.missing or "")


def test_without_transformers_ours_still_has_the_file_to_show(
    starter_gguf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def nothing(peer: Peer, settings: Settings) -> str:
        if peer.name == "ours":
            return sys.executable
        raise sides.PeerError(f"{peer.name} is not installed: mini-sglang bench install {peer.name}")

    monkeypatch.setattr(sides, "interpreter", nothing)
    settings = Settings.resolve({"model": str(starter_gguf)})
    found = find_bench_model(settings, lambda line: None)
    seating = Seating(found, "bf16", 1, 100, settings, lambda line: None)
    folder_group, gguf_group = seating.groups([all_peers()["sglang"], all_peers()["hf"]])
    assert [side.name for side in folder_group] == ["sglang", "hf"]
    assert all("bench install" in (side.missing or "") for side in folder_group)
    assert [(side.name, side.missing) for side in gguf_group] == [("ours", None)]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "nobody"], "no peer 'nobody'"),
        (["--peers", ","], "peers is ','"),
        (["--rounds", "0"], "rounds is 0"),
        (["--max-new-tokens", "1"], "max_new_tokens is 1"),
        (["--max-new-tokens", "many"], "--max-new-tokens"),
        (["--threads", "0"], "threads is 0"),
        (["--threads", "100000"], "threads is 100000"),
        (["--dtype", "int3"], "--dtype"),
        (["--limit", "nan"], "limit is nan"),
        (["--wait", "-1"], "wait is -1"),
        (["--json", "/no/such/folder/x.json"], "json is '/no/such/folder/x.json'"),
        (["  "], "prompt is '  '"),
        (["x" * 5000, "--max-new-tokens", "8"], "the prompt's length in tokens is"),
        (["Hello", "--max-new-tokens", "9000"], "max_new_tokens is 9000"),
        (["--max-new-tokens", "4000"], "max_new_tokens is 4000"),
        (["one", "two"], "two"),
    ],
)
def test_what_is_refused_is_one_sentence(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert local_cli.main(["--model", str(folder), *arguments]) == 2
    printed = capsys.readouterr()
    assert said in printed.err and printed.out == ""
    assert printed.err.count("\n") == 1


def test_a_model_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("--model", "/no/such/model") == 2
    assert "/no/such/model" in capsys.readouterr().err


def test_the_door_at_the_root() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "local_bench.py"), "--rounds", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2 and "rounds is 0" in done.stderr
    helped = subprocess.run(
        [sys.executable, str(ROOT / "local_bench.py"), "--help"], capture_output=True, text=True
    )
    assert helped.returncode == 0 and "--max-new-tokens" in helped.stdout


def test_json_is_plain(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "out.json"
    arguments = ("--peers", "mini-sglang", "--rounds", "1", "--max-new-tokens", "2", "--no-reference")
    assert bench("Hi", "--model", str(folder), *arguments, "--json", str(file)) == 0
    text = file.read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name))["command"]
