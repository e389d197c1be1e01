"""Where the microseconds of a decode step go: products, attention, what is between, sampling, Python, text.

    python benchmarks/step_profile.py [--model MODEL] [--streams 1 16 64] [--context 200] [--threads 2]

An engine without its thread runs decode steps of so many requests; every part is the median over the steps,
of the wall clock. The kernels' parts are run again by themselves, each kind in one call: their sum may
differ from the whole. The last line is the least that reading the step's bytes takes at the measured
bandwidth.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from mini_sglang import SamplingParams
from mini_sglang.backend.openmp import sleeping_openmp

# As the engine does it: else torch's threads, which spin after each operator, take the kernels' cores.
with sleeping_openmp():
    import torch

from mini_sglang.backend.device import choose_threads
from mini_sglang.backend.kernels.jobs import Entry, Job
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.kernels.program import StepProgram
from mini_sglang.backend.loader import load_backend
from mini_sglang.backend.loading.source import resolve_model
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.bench.machine import measure_limits
from mini_sglang.config import Settings
from mini_sglang.engine.engine import EngineCore
from mini_sglang.text.tokenizer import load_tokenizer


class Stopwatch:
    """Seconds that calls of wrapped methods take, by name, for the step that is going on."""

    def __init__(self) -> None:
        self.now: dict[str, float] = {}
        self.steps: dict[str, list[float]] = {}
        # The kernels' parts are run again on what the last step was told: it must still be there.
        self.kept: dict[str, Any] = {}

    def wrap(self, owner: Any, method: str, name: str) -> None:
        inner = getattr(owner, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            self.kept[name] = args
            start = time.perf_counter()
            try:
                return inner(*args, **kwargs)
            finally:
                self.now[name] = self.now.get(name, 0.0) + time.perf_counter() - start

        setattr(owner, method, timed)

    def close_step(self) -> None:
        for name, seconds in self.now.items():
            self.steps.setdefault(name, []).append(seconds)
        self.now.clear()

    def median(self, name: str) -> float:
        return statistics.median(self.steps[name])


def kernel_times(program: StepProgram, kernels: NativeKernels, rows: int, rounds: int) -> dict[str, float]:
    """Seconds of the jobs of each kind, of one step over ``rows`` rows as they are in the buffers."""
    kinds: dict[str, list[Job]] = {}
    for job in program.jobs:
        kinds.setdefault(type(job).__name__, []).append(job)
    times = {}
    for name, jobs in kinds.items():
        entries = (Entry * len(jobs))(*map(Entry.of, jobs))
        times[name] = median_of(lambda entries=entries: kernels.run_all(entries, rows), rounds)  # type: ignore[misc]
    return times


def median_of(work: Callable[[], Any], rounds: int) -> float:
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def profile(
    backend: ModelBackend, settings: Settings, path: Path, streams: int, context: int, steps: int
) -> None:
    program, kernels = backend.program, backend.program.kernels if backend.program else None
    if program is None or kernels is None:
        raise SystemExit("This model does not run as a recorded step here.")
    core = EngineCore(backend, settings, frozenset())
    watch = Stopwatch()
    for owner, method, name in (
        (core, "step", "step"),
        (core.scheduler, "schedule", "scheduling"),
        (backend, "run", "backend"),
        (core._postprocessor, "take", "results to events"),
        (program, "forward", "forward"),
        (kernels, "run_all", "kernels"),
        (backend.decoder, "logits", "head"),
        (backend.sampler, "sample", "sampling"),
    ):
        watch.wrap(owner, method, name)
    tokenizer = load_tokenizer(path, cache_dir=settings.cache_path)
    texts = [tokenizer.detokenizer() for _ in range(streams)]
    generator = torch.Generator().manual_seed(0)
    # Those that begin first go on while others begin, and all are to be there to the end.
    params = SamplingParams(max_new_tokens=steps + streams + 8, temperature=0, ignore_eos=True)
    for number in range(streams):
        ids = torch.randint(3, backend.vocab_size, (context - steps // 2,), generator=generator).tolist()
        core.add(core.make_request(str(number), ids, params))
    ready: set[str] = set()
    while len(ready) < streams:
        ready.update(event.request_id for event in core.step())
    watch.now.clear()
    for _ in range(steps):
        events = core.step()
        start = time.perf_counter()
        for event in events:
            texts[int(event.request_id)].push(event.token_ids)
        watch.now["text"] = time.perf_counter() - start
        watch.close_step()
    if (rows := len(watch.kept["forward"][0].token_ids)) != streams:
        raise SystemExit(
            f"The last step had {rows} of {streams} streams: they do not fit in the pool together."
        )
    parts = kernel_times(program, kernels, streams, 9)
    median = watch.median
    inside = median("backend") - median("forward") - median("head") - median("sampling")
    lines = {
        **{f"kernels: {name}": seconds for name, seconds in parts.items()},
        "kernels: all, in one call": median("kernels"),
        "head (a product)": median("head"),
        "sampling": median("sampling"),
        "Python: embedding, rotations, slots": median("forward") - median("kernels"),
        "Python: batch and results": inside,
        "Python: scheduling": median("scheduling"),
        "Python: results to events": median("results to events"),
        "text (outside the step)": median("text"),
        "step": median("step"),
    }
    print(f"\n{streams} streams, about {context} tokens of context")
    for name, seconds in lines.items():
        print(f"  {name:38} {seconds * 1e6:9.0f} us")
    per_token = int(backend.describe()["kv_bytes_per_token"])
    read = int(backend.describe()["weight_bytes"]) + streams * context * per_token
    bandwidth = measure_limits(choose_threads(settings.num_threads)).bandwidth_gb_s
    least = read / bandwidth / 1e9
    print(
        f"  {read / 1e6:.0f} MB at {bandwidth:.1f} GB/s {'':20} {least * 1e6:9.0f} us: "
        f"{least / median('step'):.0%} of the step"
    )
    for request in range(streams):
        core.abort(str(request))


def main(argv: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", help="by default what the engine would take")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--kv-dtype", default="auto")
    parser.add_argument("--dequantize", action="store_true")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--context", type=int, default=200)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args(None if argv is None else list(argv))
    settings = Settings.resolve(
        {
            "model": args.model,
            "num_threads": args.threads,
            "dtype": args.dtype,
            "kv_dtype": args.kv_dtype,
            "gguf_dequantize": "1" if args.dequantize else "auto",
        }
    )
    path = resolve_model(settings, notify=lambda line: print(line, file=sys.stderr)).path
    print(load_backend(path, settings).describe())
    for streams in args.streams:
        profile(load_backend(path, settings), settings, path, streams, args.context, args.steps)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
