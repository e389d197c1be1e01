"""How each peer's server is started on the loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path

from mini_sglang.bench.peers.base import Launch

HOST = "127.0.0.1"
MAX_TOKENS = 20_000
MAX_REQUESTS = 32
BLOCK_TOKENS = 256
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def ours() -> Launch:
    def command(python: str, model: Path, port: int, threads: int) -> list[str]:
        words = ["serve", "--model-local-dir", str(model)]
        if model.is_dir():
            # As every peer does; a CPU that has no fast bfloat16 would otherwise be given float32.
            words += ["--dtype", {"float32": "fp32", "float16": "fp16"}.get(dtype_of(model), "bf16")]
        words += ["--host", HOST, "--port", str(port), "--num-threads", str(threads)]
        return [python, "-m", "mini_sglang", *words]

    # /health answers while the engine still loads.
    return Launch(command, ready="/ready")


def sglang() -> Launch:
    def command(python: str, model: Path, port: int, threads: int) -> list[str]:
        words = ["--model-path", str(model), "--host", HOST, "--port", str(port)]
        words += ["--device", "cpu", "--dtype", dtype_of(model), "--attention-backend", "torch_native"]
        words += ["--sampling-backend", "pytorch", "--disable-overlap-schedule", "--disable-cuda-graph"]
        words += ["--max-total-tokens", str(MAX_TOKENS), "--max-running-requests", str(MAX_REQUESTS)]
        return [python, "-m", "sglang.launch_server", *words]

    def env(threads: int) -> dict[str, str]:
        return {"SGLANG_USE_CPU_ENGINE": "1", "OMP_NUM_THREADS": str(threads), **OFFLINE}

    return Launch(command, env)


def vllm() -> Launch:
    def command(python: str, model: Path, port: int, threads: int) -> list[str]:
        words = ["serve", str(model), "--host", HOST, "--port", str(port), "--dtype", dtype_of(model)]
        words += ["--max-model-len", "2048", "--max-num-seqs", str(MAX_REQUESTS)]
        return [python, "-m", "vllm.entrypoints.cli.main", *words]

    def env(threads: int) -> dict[str, str]:
        cores = sorted(os.sched_getaffinity(0))[:threads]
        return {
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, cores)),
            "OMP_NUM_THREADS": str(threads),
            **OFFLINE,
        }

    return Launch(command, env, seconds=600.0)


def llama_server() -> Launch:
    def command(python: str, model: Path, port: int, threads: int) -> list[str]:
        words = ["--model", str(model), "--host", HOST, "--port", str(port)]
        words += ["--threads", str(threads), "--threads-batch", str(threads), "--threads-http", "2"]
        words += ["--ctx-size", str(MAX_TOKENS), "--parallel", "16", "--kv-unified"]
        return [str(Path(python).with_name("llama-server")), *words]

    return Launch(command, seconds=120.0)


def transformers_serve() -> Launch:
    def command(python: str, model: Path, port: int, threads: int) -> list[str]:
        words = ["serve", str(model), "--host", HOST, "--port", str(port), "--device", "cpu"]
        words += ["--dtype", dtype_of(model), "--continuous-batching", "--attn-implementation", "sdpa"]
        words += ["--cb-num-blocks", "80", "--cb-max-batch-tokens", "2048"]
        words += ["--cb-block-size", str(BLOCK_TOKENS)]
        return [python, "-m", "transformers.cli.transformers", *words]

    def env(threads: int) -> dict[str, str]:
        return {"OMP_NUM_THREADS": str(threads), **OFFLINE}

    return Launch(command, env)


def dtype_of(folder: Path) -> str:
    """What the folder's weights are in, by torch's name; ``bfloat16`` where it does not say."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "bfloat16"
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
