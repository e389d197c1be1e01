"""How each peer's server is started on the loopback."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from mini_sglang.bench.peers.base import Launch

HOST = "127.0.0.1"
MAX_TOKENS = 20_000
MAX_REQUESTS = 32
MAX_CONTEXT = 4096
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
        words += ["--max-model-len", str(min(context_of(model), MAX_CONTEXT))]
        words += ["--max-num-seqs", str(MAX_REQUESTS)]
        # It asks for Intel's OpenMP, loaded before torch's, which its environment has on x86.
        library = Path(python).parent.parent / "lib" / "libiomp5.so"
        first = ["env", f"LD_PRELOAD={library}"] if library.exists() else []
        return [*first, python, "-m", "vllm.entrypoints.cli.main", *words]

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
    config = config_of(folder)
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def context_of(folder: Path) -> int:
    """The tokens that the folder's model is made for; ``MAX_CONTEXT`` where it does not say."""
    found = config_of(folder).get("max_position_embeddings")
    return found if isinstance(found, int) and found > 0 else MAX_CONTEXT


def config_of(folder: Path) -> dict[str, Any]:
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}
