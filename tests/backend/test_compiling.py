"""``COMPILE_MODEL`` and ``COMPILE_MODE``: compiled models answer as they do without, where it can be had."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mini_sglang.backend import compiling
from mini_sglang.backend.compiling import Compiler, choose_compiler
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.models.compiled import CompiledDecoder
from mini_sglang.backend.native_model import _without_idle_compiler
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError
from tests.backend.harness import greedy, load, page_ranges, step, step_logits
from tests.backend.tiny_models import save_tiny_model
from tests.backend.transformers_models.families import PAGED, save, tiny_model
from tests.backend.transformers_models.request_families import CASES
from tests.backend.transformers_models.test_per_request import greedy as requests
from tests.backend.transformers_models.test_per_request import make_engine, run

PROMPTS = [[(7 * i * i + 3 * i + s) % 190 + 5 for i in range(length)] for s, length in enumerate((1, 9, 17))]
FAMILIES = {family.model_type: family for family in PAGED}
CASE = {case.family.model_type: case.family for case in CASES}


def compiled_graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def test_our_decoder_compiled_has_the_logits_it_has_without(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path, "qwen3", num_hidden_layers=1)
    plain = load(folder, kernels="reference", compile_model=0)
    before = compiled_graphs()
    compiled = load(folder, kernels="reference", compile_model=1)
    assert isinstance(compiled.decoder, CompiledDecoder) and not isinstance(plain.decoder, CompiledDecoder)
    assert compiled.describe()["compile"] == "default" and plain.describe()["compile"] == "off"
    graphs = compiled_graphs()
    assert graphs > before
    tables = page_ranges(plain, [len(prompt) for prompt in PROMPTS])
    steps = [step(prompt, 0, table) for prompt, table in zip(PROMPTS, tables, strict=True)]
    for ours, own in zip(step_logits(compiled, steps), step_logits(plain, steps), strict=True):
        torch.testing.assert_close(ours, own, rtol=1e-4, atol=1e-4)
    assert greedy(compiled, PROMPTS, 6) == greedy(plain, PROMPTS, 6)
    assert compiled_graphs() == graphs, "a batch of another size was compiled anew"


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile without its C++: graphs are traced and cut as ever, and run on torch's operators."""
    own = torch.compile
    monkeypatch.setattr(
        torch, "compile", lambda function, dynamic, mode: own(function, dynamic=dynamic, backend="aot_eager")
    )


@pytest.mark.usefixtures("quick")
def test_a_model_of_transformers_compiled_over_our_pages_answers_alike(tmp_path: Path) -> None:
    folder = save(
        tiny_model(FAMILIES["gemma2"], num_hidden_layers=1, layer_types=["full_attention"]), tmp_path
    )
    expected = greedy(load(folder), PROMPTS, 6)
    before = compiled_graphs()
    compiled = load(folder, compile_model=1)
    assert compiled.describe()["compile"] == "default" and compiled_graphs() > before
    assert greedy(compiled, PROMPTS, 6) == expected


def test_a_cache_of_fixed_shape_is_captured_and_one_that_grows_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save(tiny_model(CASE["bloom"], num_hidden_layers=1), tmp_path)
    growing, backend = make_engine(folder, compile_model=1)
    expected = run(growing, requests(PROMPTS))
    reason = "the model's cache grows with every token; FORCE_LEGACY_CACHE=1 gives it a fixed shape"
    assert backend.describe()["compile"] == f"off: {reason}"
    assert backend.describe()["cache"] == "as the model makes it"
    assert f"torch.compile is off: {reason}" in caplog.text
    assert backend._runner.decode is backend._runner.model
    before = compiled_graphs()
    fixed, backend = make_engine(folder, compile_model=1, force_legacy_cache=1)
    assert backend.describe()["compile"] == "default" and backend.describe()["cache"] == "fixed shape"
    graphs = compiled_graphs()
    assert graphs > before
    assert run(fixed, requests(PROMPTS)) == expected
    assert compiled_graphs() == graphs, "a request was compiled anew"


@pytest.mark.parametrize("model_type", ["qwen3_next", "lfm2"])
def test_a_cache_of_fixed_shape_answers_as_one_that_grows(model_type: str, tmp_path: Path) -> None:
    folder = save(tiny_model(CASE[model_type]), tmp_path)
    expected = run(make_engine(folder)[0], requests(PROMPTS))
    engine, backend = make_engine(folder, force_legacy_cache=1)
    assert run(engine, requests(PROMPTS)) == expected
    past = backend._runner.kind.fresh()
    assert type(past.cache).__name__ == "StaticCache"
    assert backend.page_size == backend.context_length


@pytest.mark.parametrize("model_type", ["mpt", "gpt_neo"])
def test_a_model_without_a_cache_of_fixed_shape_refuses_it(model_type: str, tmp_path: Path) -> None:
    folder = save(tiny_model(CASE[model_type]), tmp_path)
    with pytest.raises(InvalidValueError, match="does not say that this model can use one") as caught:
        make_engine(folder, force_legacy_cache=1)
    assert caught.value.field == "FORCE_LEGACY_CACHE"


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_our_pages_have_no_use_for_it(family: str, tmp_path: Path) -> None:
    if family == "llama":
        save_tiny_model(tmp_path, family)
    else:
        save(tiny_model(FAMILIES[family]), tmp_path)
    with pytest.raises(InvalidValueError, match="whose shape is fixed") as caught:
        load(tmp_path, force_legacy_cache=1)
    assert caught.value.field == "FORCE_LEGACY_CACHE"


