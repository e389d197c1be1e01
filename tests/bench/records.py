"""Small records of every kind, as the benchmarks write them, with figures that are made up from a seed."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

Json = dict[str, Any]

PEERS = (
    ("ours", "mini-sglang", 33.0, 1.0, 0.16),
    ("transformers", "Hugging Face generate", 17.0, 1.0, 0.29),
    ("sglang", "sglang 0.5.23", 16.5, 0.99, 0.35),
    ("vllm", "vLLM 0.32 CPU", 32.8, 0.98, 0.20),
    ("openvino", "OpenVINO GenAI", 79.0, 0.31, 0.09),
)


def envelope(kind: str, rows: list[Json], runs: list[Json], **more: Any) -> Json:
    return {
        "format": 1,
        "kind": kind,
        "command": f"mini-sglang bench {kind} --json {kind}.json",
        "started": "2026-11-26T05:00:00+00:00",
        "commit": "0123456789ab",
        "machine": {
            "cpu": "Some CPU @ 3.00GHz",
            "cores": 2,
            "flags": "avx2",
            "memory_gb": 16.7,
            "system": "Linux",
            "python": "3.11.7",
        },
        "limits": {"bandwidth_gb_s": 40.0, "matrix_gflop_s": 450.0, "threads": 2},
        "versions": {"mini-sglang": "0.1.0", "torch": "2.13.0"},
        "settings": {"model": "SmolLM2-135M-Instruct", "rounds": 3, "seed": 0},
        "rows": rows,
        "runs": runs,
        **more,
    }


def peer_row(peer: str, rate: float | None, **more: Any) -> Json:
    row: Json = {
        "peer": peer,
        "title": peer,
        "group": "bf16",
        "valid": rate is not None,
        "reason": None if rate is not None else "it did not run",
        "tokens": 64,
        "seconds": None if rate is None else 64 / rate,
        "tokens_per_s": rate,
        "ttft": 0.1,
        "itl": 0.03,
        "ratio": None if peer == "ours" else 1.0,
        "agree": 1.0,
        "same_until": 64,
        "peak_mb": 500.0,
        "start_seconds": 2.0,
        "notes": [],
    }
    return {**row, **more}


def peer_run(peer: str, seconds: float, tokens: int = 64, first: float = 0.1, **more: Any) -> Json:
    step = (seconds - first) / max(1, tokens - 1)
    run: Json = {
        "peer": peer,
        "round": 0,
        "turn": 0,
        "prompt_tokens": [40],
        "ids": [list(range(tokens))],
        "seconds": seconds,
        "times": [[first + i * step for i in range(tokens)]],
        "cpu_seconds": seconds,
        "peak_bytes": 500_000_000,
        "others": 0.1,
        "valid": True,
        "reason": None,
    }
    return {**run, **more}


def local_record(kind: str = "local", seed: int = 0) -> Json:
    """Five peers with three rounds of three turns, one whose answer was too short, and one not installed."""
    chance = random.Random(seed)
    rows, runs = [], []
    for name, title, rate, agree, first in PEERS:
        noisy = [rate * chance.uniform(0.93, 1.05) for _ in range(9)]
        # Each turn has 64 tokens: a round's rate is the harmonic mean of its turns'.
        middle = sorted(3 / sum(1 / one for one in noisy[i : i + 3]) for i in (0, 3, 6))[1]
        rows.append(
            peer_row(
                name,
                middle,
                title=title,
                agree=agree,
                ttft=first,
                ratio=None if name == "ours" else 33 / rate,
            )
        )
        for i, one in enumerate(noisy):
            first_id = first * chance.uniform(0.9, 1.3)
            runs.append(peer_run(name, 64 / one, first=first_id, round=i // 3, turn=i % 3))
    short = {"valid": False, "reason": "60 of 64 tokens", "tokens": 60}
    rows.append({**peer_row("batching", 70.0, title="HF continuous batching"), **short})
    runs.append(peer_run("batching", 60 / 70, tokens=60, valid=False, reason="60 of 64 tokens"))
    reason = "llama is not installed: mini-sglang bench install llama"
    rows.append(peer_row("llama", None, title="llama-cpp-python", reason=reason))
    return envelope(kind, rows, runs, versions={"mini-sglang": "0.1.0", "vllm": "0.32.0"})


def load_row(rate: float | None, completed: int = 40, **more: Any) -> Json:
    wait = 0.1 if rate is None else 0.1 + rate * rate / 40

    def figures(middle: float) -> Json:
        if not completed:
            return dict.fromkeys(("mean", "p50", "p90", "p99"))
        return {"mean": middle * 1.1, "p50": middle, "p90": middle * 2, "p99": middle * 4}

    done = min(rate or 6.0, 6.0)
    row: Json = {
        "request_rate": rate,
        "concurrency": None if rate else 8,
        "requests": 40,
        "completed": completed,
        "errors": 40 - completed,
        "duration": 40 / done,
        "input_tokens": 4000,
        "output_tokens": 32 * completed,
        "request_throughput": done,
        "output_throughput": 32 * done,
        "total_throughput": 132 * done,
        "goodput": done * 0.8,
        "ttft": figures(wait),
        "tpot": figures(wait / 8),
        "itl": figures(wait / 8),
        "e2e": figures(wait * 5),
    }
    return {**row, **more}


def request(number: int, sent: float, first: float, cached: int | None = 0, **more: Any) -> Json:
    times = [first + 0.02 * i for i in range(8)]
    run: Json = {
        "id": number,
        "planned": sent,
        "sent": sent,
        "first": first,
        "times": times,
        "prompt_tokens": 100,
        "output_tokens": 8,
        "cached_tokens": cached,
        "end": times[-1],
        "error": None,
    }
    return {**run, **more}


def serve_record(seed: int = 0) -> Json:
    chance = random.Random(seed)
    runs, now = [], 0.0
    for i in range(60):
        now += chance.expovariate(4)
        wait = chance.lognormvariate(-2, 0.6)
        runs.append(request(i, now, now + wait, cached=min(80, 16 * (i // 4)) if i % 5 else 0))
    broken = {"first": None, "times": [], "end": now + 1, "error": "503 Service Unavailable"}
    runs.append({**request(60, now, now, cached=None), **broken})
    cache = [{"t": float(t), "hit_rate": 0.7 * (1 - 0.8**t)} for t in range(int(now) + 1)]
    settings = {
        "model": "SmolLM2-135M-Instruct",
        "url": "http://127.0.0.1:8000/generate",
        "dialect": "generate",
        "dataset": "shared-prefix",
        "seed": seed,
        "target": None,
    }
    return envelope("serve", [load_row(4.0, cache=cache)], runs, settings=settings)


def sweep_record(slower: float = 1.0) -> Json:
    rows = [load_row(rate * 1.0) for rate in (1, 2, 4, 8, 16)]
    for row in rows:
        for name in ("ttft", "tpot", "itl", "e2e"):
            row[name] = {part: value * slower for part, value in row[name].items()}
        row["output_throughput"] /= slower
    rows.append(load_row(32.0, completed=0))
    runs = [{"rate": 1.0, **request(i, float(i), i + 0.1 + 0.01 * i)} for i in range(5)]
    return envelope("sweep", rows, runs)


def kernel_row(kernel: str, weights: str, rows: int, **more: Any) -> Json:
    size, work = 4_000_000, 6_000_000 * rows
    seconds, twin = 1.2e-4 * (1 + rows / 40), 3e-4 * (1 + rows / 10)
    row: Json = {
        "kernel": kernel,
        "weights": weights,
        "rows": rows,
        "context": 1024 if "attention" in kernel else None,
        "seconds": seconds,
        "torch_seconds": twin,
        "bytes": size,
        "gb_s": size / seconds / 1e9,
        "share": size / seconds / 40e9,
        "gflop_s": work / seconds / 1e9,
        "torch_gflop_s": work / twin / 1e9,
    }
    return {**row, **more}


def kernels_record() -> Json:
    rows = [
        kernel_row("product", weights, rows)
        for weights in ("bfloat16", "Q4_1", "Q8_0")
        for rows in (1, 16, 256)
    ]
    rows += [kernel_row("attention, decode", "bfloat16", rows) for rows in (1, 16)]
    rows.append(kernel_row("attention, decode", "int8", 1, torch_seconds=None, torch_gflop_s=None))
    rows.append(kernel_row("attention, prefill", "bfloat16", 512))
    rows.append(kernel_row("norm", "float32", 1, gflop_s=None, torch_gflop_s=None))
    runs = [
        {
            "kernel": row["kernel"],
            "weights": row["weights"],
            "rows": row["rows"],
            "seconds": [],
            "others": 0.4,
        }
        for row in rows
    ]
    return envelope("kernels", rows, runs, settings={"variant": "avx2", "threads": 2})


def all_records() -> dict[str, Json]:
    return {
        "local": local_record(),
        "server": local_record("server", seed=1),
        "serve": serve_record(),
        "sweep": sweep_record(),
        "kernels": kernels_record(),
    }


def write(folder: Path, **records: Json) -> list[Path]:
    """Each as ``name.json``."""
    paths = []
    for name, record in records.items():
        path = folder / f"{name}.json"
        path.write_text(json.dumps(record), encoding="utf-8")
        paths.append(path)
    return paths
