"""benchmarks/gpu.sh: what it runs, what it says without a GPU, and what is left where a part is cut off."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import answers, kernel_checks, parts
from benchmarks.gpu.kernel_checks import CHECKS, TOLERANCE, worst
from benchmarks.gpu.workload import CONFIGS, FULL, requests, write_config
from mini_sglang.backend.kernels import triton as kernels
from mini_sglang.backend.kernels.triton.operations import TritonOperations
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.dummy import DummyCheckpoint
from mini_sglang.backend.models.loader import check_tensors
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SampleSpec, SequenceResult
from mini_sglang.types import SamplingParams

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def test_the_workload_is_the_public_one() -> None:
    """Published runs of it report 142,827 tokens of prompts and 133,966 of answers."""
    prompts, counts = requests(FULL)
    assert len(prompts) == len(counts) == 256
    assert sum(map(len, prompts)) == 142_827 and sum(counts) == 133_966
    assert {
        min(map(len, prompts)) >= 100,
        max(map(len, prompts)) <= 1024,
        max(map(max, prompts)) <= 10000,
    } == {True}


@pytest.mark.parametrize(
    ("name", "published", "outside"), [("Qwen3-0.6B", 0.6e9, 0.44e9), ("Qwen3-14B", 14.8e9, 13.2e9)]
)
def test_the_models_have_the_sizes_that_are_published(
    name: str, published: float, outside: float, tmp_path: Path
) -> None:
    """In all and without the embedding and head; and transformers makes as many of the config."""
    config = write_config(name, tmp_path, tiny=False)
    checkpoint = DummyCheckpoint(tmp_path, CPU)
    count = check_tensors(checkpoint, ModelConfig.from_hf(config, {}))
    tables = config["vocab_size"] * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    assert abs(count / published - 1) < 0.01 and abs((count - tables) / outside - 1) < 0.01
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path))
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert set(CONFIGS) == {"Qwen3-0.6B", "Qwen3-14B"}


def test_every_kernel_of_triton_is_checked() -> None:
    found = set()
    for file in Path(kernels.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef) and any(
                "triton.jit" in ast.unparse(d) for d in node.decorator_list
            ):
                found.add(node.name)
    checked = {name for check in CHECKS for name in check.kernels}
    # Those that begin with _ are parts of others.
    assert checked == {name for name in found if not name.startswith("_")}, "benchmarks/gpu/kernel_checks.py"


def check_named(name: str) -> Any:
    return next(check for check in CHECKS if check.name == name)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_a_kernel_that_computes_something_else_is_found(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    check = check_named("SiLU times up")
    assert check.run(CPU, dtype, True) <= TOLERANCE[dtype]
    plain = TritonOperations.silu_and_mul
    for wrong in (lambda out: out * 1.2, lambda out: out.index_fill(1, torch.tensor([3]), torch.nan)):
        monkeypatch.setattr(
            TritonOperations, "silu_and_mul", lambda self, x, wrong=wrong: wrong(plain(self, x))
        )
        assert not check.run(CPU, dtype, True) <= TOLERANCE[dtype]
    assert not worst([0.0, float("nan")]) <= 1


def test_a_fault_in_a_kernel_leaves_the_other_checks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("triton")

    def fault(*_: object) -> float:
        raise torch.AcceleratorError("CUDA error: misaligned address")

    class Anew(Exception):
        """Where another process begins."""

    def begin(program: str, words: list[str]) -> None:
        raise Anew(words)

    two = [kernel_checks.Check("bad", ("a",), fault), kernel_checks.Check("good", ("b",), lambda *_: 0.0)]
    monkeypatch.setattr(kernel_checks, "CHECKS", two)
    monkeypatch.setattr(parts.os, "execv", begin)
    options = {"device": "cpu", "tiny": True, "settings": {}}
    while True:
        try:
            parts.kernels(parts.Part(options))
        except Anew as anew:
            options = json.loads(anew.args[0][-1])
        else:
            break
    said = [json.loads(line.removeprefix("@")) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in said] == [
        "bad, float32", "bad, bfloat16", "good, float32", "good, bfloat16",
    ]  # fmt: skip
    assert [row["ok"] for row in said] == [False, False, True, True]


def test_answers_that_differ_from_transformers_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = [
        answers.Case("plain"),
        answers.Case("drawn", drawn=True),
        answers.Case("roomy", retracts=True),
    ]
    found = {row["name"]: row for row in answers.compared("cpu", True, cases)}
    assert [found[case.name]["ok"] for case in cases] == [True, True, False]
    assert found["plain"]["value"] == 0 and "nothing was retracted" in found["roomy"]["note"]
    whole = Sampler.sample

    def wrong(self: Sampler, logits: torch.Tensor, specs: Sequence[SampleSpec]) -> list[SequenceResult]:
        """Another token for the second of an answer, with the engine alone."""
        results = whole(self, logits, specs)
        for spec, result in zip(specs, results, strict=True):
            if spec.index == 1 and result.token_id is not None and len(specs) > 1:
                result.token_id = (result.token_id + 1) % answers.VOCAB
        return results

    monkeypatch.setattr(Sampler, "sample", wrong)
    (row,) = answers.compared("cpu", True, cases[:1])
    assert row["value"] > 0 and row["ok"] is False
    assert "prompt 0 parts at token 1, where the two largest logits are" in row["note"]


def test_one_stream_is_the_time_of_tokens_after_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine with 3 s to its first token, cached 0.5, and 0.25 s to each further one."""
    now, begun = [100.0], []

    def generate(prompt: list[int], params: SamplingParams) -> SimpleNamespace:
        now[0] += (0.5 if begun else 3.0) + 0.25 * (params.max_new_tokens - 1)
        begun.append(prompt)
        return SimpleNamespace(token_ids=[7] * params.max_new_tokens)

    rows: dict[str, float] = {}
    part = parts.Part({"device": "cpu", "tiny": True, "settings": {}, "bandwidth": 2.0})
    monkeypatch.setattr(parts, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(part, "row", lambda name, value, *more: rows.update({name: value}))
    engine = SimpleNamespace(generate=generate, description={"weight_bytes": 10**9, "parameters": 10**9})
    parts._one_stream(part, engine, {"tie_word_embeddings": False, "vocab_size": 1000, "hidden_size": 10**5})
    assert rows["one stream"] == pytest.approx(4.0)
    # 0.9 GB of weights a token, without the embedding: 3.6 of 2 GB/s.
    assert rows["one stream, share of bandwidth"] == pytest.approx(180.0)


def script(*words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **more}
    return subprocess.run(
        [str(ROOT / "benchmarks" / "gpu.sh"), *words],
        capture_output=True, text=True, timeout=600, check=False, env=environment,
    )  # fmt: skip


def test_without_cuda_it_says_so_in_a_sentence() -> None:
    done = script(CUDA_VISIBLE_DEVICES="")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "There is no CUDA here: PyTorch finds no GPU it can use.\n"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--device", "cpu"), "needs --tiny"),
        (("--only", "kernels,cooking"), "there is no cooking"),
        (("--device", "cpu", "--tiny", "--set", "x"), "NAME=VALUE"),
    ],
)
def test_bad_options_are_refused(words: tuple[str, ...], says: str) -> None:
    done = script(*words)
    assert done.returncode != 0 and says in done.stderr and not done.stdout


