"""When steps are recorded, when not, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mini_sglang.backend import native_model
from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.graphs import recorder as recorders
from mini_sglang.backend.graphs import setup
from mini_sglang.backend.graphs.program import GraphProgram
from mini_sglang.backend.graphs.recorder import choose_recorder
from mini_sglang.backend.lora.files import open_adapter
from mini_sglang.backend.models.compiled import CompiledDecoder
from mini_sglang.backend.step import SequenceStep
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.backend.graphs.comparing import SMALL, assert_same, batch_of, fill, ids, load_recorded, program_of
from tests.backend.graphs.recorder import FaithfulRecorder
from tests.backend.harness import greedy, load, page_ranges, step
from tests.backend.lora.tiny_adapters import peft_greedy, save_tiny_adapter
from tests.backend.tiny_models import save_tiny_model, tiny_model
from tests.backend.transformers_models.families import PAGED
from tests.backend.transformers_models.families import save as save_family
from tests.backend.transformers_models.families import tiny_model as tiny_family
from tests.backend.transformers_models.request_families import CASES
from tests.backend.transformers_models.test_per_request import make_engine

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
# Only attention is interpreted then.
QUICK = {"kernels": "reference", "attn_impl": "triton"}
BOTH = ("ENABLE_DECODE_CUDA_GRAPH", "ENABLE_CUDA_GRAPH")


def resolved(**given: object) -> Settings:
    return Settings.resolve(given, env={})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "model", "llama", **SMALL)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CUDA whose recorder does nothing."""
    monkeypatch.setattr(recorders, "CudaRecorder", lambda device: FaithfulRecorder())


@pytest.mark.parametrize("variable", BOTH)
def test_on_a_cpu_they_are_refused_by_name(variable: str, folder: Path) -> None:
    with pytest.raises(InvalidValueError, match="need CUDA, and the device is cpu") as caught:
        load(folder, **{variable.lower(): True})
    assert caught.value.field == variable
    assert load(folder, **{variable.lower(): False}).describe()["cuda_graphs"] == "off"


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_without_cuda_there_are_none(device: str) -> None:
    assert choose_recorder(resolved(), torch.device(device)) is None
    with pytest.raises(InvalidValueError, match="CUDA_GRAPH_MAX_SEQ_LEN"):
        choose_recorder(resolved(cuda_graph_max_seq_len=64), torch.device(device))


@pytest.mark.usefixtures("cuda")
def test_on_cuda_they_are_on() -> None:
    off = dict.fromkeys(map(str.lower, BOTH), False)
    assert choose_recorder(resolved(), CUDA) is not None
    assert choose_recorder(resolved(enable_cuda_graph=0), CUDA) is not None
    assert choose_recorder(resolved(**off), CUDA) is None
    with pytest.raises(InvalidValueError, match="unset while ENABLE_CUDA_GRAPH is 0"):
        choose_recorder(resolved(enable_cuda_graph=0, cuda_graph_max_seq_len=64), CUDA)


@pytest.mark.parametrize("decodes", [False, True])
@pytest.mark.parametrize("prompts", [False, True])
def test_each_switch_has_its_steps(
    decodes: bool, prompts: bool, folder: Path, recorder: FaithfulRecorder
) -> None:
    settings = {"enable_decode_cuda_graph": decodes, "enable_cuda_graph": prompts}
    backend = load_recorded(folder, **QUICK, **settings, max_batch_size=2)
    (table,) = page_ranges(backend, [40])
    wanted = {"decodes of up to 2": decodes, "prompts of up to 20 tokens": prompts}
    said = str(backend.describe()["cuda_graphs"])
    assert all((text in said) == on for text, on in wanted.items())
    if not decodes and not prompts:
        assert backend.program is None and said == "off" and not recorder.recorded
        return
    program = program_of(backend)
    assert program.takes(batch_of(backend, [step([5], 9, table, sample=True)])) == decodes
    assert program.takes(batch_of(backend, [step([5, 6], 9, table, sample=True)])) == prompts


