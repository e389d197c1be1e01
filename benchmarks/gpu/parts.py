"""One part of the GPU benchmark, in a process of its own: ``python -m benchmarks.gpu.parts PART OPTIONS``.

What it finds goes out line by line, as rows in JSON behind ``@``, so that a part that is cut off leaves what
it had. OPTIONS is a JSON object: device, tiny, settings, bandwidth.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.gpu.workload import FULL, TINY, Size, requests, write_config

# Of the engine, for many requests at once; --set goes before them.
SETTINGS = {"max_batch_size": 256, "prefill_chunk_size": 8192}
_LOOK_SECONDS = 2.0


class Part:
    """What a part is given."""

    def __init__(self, options: dict[str, Any]) -> None:
        self.device: str = options["device"]
        self.tiny: bool = options["tiny"]
        self.settings: dict[str, Any] = options["settings"]
        self.bandwidth: float | None = options.get("bandwidth")
        self.done: int = options.get("done", 0)
        self.share: int = options.get("share", 0)
        self.shares: int = options.get("shares", 1)
        self._options = options
        self.size: Size = TINY if self.tiny else FULL

    def row(self, name: str, value: float | None, unit: str = "", note: str = "", **more: Any) -> None:
        """Say a figure; a later one of the same name takes its place."""
        print(
            "@" + json.dumps({"name": name, "value": value, "unit": unit, "note": note, **more}), flush=True
        )

    def begin_anew(self, name: str, done: int) -> None:
        """Go on in the place of this process, whose device does nothing more after a fault in a kernel."""
        given = json.dumps({**self._options, "done": done})
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu.parts", name, given])

    def wait(self) -> None:
        """For what the device was given to do."""
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()

    def fastest(self, work: Callable[[], object], repeats: int = 20) -> float:
        """Seconds of the best of some runs, after one to warm up."""
        best = float("inf")
        for _ in range(repeats + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            best = min(best, time.perf_counter() - start)
        return best


def device(part: Part) -> None:
    """What the card is, and which packages there are."""
    import torch

    versions = {}
    for name in ("torch", "triton", "transformers", "flashinfer-python", "flash-attn"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if part.device != "cuda":
        part.row("device", None, note="the CPU, as a rehearsal: its figures say nothing", versions=versions)
        return
    if not torch.cuda.is_available():
        part.row("device", None, note="", refused=True)
        return
    card = torch.cuda.get_device_properties(0)
    capability = f"{card.major}.{card.minor}"
    note = f"{card.name}, compute capability {capability}, CUDA {torch.version.cuda}"
    part.row("device", card.total_memory / 1e9, "GB", note, versions=versions)


def kernels(part: Part) -> None:
    import torch

    from mini_sglang.backend.kernels.triton.available import why_no_triton

    where = torch.device(part.device)
    why = why_no_triton(where)
    if why is not None:
        part.row("kernels", None, note=f"skipped: {why}")
        return
    from benchmarks.gpu.kernel_checks import CHECKS, TOLERANCE

    checks = [(check, dtype) for check in CHECKS for dtype in TOLERANCE][part.share :: part.shares]
    for place, (check, dtype) in enumerate(checks[part.done :], part.done + 1):
        name = f"{check.name}, {str(dtype).removeprefix('torch.')}"
        allowed = TOLERANCE[dtype] if check.kernels else 0.0
        try:
            error = check.run(where, dtype, part.tiny)
        except Exception as failure:
            said = " ".join(str(failure).split())
            part.row(name, None, note=f"{type(failure).__name__}: {said}"[:200], ok=False)
            if isinstance(failure, torch.AcceleratorError):
                part.begin_anew("kernels", done=place)
        else:
            part.row(name, error, "error", f"at most {allowed:g}", ok=error <= allowed)


def limits(part: Part) -> None:
    import torch

    def copies() -> float:
        source = torch.zeros(part.size.copy_bytes, dtype=torch.uint8, device=part.device)
        target = torch.empty_like(source)
        return part.fastest(lambda: target.copy_(source))

    part.row("copy bandwidth", 2 * part.size.copy_bytes / copies() / 1e9, "GB/s", "read and written")
    width = part.size.matrix
    left, right = (torch.randn(width, width, device=part.device).bfloat16() for _ in range(2))
    seconds = part.fastest(lambda: left @ right)
    part.row("bf16 matrix product", 2e-12 * width**3 / seconds, "TFLOP/s", f"{width} by {width}")


def engine(part: Part, model: str) -> None:
    """The public workload through the public engine, then one stream."""
    from mini_sglang import Engine, SamplingParams

    with tempfile.TemporaryDirectory() as folder:
        config = write_config(model, Path(folder) / model, part.tiny)
        given = {**SETTINGS, **part.settings, "load_format": "dummy", "device": part.device}
        if part.tiny:
            given.setdefault("kv_token_budget", 4096)
        start = time.perf_counter()
        made = Engine(str(Path(folder) / model), notify=say, **given)
    with made as running:
        described = {key: str(value) for key, value in running.description.items()}
        part.row("start", time.perf_counter() - start, "s", described["attention"], engine=described)

        def params(count: int) -> SamplingParams:
            return SamplingParams(max_new_tokens=count, temperature=0.6, ignore_eos=True)

        # As many rows at once as the workload has, with prompts of another seed.
        warm, _ = requests(part.size, seed=1)
        start = time.perf_counter()
        running.generate(warm, params(16))
        part.row("warm-up", time.perf_counter() - start, "s")
        running.clear_cache()
        _throughput(part, running, params)
        _one_stream(part, running, config)


def _throughput(part: Part, running: Any, params: Callable[[int], Any]) -> None:
    prompts, counts = requests(part.size)
    before, start, over = running.stats(), time.perf_counter(), threading.Event()
    title = "output tokens per second"

    def look() -> None:
        while not over.wait(_LOOK_SECONDS):
            made = running.stats()["decode_tokens"] - before["decode_tokens"]
            seconds = time.perf_counter() - start
            part.row(title, made / seconds, "tokens/s", f"so far: {made} of {sum(counts)} tokens")

    looking = threading.Thread(target=look)
    looking.start()
    try:
        outputs = running.generate(prompts, [params(count) for count in counts])
        seconds = time.perf_counter() - start
    finally:
        over.set()
        looking.join()
    made = sum(len(output.token_ids) for output in outputs)
    after = running.stats()
    told = {
        name: after[name] - before[name]
        for name in ("steps", "retractions", "out_of_memory", "prefix_hit_tokens")
    }
    shown = ", ".join(f"{value} {name}" for name, value in told.items() if value)
    note = f"{made} tokens in {seconds:.2f} s; {shown}"
    part.row(title, made / seconds, "tokens/s", note, tokens=made, seconds=seconds, **told)


def _one_stream(part: Part, running: Any, config: dict[str, Any]) -> None:
    from mini_sglang import SamplingParams

    prompts, _ = requests(part.size, seed=2)
    prompt = prompts[0][: part.size.shortest]

    def seconds(count: int) -> float:
        params = SamplingParams(max_new_tokens=count, temperature=0.0, ignore_eos=True)
        started = time.perf_counter()
        made = len(running.generate(prompt, params).token_ids)
        assert made == count, f"{made} tokens where {count} were asked for"
        return time.perf_counter() - started

    # Whole answers alone are timed: when this thread is woken for a token says little of when it came. The
    # first puts the prompt in the cache.
    seconds(1)
    first, whole = (min(seconds(count) for _ in range(3)) for count in (1, part.size.stream))
    rate = (part.size.stream - 1) / (whole - first)
    # Of an embedding that is not the head too a step reads one row.
    unread = 0 if config["tie_word_embeddings"] else config["vocab_size"] * config["hidden_size"]
    described = running.description
    read = described["weight_bytes"] * (1 - unread / described["parameters"])
    note = f"{read / 1e9:.2f} GB of weights a token"
    part.row("one stream", rate, "tokens/s", note)
    if part.bandwidth:
        share = 100 * rate * read / 1e9 / part.bandwidth
        part.row("one stream, share of bandwidth", share, "%", f"of {part.bandwidth:.0f} GB/s")


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def small(part: Part) -> None:
    engine(part, "Qwen3-0.6B")


def large(part: Part) -> None:
    engine(part, "Qwen3-14B")


def answers(part: Part) -> None:
    from benchmarks.gpu.answers import answers

    answers(part)


def generate(part: Part) -> None:
    from benchmarks.gpu.peers import generate

    generate(part)


def batching(part: Part) -> None:
    from benchmarks.gpu.peers import batching

    batching(part)


PARTS: dict[str, Callable[[Part], None]] = {
    "device": device,
    "kernels": kernels,
    "answers": answers,
    "limits": limits,
    "small": small,
    "large": large,
    "generate": generate,
    "batching": batching,
}


def main() -> int:
    name, options = sys.argv[1:]
    PARTS[name](Part(json.loads(options)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
