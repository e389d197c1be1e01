"""Every peer can be got, run and asked, or only a URL reaches it; nothing here needs one installed."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_sglang.bench.peers import launches, recipes
from mini_sglang.bench.peers.base import Peer, Recipe
from mini_sglang.bench.peers.registry import all_peers, chosen_peers, environment, interpreter, version
from mini_sglang.bench.process import WORKERS, PeerError
from mini_sglang.config import VERSION

ROOT = Path(__file__).parents[3]
PEERS = list(all_peers().values())
OWN_LIBRARY = {
    "sglang": {"sglang", "sgl_kernel", "torch"},
    "transformers": {"transformers", "torch"},
    "dequantize": {"transformers", "torch"},
    "reference": {"transformers", "torch"},
    "hf_batching": {"transformers", "torch"},
    "vllm": {"vllm", "torch"},
    "llama": {"llama_cpp", "numpy"},
    "openvino": {"openvino", "openvino_genai", "numpy"},
    "limits": {"torch"},
    "ours": {"mini_sglang"},
}


@pytest.mark.parametrize("peer", PEERS, ids=lambda peer: peer.name)
def test_a_peer_is_run_or_reached_by_url(peer: Peer):
    assert peer.weights in ("folder", "gguf", "any")
    if peer.worker is None and peer.launch is None:
        assert peer.recipe is None and peer.distribution is None
    elif peer.name != "ours":
        assert peer.recipe is not None and peer.distribution and peer.recipe.module and peer.recipe.steps
    if peer.environment:
        assert all_peers()[peer.environment].recipe.steps == peer.recipe.steps
    if peer.worker:
        assert (WORKERS / f"run_{peer.worker}.py").is_file()


@pytest.mark.parametrize("script", sorted(WORKERS.glob("run_*.py")), ids=lambda path: path.stem)
def test_a_worker_needs_its_own_library_and_nothing_else(script: Path):
    tree = ast.parse(script.read_text(encoding="utf-8"), str(script))
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, "a script has no package"
            names.add(node.module.split(".")[0])
    foreign = names - sys.stdlib_module_names - {"worker_protocol"}
    assert foreign <= OWN_LIBRARY[script.stem.removeprefix("run_")]


def test_the_workers_end_needs_the_standard_library_alone():
    done = subprocess.run(
        [sys.executable, "-S", "-I", str(WORKERS / "worker_protocol.py")], capture_output=True
    )
    assert done.returncode == 0, done.stderr


def test_peers_come_in_the_order_asked_for_and_an_unknown_one_is_named():
    assert [peer.name for peer in chosen_peers(["vllm", "ours"])] == ["vllm", "ours"]
    with pytest.raises(PeerError, match=r"There is no peer 'vlm'; the peers are ours, sglang, .*ollama\."):
        chosen_peers(["ours", "vlm"])


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer.launch], ids=lambda peer: peer.name)
def test_a_server_is_started_on_the_loopback_with_its_threads(peer: Peer, tmp_path: Path):
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"dtype": "float32"}))
    python = str(tmp_path / "bin" / "python")
    command = peer.launch.command(python, model, 4321, 3)
    assert all(isinstance(word, str) for word in command)
    assert Path(command[0]).parent == tmp_path / "bin"
    assert {"127.0.0.1", "4321", str(model)} <= set(command)
    variables = peer.launch.env(3)
    assert "3" in command or variables["OMP_NUM_THREADS"] == "3"
    assert all(isinstance(value, str) for value in variables.values())
    assert peer.launch.ready.startswith("/") and peer.launch.seconds > 0


def test_a_server_of_ours_takes_what_it_is_given(tmp_path: Path):
    """The command line's own parser accepts the words, for a folder and for a file."""
    from mini_sglang.cli.args import chosen_settings, command_parser
    from mini_sglang.config import Settings

    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"torch_dtype": "float32"}')
    for model in (folder, tmp_path / "model.gguf"):
        words = launches.ours().command("python", model, 4321, 3)
        settings = Settings.resolve(chosen_settings(command_parser().parse(words[3:])))
        assert (settings.host, settings.port, settings.num_threads) == ("127.0.0.1", 4321, 3)
        assert settings.model_local_dir == model
    assert "fp32" in launches.ours().command("python", folder, 4321, 3)