@pytest.mark.parametrize(
    ("settings", "longest"),
    [
        ({}, 20),
        ({"prefill_chunk_size": 9}, 9),
        ({"prefill_chunk_size": 9, "chunked_prefill": False}, 20),
        ({"cuda_graph_max_seq_len": 1000}, 24),
    ],
)
def test_prompts_are_recorded_as_far_as_they_come(
    settings: dict[str, Any], longest: int, folder: Path, recorder: FaithfulRecorder
) -> None:
    backend = load_recorded(
        folder, **{**QUICK, "context_length": 24, "enable_decode_cuda_graph": False, **settings}
    )
    (table,) = page_ranges(backend, [24])
    for count, taken in ((longest, True), (longest + 1, False)):
        if count <= 24:
            batch = batch_of(backend, [step(ids(count, 0), 0, table, sample=True)])
            assert program_of(backend).takes(batch) == taken


def test_attention_that_plans_on_the_host_turns_them_off(
    folder: Path, recorder: FaithfulRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    backend = load(folder, kernels="reference")
    said = "they need Triton's attention, and this one plans each step on the host"
    assert backend.program is None and backend.describe()["cuda_graphs"] == f"off: {said}"
    assert caplog.text.count(f"CUDA graphs are off: {said}") == 1 and not recorder.recorded


def test_quantised_blocks_on_torch_turn_them_off(folder: Path, recorder: FaithfulRecorder) -> None:
    backend = load_recorded(folder, **QUICK, quantization="int8")
    assert backend.program is None and "quantised blocks" in str(backend.describe()["cuda_graphs"])


def test_ranks_turn_them_off() -> None:
    assert "TENSOR_PARALLEL_SIZE is 2" in str(setup.why_not_recorded(object(), 2))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("mode", "given"),
    [
        ("default", "default"),
        ("max-autotune-no-cudagraphs", "max-autotune-no-cudagraphs"),
        ("reduce-overhead", "default"),
        ("max-autotune", "max-autotune-no-cudagraphs"),
    ],
)
def test_compiled_pieces_are_recorded_here_and_not_by_torch(
    mode: str, given: str, folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    modes: list[str] = []
    monkeypatch.setattr(torch, "compile", lambda function, *, mode, **_: modes.append(mode) or function)
    compiler = Compiler(mode, True)
    monkeypatch.setattr("mini_sglang.backend.loader.choose_compiler", lambda *_: compiler)
    backend = load_recorded(folder, **QUICK, max_batch_size=2)
    assert isinstance(backend.decoder, CompiledDecoder) and set(modes) == {given}
    assert isinstance(backend.program, GraphProgram) and backend.describe()["compile"] == mode


def test_a_model_that_asks_the_device_turns_them_off_and_is_served(
    tmp_path: Path, recorder: FaithfulRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    """GPT-2 looks for padding among the ids."""
    family = next(family for family in PAGED if family.model_type == "gpt2")
    folder = save_family(tiny_family(family), tmp_path)
    expected = greedy(load(folder, kernels="reference", enable_cuda_graph=False), [ids(9, 1)], 3)
    backend = load_recorded(folder, **QUICK)
    assert backend.program is None and "off: recording failed" in str(backend.describe()["cuda_graphs"])
    assert caplog.text.count("CUDA graphs are off: recording failed") >= 1 and recorder.released
    assert greedy(backend, [ids(9, 1)], 3) == expected


def test_a_cache_that_grows_turns_them_off(
    tmp_path: Path, recorder: FaithfulRecorder, caplog: pytest.LogCaptureFixture
) -> None:
    bloom = next(case.family for case in CASES if case.family.model_type == "bloom")
    folder = save_family(tiny_family(bloom, num_hidden_layers=1), tmp_path)
    reason = "the model's cache grows with every token; FORCE_LEGACY_CACHE=1 gives it a fixed shape"
    assert make_engine(folder)[1].describe()["cuda_graphs"] == f"off: {reason}"
    assert caplog.text.count(f"CUDA graphs are off: {reason}") == 1
    _, backend = make_engine(folder, force_legacy_cache=1)
    assert "reduce-overhead" in str(backend.describe()["cuda_graphs"])


def test_a_recording_that_gives_something_else_is_not_used(
    folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = FaithfulRecorder.record

    def late(self: FaithfulRecorder, step_: Any) -> Any:
        """What was there at the recording is left there."""
        record(self, step_)
        return lambda: None

    monkeypatch.setattr(FaithfulRecorder, "record", late)
    backend = load_recorded(folder, **QUICK, max_batch_size=2)
    assert backend.program is None
    assert "what a recorded step gives is off by" in str(backend.describe()["cuda_graphs"])
    expected = greedy(load(folder, kernels="reference", enable_cuda_graph=False), [ids(9, 1)], 3)
    assert greedy(backend, [ids(9, 1)], 3) == expected


def test_their_memory_is_counted_before_the_pool_s(
    folder: Path, recorder: FaithfulRecorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of every kind, the largest, and others are tried; all are of one size here."""
    free = 1 << 20
    monkeypatch.setattr(native_model, "free_memory", lambda device: free)
    settings = {**QUICK, "kv_token_budget": 0, "max_batch_size": 5, "cuda_graph_max_seq_len": 20}
    off = {"enable_decode_cuda_graph": False, "enable_cuda_graph": False}
    whole = load(folder, **QUICK, **off, kv_token_budget=0, max_batch_size=5)
    recorder.bytes_each = 10_000
    backend = load(folder, **settings)
    count = int(str(backend.describe()["cuda_graphs"]).split()[0])
    assert count == 6  # 1, 2, 4, 5; 16, 20
    bytes_per_page = backend.kv.bytes_per_token * backend.page_size
    assert whole.num_pages == int(free * 0.4) // bytes_per_page
    assert backend.num_pages == int((free - count * 10_000) * 0.4) // bytes_per_page
    assert backend.kv.spare_pages == 1 and whole.kv.spare_pages == 0


def test_adapters_run_plain(tmp_path: Path, recorder: FaithfulRecorder) -> None:
    model = tiny_model("llama", **SMALL)
    model.save_pretrained(tmp_path / "model")
    adapter = save_tiny_adapter(tmp_path / "adapter", model)
    backend = load_recorded(tmp_path / "model", **QUICK)
    assert backend.adapters is not None
    number = backend.adapters.attach(backend.adapters.read(open_adapter("a", adapter)))
    program, tables = program_of(backend), page_ranges(backend, [40] * 2)
    fill(backend, [[], []], tables)
    prompts = [ids(7, 1), ids(9, 2)]
    answers: list[list[int]] = [[], []]
    replayed = recorder.replayed
    for _ in range(3):
        steps = []
        for prompt, answer, table, own in zip(prompts, answers, tables, (number, 0), strict=True):
            new = answer[-1:] or prompt
            start = len(prompt) + len(answer) - len(new)
            one = step(new, start, table, sample=True)
            steps.append(SequenceStep(new, start, table, one.sample, adapter=own))
        assert not program.takes(batch_of(backend, steps))
        for answer, result in zip(answers, backend.run(steps), strict=True):
            assert result.token_id is not None
            answer.append(result.token_id)
    assert recorder.replayed == replayed
    assert answers == [peft_greedy(model, adapter, prompts[0], 3), peft_greedy(model, None, prompts[1], 3)]
    # Beside it the model itself is recorded.
    assert_same(backend, [step([5], 12, tables[1], sample=True)], exactly=False)


def test_a_batch_is_sent_in_one_transfer(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent = []

    def send(values: torch.Tensor, device: torch.device) -> torch.Tensor:
        sent.append(values)
        return values.clone()

    monkeypatch.setattr("mini_sglang.backend.batch.to_device", send)
    backend = load(folder, kernels="reference")
    tables = page_ranges(backend, [40] * 2)
    batch = batch_of(backend, [step(ids(17, 1), 0, tables[0], sample=True), step([4], 3, tables[1])])
    sent.clear()
    there = batch.to(CUDA)
    assert len(sent) == 1 and batch.to(CPU) is batch
    for name in ("token_ids", "positions", "slot_mapping", "opened_pages", "output_rows"):
        ours, own = getattr(there, name), getattr(batch, name)
        assert torch.equal(ours, own) and ours.data_ptr() != own.data_ptr()
