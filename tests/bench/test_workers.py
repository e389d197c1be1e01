"""The workers whose libraries are here, against transformers in this process: ids, times, and refusals."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from mini_sglang.bench.peers.registry import all_peers
from mini_sglang.bench.process import PeerError, Process
from tests.tiny_folders import tiny_folder

PROMPTS = [[5, 40, 41, 42, 43, 44, 45], [5, 90, 91, 92, 93, 94, 95]]
NEW = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folder(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def model(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def expected(model) -> list[list[int]]:
    answers = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(NEW):
            with torch.inference_mode():
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        answers.append(ids[len(prompt) :])
    return answers


def start(name: str, folder: Path) -> Process:
    """As a comparison starts a peer, on the Python that runs the tests."""
    peer = all_peers()[name]
    options: dict[str, Any] = {
        "model": str(folder),
        "threads": 1,
        "dtype": "fp32",
        "prefix_cache": True,
        "requests": len(PROMPTS),
        "tokens": len(PROMPTS[0]) + NEW,
        **peer.options,
    }
    assert peer.worker is not None
    return Process(peer.worker, sys.executable, options, {"OMP_NUM_THREADS": "1"})


@pytest.mark.parametrize("name", ["hf", "hf-batching", "ours"])
def test_ids_are_transformers_own_and_each_has_its_time(name: str, folder: Path, expected: list[list[int]]):
    process = start(name, folder)
    try:
        assert process.about["versions"] and isinstance(process.about["notes"], list)
        for prompts, answers in ((PROMPTS[1:], expected[1:]), (PROMPTS, expected)):
            for cold in (True, False):
                reply = process.ask(ids=prompts, new=NEW, cold=cold)
                assert reply["ids"] == answers
                assert [len(times) for times in reply["times"]] == [NEW] * len(prompts)
                for times, end in zip(reply["times"], reply["ends"], strict=True):
                    assert times == sorted(times) and times[0] > 0
                    assert times[-1] == end <= reply["seconds"]
                assert reply["first"] == min(times[0] for times in reply["times"])
                assert reply["cpu_seconds"] > 0 and reply["peak_bytes"] > 0
    finally:
        process.close()


def test_transformers_says_what_it_would_have_chosen_and_survives_a_bad_request(
    folder: Path, expected: list[list[int]]
):
    process = start("hf", folder)
    try:
        assert process.ask(do="choose", prompt=PROMPTS[0], ids=expected[0])["answer"] == expected[0]
        bent = [expected[0][0], expected[0][1] + 1, *expected[0][2:]]
        chosen = process.ask(do="choose", prompt=PROMPTS[0], ids=bent)["answer"]
        assert chosen[:2] == expected[0][:2] and len(chosen) == NEW
        # Streamed from a thread: its failure must come out, and not leave the reader waiting.
        with pytest.raises(PeerError, match="transformers: IndexError"):
            process.ask(ids=[[10**6]], new=2, cold=True)
        assert process.ask(ids=PROMPTS[:1], new=NEW, cold=True)["ids"] == expected[:1]
    finally:
        process.close()
