"""The sampler of a GPU: the tokens of the other one, and one copy to the host."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mini_sglang.backend import device_sampling, distribution, penalties, sampling
from mini_sglang.backend.device import to_device
from mini_sglang.backend.device_logprobs import ranked
from mini_sglang.backend.device_sampling import DeviceSampler, make_sampler
from mini_sglang.backend.sampling import Sampler
from tests.backend.sampling_oracle import spec
from tests.backend.test_sampling import random_spec


class Fetches:
    """Counts the copies to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, answer: Any = None) -> None:
        self.count = 0
        fetch = answer or device_sampling.fetch

        def counted(numbers: torch.Tensor) -> list[float]:
            self.count += 1
            return fetch(numbers)

        monkeypatch.setattr(device_sampling, "fetch", counted)


def random_logits(rng: random.Random, generator: torch.Generator, rows: int, vocab_size: int) -> torch.Tensor:
    logits = torch.randn(rows, vocab_size + 3, generator=generator) * rng.choice([0.1, 2.0, 6.0])
    if rng.random() < 0.5:
        # Equal values, zeros of both signs among them.
        logits = logits.round() * rng.choice([-1.0, 1.0])
    for row, value in ((3, math.nan), (5, math.inf), (7, -math.inf)):
        logits[row, rng.randrange(vocab_size) if row < 7 else slice(None)] = value
    return logits


@pytest.mark.parametrize(("vocab_size", "rounds", "rows"), [(37, 30, 9), (1501, 15, 30), (49_152, 2, 41)])
def test_gives_what_the_sampler_of_the_cpu_gives(vocab_size: int, rounds: int, rows: int) -> None:
    rng, generator = random.Random(vocab_size), torch.Generator().manual_seed(vocab_size)
    for _ in range(rounds):
        logits = random_logits(rng, generator, rows, vocab_size)
        specs = [random_spec(rng, vocab_size) for _ in range(rows)]
        own = Sampler(vocab_size).sample(logits.clone(), specs)
        assert repr(DeviceSampler(vocab_size).sample(logits.clone(), specs)) == repr(own)


def test_prompt_logprobs_are_those_of_the_cpu() -> None:
    rng, generator = random.Random(1), torch.Generator().manual_seed(1)
    for top in (0, 1, 20, 37):
        logits = random_logits(rng, generator, 9, 37)
        targets = [rng.randrange(37) for _ in range(9)]
        ours, own = (
            sampler(37).prompt_logprobs(logits, targets, top) for sampler in (DeviceSampler, Sampler)
        )
        assert repr(ours) == repr(own)


def test_equal_values_are_ranked_by_ascending_id() -> None:
    x = torch.tensor([[0.0, -0.0, 2.0, -1.0, 2.0, -math.inf, 1e-45, -1e-45]])
    values, ids = ranked(x, 8)
    assert ids.tolist() == [[2, 4, 6, 0, 1, 7, 3, 5]]
    assert torch.equal(values, x.gather(1, ids))


def test_a_row_that_needs_a_wider_look_costs_one_more_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    fetches = Fetches(monkeypatch)
    flat = torch.zeros(3, 40_000)
    narrow = [spec(temperature=1.0, top_p=0.9, seed=seed) for seed in range(3)]
    peaked = flat.clone()
    peaked[:, 7] = 50.0
    sampler = DeviceSampler(40_000)
    assert [result.token_id for result in sampler.sample(peaked, narrow)] == [7, 7, 7]
    assert fetches.count == 1
    expected = [result.token_id for result in Sampler(40_000).sample(flat, narrow)]
    assert [result.token_id for result in sampler.sample(flat, narrow)] == expected
    assert fetches.count == 4, "64 of them, 1,024, then all"


class NoWaiting(TorchDispatchMode):
    """Fails on a copy to the device that ``to_device`` does not make, which waits for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self._allowed = False

        def allowed(values: torch.Tensor, device: torch.device) -> torch.Tensor:
            self._allowed = True
            try:
                return to_device(values, device)
            finally:
                self._allowed = False

        for module in (device_sampling, sampling, distribution, penalties):
            monkeypatch.setattr(module, "to_device", allowed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default) and not self._allowed:
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            target = torch.device((kwargs or {}).get("device", args[0].device))
            assert source.device.type == target.type, f"{func} from {source.device} to {target} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["greedy", "temperature", "top_k", "top_p", "min_p", "everything"])
def test_nothing_waits_but_the_last_copy(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On tensors without data: what needs a value on the host, or a shape that depends on one, raises."""
    shapes: dict[str, dict[str, Any]] = {
        "greedy": {"logprobs": True, "top_logprobs": 5},
        "temperature": {"temperature": 0.6},
        "top_k": {"temperature": 0.6, "top_k": 20},
        "top_p": {"temperature": 0.6, "top_p": 0.9},
        "min_p": {"temperature": 0.6, "min_p": 0.1},
    }
    everything = {
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "logit_bias": {5: 1.0},
        "logprobs": True,
        "top_logprobs": 3,
    }
    given = list(shapes.values()) if kind == "everything" else [shapes[kind]] * 4
    specs = [spec(0, 0, [1, 2], [3], (4,), **(everything | one)) for one in given]
    if kind != "everything":
        specs = [spec(**one) for one in given]
    fetches = Fetches(monkeypatch, lambda numbers: [1.0] * numbers.numel())
    monkeypatch.setattr(sampling, "usable", lambda logits: logits)
    with NoWaiting(monkeypatch):
        results = DeviceSampler(50_000).sample(torch.empty(len(specs), 50_000, device="meta"), specs)
    assert fetches.count == 1 and [result.token_id for result in results] == [1] * len(specs)


def test_the_check_of_waiting_finds_what_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "usable", lambda logits: logits)
    logits = torch.empty(2, 100, device="meta")
    with NoWaiting(monkeypatch):
        with pytest.raises(AssertionError, match="waits"):
            torch.tensor([1]).to("meta")
        with pytest.raises((RuntimeError, NotImplementedError), match="meta"):
            Sampler(100).sample(logits, [spec(temperature=1.0)] * 2)


def test_cuda_has_it_and_the_others_do_not() -> None:
    assert type(make_sampler(9, torch.device("cuda"))) is DeviceSampler
    assert type(make_sampler(9, torch.device("cpu"))) is type(make_sampler(9, torch.device("mps"))) is Sampler
