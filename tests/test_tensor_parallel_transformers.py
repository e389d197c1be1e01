"""Models of transformers' code over several processes, divided by their own ``tp_plan``."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from mini_sglang import SamplingParams
from mini_sglang.backend.gpus import Need
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.need_main import need
from mini_sglang.backend.parallel.weights import SummedWeight
from mini_sglang.backend.transformers_models.division import TransformersDivision
from mini_sglang.engine.engine import EngineCore
from mini_sglang.errors import BackendLostError, InvalidValueError, ModelLoadError
from tests.backend.harness import greedy, load
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED, save, tiny_model
from tests.test_same_answer import EOS, alone, workload
from tests.test_tensor_parallel import SETTINGS, answers, ranks, settings_for

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12] * 4, [3]]
# Gathered and split by turns; biases after a sum; a head that is the embedding, scaled; experts; no
# parameters but matrices.
DIVIDED = ("olmo2", "gpt_neox", "gemma2", "mixtral", "olmo")


def folder_of(family: str, tmp_path: Path) -> Path:
    (found,) = (one for one in PAGED if one.model_type == family)
    return save(tiny_model(found), tmp_path / family)


@pytest.mark.parametrize("family", DIVIDED)
def test_two_ranks_hold_a_part_each_and_give_the_ids_of_one(family: str, tmp_path: Path) -> None:
    path = folder_of(family, tmp_path)
    one = load(path, **SETTINGS, kv_token_budget=512)
    with ranks(path, 2, kv_token_budget=512) as two:
        assert greedy(two, PROMPTS, 10) == greedy(one, PROMPTS, 10)
        about, whole = two.describe(), one.describe()
    assert about["tensor_parallel_size"] == 2 and about["implementation"] == "transformers paged"
    assert about["weight_bytes"] < 0.6 * int(whole["weight_bytes"])
    # OLMo 2 norms all the heads of a row together, so each rank has them all.
    assert about["kv_bytes_per_token"] == whole["kv_bytes_per_token"] // (1 if family == "olmo2" else 2)


def test_four_ranks_under_the_engine_and_by_torch_alone(tmp_path: Path) -> None:
    """Chunks beside decodes, prefix hits and retractions; the last rank has fewer rows of the vocabulary."""
    path = save_tiny_model(tmp_path, "gpt_neox", vocab_size=259, num_key_value_heads=4)
    requests = workload(4, 4)
    more: dict[str, Any] = {"kernels": "reference", "kv_token_budget": 176}
    expected = alone(path, requests, **SETTINGS, kernels="reference")
    with ranks(path, 4, **more) as backend:
        engine = EngineCore(backend, settings_for(4, chunked_prefill=True, prefill_chunk_size=24), EOS)
        for _ in ("cold", "warm"):
            assert answers(engine, requests) == expected
        assert engine.counters.prefix_hit_tokens > 0


def test_blocks_are_made_of_each_ranks_part(tmp_path: Path) -> None:
    path = folder_of("phi3", tmp_path)
    blocks: dict[str, Any] = {"quantization": "int8", "kv_token_budget": 512}
    one = load(path, **SETTINGS, **blocks)
    with ranks(path, 2, **blocks) as two:
        assert greedy(two, PROMPTS, 10) == greedy(one, PROMPTS, 10)
        assert int(two.describe()["weight_bytes"]) < 0.6 * int(one.describe()["weight_bytes"])


@pytest.mark.parametrize(
    ("family", "why"),
    [
        # Looks for the largest of a row of which a rank has a part.
        ("gemma3n_text", r"divided by its tp_plan, its logits are off by 0\.\d+ of their size"),
        # Scales each head by numbers of its own, of which every rank has all.
        ("cohere", "divided by its tp_plan, its forward failed: The size of tensor a"),
    ],
)
def test_a_plan_that_is_wrong_for_the_model_is_refused(family: str, why: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidValueError, match=f"TENSOR_PARALLEL_SIZE is 2; it must be 1 .*{why}"):
        load_backend(folder_of(family, tmp_path), settings_for(2, kv_token_budget=512))


def test_sums_of_ours_that_are_wrong_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = SummedWeight.linear
    monkeypatch.setattr(SummedWeight, "linear", lambda self, *given: 2 * plain(self, *given))
    with pytest.raises(InvalidValueError, match=r"divided by its tp_plan, its logits are off by 0\.\d+"):
        load_backend(folder_of("gpt_neox", tmp_path), settings_for(2, kv_token_budget=512))


@pytest.mark.parametrize(
    ("family", "size", "why"),
    [
        ("gpt2", 2, "1 for this model: it has no tp_plan"),
        ("mixtral", 4, "1 or 2 for this model: it has 2 attention or KV heads"),
        ("gpt_neox", 3, "1, 2 or 4 for this model: it has 4 attention or KV heads"),
    ],
)
def test_what_is_not_divided_starts_no_rank(
    family: str, size: int, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mini_sglang.backend.parallel.leader.Leader", None)
    path = folder_of(family, tmp_path)
    with pytest.raises(InvalidValueError, match=why):
        load_backend(path, settings_for(size))
    with pytest.raises(InvalidValueError, match=why):
        need(path, settings_for(size))
    assert need(path, settings_for(1)) == Need(0, 1)


def test_generate_and_models_with_a_cache_per_request_are_not_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = folder_of("olmo2", tmp_path)
    with pytest.raises(InvalidValueError, match="1 for this model: ENGINE_FAST_DECODE"):
        load_backend(path, settings_for(2, engine_fast_decode=True))
    cpu = torch.device("cpu")
    config = {"model_type": "mamba", "vocab_size": 200}
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "vocab_size": 200}')
    found = TransformersDivision.of(tmp_path, config, settings_for(2), cpu)
    assert found.sizes() == [1] and "a cache of its own" in str(found.obstacle(2))
    # A repository's own config may have less than those of transformers.
    own = SimpleNamespace(base_model_tp_plan={"layers.*.mlp.up_proj": "colwise"})
    own.get_text_config = lambda **_: own
    with monkeypatch.context() as patch:
        patch.setattr("mini_sglang.backend.transformers_models.division.read_config", lambda *_: own)
        found = TransformersDivision.of(path, {}, settings_for(1), cpu)
    assert found.sizes() == [1] and "vocabulary" in str(found.obstacle(2))
    elsewhere = TransformersDivision.of(path, {"model_type": "olmo2"}, settings_for(2), torch.device("meta"))
    assert elsewhere.obstacle(2) == "DEVICE is meta, and transformers divides models over cpu here"


def test_one_process_has_one_such_model_whose_ranks_listen_on_loopback_alone(tmp_path: Path) -> None:
    path, before = folder_of("mixtral", tmp_path), dict(os.environ)
    with ranks(path, 2, kv_token_budget=512) as backend:
        assert dict(os.environ) == before
        pids = [os.getpid(), *backend.follower_pids]
        sockets = [one for pid in pids for one in psutil.Process(pid).net_connections("inet")]
        heard = {one.laddr.ip for one in sockets if one.status == psutil.CONN_LISTEN}
        assert heard == {"127.0.0.1"}
        with pytest.raises(ModelLoadError, match="ENGINE_ISOLATION=process"):
            load_backend(path, settings_for(2, kv_token_budget=512))
        core = EngineCore(backend, settings_for(2), EOS)
        core.add(core.make_request("r", [5, 6, 7], SamplingParams(max_new_tokens=100, ignore_eos=True)))
        core.step()
        os.kill(backend.follower_pids[0], signal.SIGKILL)
        with pytest.raises(BackendLostError, match=r"rank 1 of 2 died \(killed by signal 9\)"):
            while core.has_work:
                core.step()
    # Another may come now.
    assert not torch.distributed.is_initialized()
    with Group().as_default():
        assert not torch.distributed.is_initialized()