def test_the_compiled_kernels_have_nothing_to_compile(tmp_path: Path) -> None:
    folder = save_tiny_model(tmp_path)
    assert load(folder).program is not None
    with pytest.raises(InvalidValueError, match="the compiled CPU kernels run this model") as caught:
        load(folder, compile_model=1)
    assert caught.value.field == "COMPILE_MODEL"


def resolved(**given: object) -> Settings:
    return Settings.resolve(given, env={})


@pytest.mark.parametrize(
    ("settings", "device", "mode"),
    [
        ({}, "cpu", None),
        ({}, "mps", None),
        ({}, "cuda", "default"),
        ({"compile_model": 0}, "cuda", None),
        ({"compile_model": 1}, "cpu", "default"),
        ({"compile_model": "on", "compile_mode": "max-autotune"}, "cpu", "max-autotune"),
        ({"compile_mode": "reduce-overhead"}, "cuda", "reduce-overhead"),
    ],
)
def test_it_is_on_for_cuda_and_off_elsewhere(
    settings: dict[str, object], device: str, mode: str | None
) -> None:
    compiler = choose_compiler(resolved(**settings), torch.device(device))
    assert (None if compiler is None else compiler.mode) == mode


def test_the_mode_reaches_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr(torch, "compile", lambda function, **given: seen.update(given) or function)
    compiler = choose_compiler(resolved(compile_model=1, compile_mode="max-autotune"), torch.device("cpu"))
    assert compiler is not None
    compiler.compile(len)
    assert seen == {"dynamic": True, "mode": "max-autotune-no-cudagraphs"}
    compiler.compile(len, record=True)
    assert seen == {"dynamic": True, "mode": "max-autotune"}


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_graphs_of_torch_that_stay_with_a_thread_are_refused(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import cudagraph_trees

    compiler = Compiler(mode, False)
    compiler.refuse_lost_graphs(torch.device("cuda"))
    # As torch 2.11 is.
    monkeypatch.delattr(cudagraph_trees, "_initialize_tls")
    compiler.refuse_lost_graphs(torch.device("cpu"))
    Compiler("default", True).refuse_lost_graphs(torch.device("cuda"))
    with pytest.raises(InvalidValueError, match="one thread only") as caught:
        compiler.refuse_lost_graphs(torch.device("cuda"))
    assert caught.value.field == "COMPILE_MODE"


@pytest.mark.parametrize(
    ("settings", "triton", "head_dim", "kept"),
    [
        ({}, True, 64, False),
        ({}, False, 64, True),
        ({}, True, 63, True),
        ({"compile_model": 1}, True, 64, True),
        ({"compile_mode": "max-autotune"}, True, 64, True),
        ({"compile_mode": "default"}, True, 64, True),
        ({"kernels": "triton"}, True, 64, False),
    ],
)
def test_where_triton_has_the_kernels_our_decoder_is_compiled_only_when_asked(
    settings: dict[str, object], triton: bool, head_dim: int, kept: bool
) -> None:
    device, given = torch.device("cuda"), resolved(**settings)
    machine = Machine(device, None, "triton", 1, choose_compiler(given, device), triton)
    assert (_without_idle_compiler(given, machine, head_dim).compiler is not None) == kept


@pytest.mark.parametrize("setting", [{"compile_model": 1}, {"compile_mode": "max-autotune"}])
def test_what_it_would_compile_is_not_asked_of_triton_as_well(setting: dict[str, object]) -> None:
    device, given = torch.device("cuda"), resolved(kernels="triton", **setting)
    machine = Machine(device, None, "triton", 1, choose_compiler(given, device), True)
    with pytest.raises(InvalidValueError, match="KERNELS=triton runs what it would compile") as caught:
        _without_idle_compiler(given, machine, 64)
    assert caught.value.field.lower() in setting


@pytest.mark.parametrize(
    ("settings", "device"),
    [
        ({"compile_mode": "max-autotune"}, "cpu"),
        ({"compile_model": 0, "compile_mode": "reduce-overhead"}, "cuda"),
        ({"compile_model": 1, "compile_mode": "reduce-overhead"}, "cpu"),
        (
            {"compile_mode": "reduce-overhead", "enable_decode_cuda_graph": 0, "enable_cuda_graph": 0},
            "cuda",
        ),
    ],
)
def test_a_mode_that_would_do_nothing_is_refused(settings: dict[str, object], device: str) -> None:
    with pytest.raises(InvalidValueError) as caught:
        choose_compiler(resolved(**settings), torch.device(device))
    assert caught.value.field == "COMPILE_MODE"


def test_it_needs_a_compiler_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "_has_cpp_compiler", lambda: False)
    with pytest.raises(InvalidValueError, match=r"no C\+\+ compiler"):
        choose_compiler(resolved(compile_model=1), torch.device("cpu"))


def test_what_cannot_be_compiled_is_refused_by_name_and_left_by_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_model(tmp_path)

    def broken(*_: object) -> None:
        raise RuntimeError("no graph")

    monkeypatch.setattr(CompiledDecoder, "_before_attention", broken)
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with pytest.raises(InvalidValueError, match="no graph"):
        load(folder, kernels="reference", compile_model=1)
    monkeypatch.setattr(
        "mini_sglang.backend.loader.choose_compiler", lambda *_: compiling.Compiler("default", False)
    )
    settings = resolved(kernels="reference", dtype="fp32", device="cpu")
    assert load_backend(folder, settings).describe()["compile"] == "off: the compiled model failed: no graph"