def test_a_rehearsal_leaves_a_table_and_its_json(tmp_path: Path) -> None:
    file = tmp_path / "gpu.json"
    done = script(
        "--device", "cpu", "--tiny", "--json", str(file), "--only", "limits,small,generate,batching",
        "--set", "KERNELS=reference", "--set", "MODEL_DTYPE=fp32",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record = json.loads(file.read_text())
    assert record["kind"] == "gpu" and record["limits"]["bandwidth_gb_s"] > 0
    assert [run["part"] for run in record["runs"]] == ["limits", "small", "generate", "batching"]
    rows = {(row["part"], row["name"]): row for row in record["rows"]}
    wanted = [
        ("limits", "bf16 matrix product"),
        ("small", "output tokens per second"),
        ("small", "one stream"),
        ("small", "one stream, share of bandwidth"),
        ("generate", "generate, one stream"),
        ("generate", "generate, output tokens per second"),
        ("batching", "continuous batching, output tokens per second"),
    ]
    assert all(rows[key]["value"] > 0 for key in wanted)
    made = rows["small", "output tokens per second"]
    assert made["tokens"] == sum(requests(gpu_size())[1]) and made["seconds"] > 0
    engine = rows["small", "start"]["engine"]
    assert "random" in engine["weights"] and engine["dtype"] == "float32" and "reference" in engine["kernels"]
    for _, name in wanted:
        assert name in done.stdout


def gpu_size() -> Any:
    from benchmarks.gpu.workload import TINY

    return TINY


SLOW = """#!/bin/sh
echo 'a line of a library'
echo '@{"name": "half", "value": 1, "unit": "s", "note": "so far"}'
sleep 600 &
echo "@{\\"name\\": \\"pid\\", \\"value\\": $!, \\"unit\\": \\"\\", \\"note\\": \\"\\"}"
wait
"""


def test_a_part_that_takes_too_long_is_ended_and_what_it_said_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text(SLOW)
    fake.chmod(0o755)
    monkeypatch.setattr(gpu.sys, "executable", str(fake))
    rows: list[dict[str, Any]] = []
    with pytest.raises(gpu.Ended, match="cut off after 2 s"):
        gpu.run_part("small", {"device": "cpu"}, 2, rows.append)
    assert [row["name"] for row in rows] == ["half", "pid"]
    deadline = time.monotonic() + 10
    while psutil.pid_exists(rows[1]["value"]) and time.monotonic() < deadline:
        if psutil.Process(rows[1]["value"]).status() == psutil.STATUS_ZOMBIE:
            break
        time.sleep(0.05)
    else:
        assert not psutil.pid_exists(rows[1]["value"])
    fake.write_text("#!/bin/sh\nexit 3\n")
    with pytest.raises(gpu.Ended, match="exit status 3"):
        gpu.run_part("small", {"device": "cpu"}, 5, rows.append)


def test_shares_run_side_by_side_and_all_that_they_say_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    together = threading.Barrier(3)

    def part(name: str, options: dict[str, Any], seconds: float, take: Any, stop: threading.Event) -> None:
        assert (name, seconds, options["shares"], stop.is_set()) == ("kernels", 9, 3, False)
        together.wait(20)
        take({"name": f"share {options['share']}"})
        if options["share"] < 2:
            raise gpu.Ended(("cut off after 9 s", "broke with exit status 1")[options["share"]])

    monkeypatch.setattr(gpu, "SHARES", {"kernels": 3})
    monkeypatch.setattr(gpu.os, "cpu_count", lambda: 8)
    monkeypatch.setattr(gpu, "run_part", part)
    rows: list[dict[str, Any]] = []
    with pytest.raises(gpu.Ended, match="exit status 1"):
        gpu.run_shares("kernels", {"device": "cuda"}, 9, rows.append)
    assert sorted(row["name"] for row in rows) == ["share 0", "share 1", "share 2"]


def test_the_shares_of_the_checks_are_all_of_them(
    capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    pytest.importorskip("triton")
    checks = [kernel_checks.Check(f"check {n}", ("a",), lambda *_: 0.0) for n in range(5)]
    monkeypatch.setattr(kernel_checks, "CHECKS", checks)
    for share in range(3):
        parts.kernels(
            parts.Part({"device": "cpu", "tiny": True, "settings": {}, "share": share, "shares": 3})
        )
    said = [json.loads(line.removeprefix("@"))["name"] for line in capsys.readouterr().out.splitlines()]
    assert sorted(said) == sorted(
        f"check {n}, {dtype}" for n in range(5) for dtype in ("float32", "bfloat16")
    )


def test_the_budgets_fit_and_every_part_has_a_title_and_is_there() -> None:
    from benchmarks.gpu.parts import PARTS

    assert sum(gpu.BUDGETS.values()) <= 60 * gpu.MINUTES - 25
    assert set(gpu.BUDGETS) == set(gpu.TITLES) == set(PARTS) - {"device"}