def test_vllms_server_has_intels_openmp_first_where_its_environment_has_it(tmp_path: Path):
    launch = launches.vllm()
    python = str(tmp_path / "bin" / "python")
    plain = launch.command(python, tmp_path, 1, 1)
    library = tmp_path / "lib" / "libiomp5.so"
    library.parent.mkdir()
    library.touch()
    assert launch.command(python, tmp_path, 1, 1) == ["env", f"LD_PRELOAD={library}", *plain]


def test_the_dtype_is_the_folders_own(tmp_path: Path):
    assert launches.dtype_of(tmp_path) == "bfloat16"
    config = tmp_path / "config.json"
    config.write_text("not JSON")
    assert launches.dtype_of(tmp_path) == "bfloat16"
    config.write_text("[1]")
    assert launches.dtype_of(tmp_path) == "bfloat16"
    config.write_text('{"torch_dtype": "float16"}')
    assert launches.dtype_of(tmp_path) == "float16"
    config.write_text('{"dtype": "float32", "torch_dtype": "float16"}')
    assert launches.dtype_of(tmp_path) == "float32"


def test_vllm_is_asked_for_no_more_context_than_the_model_has(tmp_path: Path):
    def asked() -> str:
        command = launches.vllm().command("python", tmp_path, 1, 1)
        return command[command.index("--max-model-len") + 1]

    config = tmp_path / "config.json"
    assert asked() == "4096"
    for own, expected in ((512, "512"), (131072, "4096"), (None, "4096")):
        config.write_text(json.dumps({"max_position_embeddings": own}))
        assert asked() == expected


def test_an_interpreter_of_the_users_choosing_goes_first(monkeypatch, tmp_path):
    peer = Peer("tiny", "Tiny", "nobody-has-this", "gguf", recipe=recipes.openvino())
    with pytest.raises(PeerError, match=r"^tiny is not installed: mini-sglang bench install tiny$"):
        interpreter(peer)
    monkeypatch.setenv("BENCH_TINY_PYTHON", sys.executable)
    assert interpreter(peer) == sys.executable
    assert version(peer) is None
    monkeypatch.setenv("BENCH_TINY_PYTHON", str(tmp_path / "none"))
    with pytest.raises(PeerError, match=r"BENCH_TINY_PYTHON is '.*none', which cannot be run"):
        interpreter(peer)


def test_peers_of_one_environment_share_its_variable(monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.symlink_to(sys.executable)
    monkeypatch.setenv("BENCH_HF_PYTHON", str(python))
    shared = chosen_peers(["hf", "hf-batching", "hf-serve"])
    assert {interpreter(peer) for peer in shared} == {str(python)}
    assert len({environment(peer) for peer in shared}) == 1
    monkeypatch.setenv("BENCH_HF_BATCHING_PYTHON", sys.executable)
    assert [interpreter(peer) for peer in shared] == [str(python), sys.executable, str(python)]


def test_what_this_python_has_can_be_used_as_it_is():
    here = Peer("here", "Here", "pytest", "gguf", recipe=Recipe((("pytest",),), module="pytest.some"))
    assert interpreter(here) == sys.executable
    assert version(here) == pytest.__version__
    half = Peer(
        "half", "Half", "pytest", "gguf", recipe=Recipe((("pytest[all]",),), module="nobody_has_this")
    )
    assert version(half) is None
    ours = all_peers()["ours"]
    assert interpreter(ours) == sys.executable and version(ours) == VERSION


def test_a_peer_reached_by_url_has_no_interpreter():
    ollama = all_peers()["ollama"]
    assert version(ollama) is None
    with pytest.raises(PeerError, match=r"ollama is only reached by its URL"):
        interpreter(ollama)


def test_the_registry_imports_no_torch():
    script = (
        "import sys; from mini_sglang.bench.peers import cli, install_cli; from mini_sglang.cli import main; "
        "assert 'torch' not in sys.modules"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
