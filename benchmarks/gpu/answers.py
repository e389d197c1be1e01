"""Tiny models through the whole engine, by each way that it has on the device, beside transformers' own.

In float32, so that every id must be the same: graphs, overlap, pages, chunks, cached prefixes, retracted and
speculated tokens change nothing. What is drawn is compared with draws on the host.
"""

from __future__ import annotations

import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SampleSpec, release
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.types import SamplingParams

if TYPE_CHECKING:
    from benchmarks.gpu.parts import Part

VOCAB = 300
CONTEXT = 512
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 384, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "tie_word_embeddings": False,
}  # fmt: skip
MODELS: Mapping[str, Mapping[str, Any]] = {
    "qwen3": {"head_dim": 64},
    "llama": {},
    "mistral": {"sliding_window": 48},
    "qwen2": {},
    "smollm3": {},
}
# The last two are served through transformers' code over our pages.
FOREIGN: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {
        "head_dim": 64,
        "query_pre_attn_scalar": 64,
        "sliding_window": 48,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
    },
    "olmo2": {},
}
_DRAWN = ({"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9}, {"temperature": 0.9, "top_k": 40})


@dataclass(frozen=True)
class Case:
    """One engine.

    Attributes:
        model: of ``MODELS`` or ``FOREIGN``.
        settings: beside those that all share.
        drawn: whether tokens are drawn, not the most probable ones.
        rounds: how often the prompts are asked, one after another: in the second their prefixes are cached.
        retracts: whether the pool is so small that sequences must be retracted.
    """

    name: str
    model: str = "qwen3"
    settings: Mapping[str, Any] = field(default_factory=dict)
    drawn: bool = False
    rounds: int = 1
    retracts: bool = False


_PLAIN = {"enable_decode_cuda_graph": 0, "enable_cuda_graph": 0}
CASES = (
    *(Case(model, model) for model in MODELS),
    *(Case(model, model, {"compile_model": 0}) for model in FOREIGN),
    Case("asked twice", rounds=2),
    Case("without CUDA graphs", settings=_PLAIN),
    Case("without overlap", settings={"overlap_schedule": 0}),
    Case("PyTorch's operators", settings={"kernels": "reference", "compile_model": 0}),
    Case("ATTN_IMPL=sdpa, a sliding window", "mistral", {"attn_impl": "sdpa"}),
    Case("ATTN_IMPL=eager", settings={"attn_impl": "eager"}),
    Case("pages of one token", settings={"page_size_tokens": 1}),
    Case("pages of 256 tokens", settings={"page_size_tokens": 256}),
    Case("prompts in chunks of 32", settings={"prefill_chunk_size": 32}),
    Case("a small pool", settings={"kv_token_budget": 448}, retracts=True),
    Case("a tier in host memory", settings={"page_token_budget": 8192}, rounds=2),
    Case("speculation", settings={"speculation": "prompt_lookup"}),
    Case("tokens drawn", drawn=True),
    Case("tokens drawn, without CUDA graphs", settings=_PLAIN, drawn=True),
)


def save_model(name: str, folder: Path) -> Any:
    """A random model of transformers, in float32 on the host, saved to ``folder``."""
    from transformers import AutoConfig, AutoModelForCausalLM, logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()

    config = AutoConfig.for_model(name, **_COMMON, **MODELS.get(name, FOREIGN.get(name, {})))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            # Large enough for differences to show.
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1.0 + 0.3 * noise if parameter.ndim == 1 else 0.1 * noise)
    model.tie_weights()
    model.save_pretrained(folder)
    return model.eval()


def prompts(tiny: bool) -> list[list[int]]:
    draw = random.Random(0)
    lengths = (1, 3, 20) if tiny else (1, 3, 17, 40, 90, 150, 300, 33, 64, 5, 128, 200)
    return [[draw.randint(3, VOCAB - 1) for _ in range(length)] for length in lengths]


def params(case: Case, number: int, count: int) -> SamplingParams:
    way: Mapping[str, Any] = _DRAWN[number % len(_DRAWN)] if case.drawn else {"temperature": 0.0}
    return SamplingParams(max_new_tokens=count, ignore_eos=True, seed=number, **way)


@torch.inference_mode()
def expected(
    model: Any, case: Case, asked: Sequence[list[int]], count: int
) -> tuple[list[list[int]], list[list[float]]]:
    """What follows each prompt by transformers' logits, all of them anew for each token; and how far apart
    the two largest were."""
    sampler, answers, gaps = Sampler(VOCAB), [], []
    for number, prompt in enumerate(asked):
        ids = list(prompt)
        gaps.append([])
        for index in range(count):
            logits = (
                model(torch.tensor([ids], device=model.device), use_cache=False).logits[:, -1].float().cpu()
            )
            first, second = logits[0].topk(2).values.tolist()
            gaps[-1].append(first - second)
            spec = SampleSpec(params(case, number, count), number, index)
            chosen = sampler.sample(logits, [spec])[0].token_id
            assert chosen is not None
            ids.append(chosen)
        answers.append(ids[len(prompt) :])
    return answers, gaps


def run(
    case: Case, folder: Path, device: str, asked: Sequence[list[int]], count: int
) -> tuple[list[list[int]], str]:
    """The engine's answers in the last round, and how it ran."""
    given = {
        "device": device, "dtype": "fp32", "max_batch_size": 16, "kv_token_budget": 8192, **case.settings,
    }  # fmt: skip
    settings = Settings.resolve(given)
    backend = load_backend(folder, settings)
    try:
        core = EngineCore(backend, settings, frozenset())
        for round_ in range(case.rounds):
            answers: list[list[int]] = [[] for _ in asked]
            for number, prompt in enumerate(asked):
                request = core.make_request(f"{round_} {number}", prompt, params(case, number, count))
                core.add(request)
            while core.has_work:
                for event in core.step():
                    if event.error is not None:
                        raise RuntimeError(event.error)
                    answers[int(event.request_id.split()[1])].extend(event.token_ids)
        stats, about = core.stats(), backend.describe()
    finally:
        release(backend)
    if case.retracts and not stats["retractions"]:
        raise RuntimeError("nothing was retracted")
    how = f"{about['attention']}; CUDA graphs {about['cuda_graphs']}; {stats['overlapped_steps']} overlapped"
    return answers, f"{how} of {stats['steps']} steps"


def compared(device: str, tiny: bool, cases: Sequence[Case] = CASES) -> Iterator[dict[str, Any]]:
    """A row for each case: how many of its answers are others than they should be."""
    asked, count = prompts(tiny), 3 if tiny else 24
    right: dict[tuple[str, bool], tuple[list[list[int]], list[list[float]]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        models: dict[str, Any] = {}
        for case in cases:
            where = Path(folder) / case.model
            if case.model not in models:
                models[case.model] = save_model(case.model, where).to(device)
            if (case.model, case.drawn) not in right:
                right[case.model, case.drawn] = expected(models[case.model], case, asked, count)
            row: dict[str, Any] = {"name": case.name, "value": None, "unit": "wrong", "ok": False}
            try:
                answers, how = run(case, where, device, asked, count)
            except Exception as failure:
                row["note"] = f"{type(failure).__name__}: {failure}"[:300]
            else:
                wrong = [*_parted(answers, *right[case.model, case.drawn])]
                note = f"of {len(asked)}; {how}"
                row |= {"value": float(len(wrong)), "ok": not wrong, "note": "; ".join([*wrong[:1], note])}
            yield row


def _parted(
    answers: Sequence[list[int]], right: Sequence[list[int]], gaps: Sequence[list[float]]
) -> Iterator[str]:
    """Of each answer that is another: where it parts, and how near another token was there."""
    for number, (ours, theirs, near) in enumerate(zip(answers, right, gaps, strict=True)):
        if ours != theirs:
            pairs = zip(ours, theirs, strict=False)
            at = next((place for place, (a, b) in enumerate(pairs) if a != b), min(len(ours), len(theirs)))
            gap = f"{near[at]:.2g}" if at < len(near) else "nothing"
            yield f"prompt {number} parts at token {at}, where the two largest logits are {gap} apart"


def answers(part: Part) -> None:
    import importlib.util

    if importlib.util.find_spec("transformers") is None:
        part.row("transformers", None, note="skipped: transformers is not installed")
        return
    cases = CASES
    if part.device != "cuda":
        # What a CPU has too, and few: the interpreter would take minutes.
        cases = tuple(case for case in CASES if case.settings.keys() <= {"attn_impl", "prefill_chunk_size"})
    for row in compared(part.device, part.tiny, cases[part.share :: part.shares]):
        part.row(row.pop("name"), row.pop("value"), row.pop("unit"), row.pop("note"), **row)
