"""What a start leaves out and what it leaves behind; how long it takes: ``benchmarks/start_bench.py``."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mini_sglang.backend.openmp import sleeping_openmp
from mini_sglang.cli.face import load_engine
from mini_sglang.errors import ModelNotFoundError

# What the package uses somewhere, but no answer in a terminal, and what is often imported along with torch.
UNUSED = {
    "IPython",
    "huggingface_hub",
    "llguidance",
    "matplotlib",
    "mini_sglang.api.server",
    "mini_sglang.backend.loading.download",
    "mpmath",
    "pandas",
    "psutil",
    "requests",
    "safetensors",
    "scipy",
    "sklearn",
    "starlette",
    "sympy",
    "tensorflow",
    "torch._dynamo",
    "torch._inductor",
    "torchvision",
    "transformers",
    "triton",
    "uvicorn",
    "zmq",
}


def run_python(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
    inherited = {name: value for name, value in os.environ.items() if name not in names}
    paths = {"PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        env=inherited | paths | environment,
    )
    assert done.returncode == 0, done.stderr
    return done


def modules_of(code: str, *arguments: str) -> set[str]:
    told = "import atexit, json, sys\natexit.register(lambda: print('\\n' + json.dumps(list(sys.modules))))\n"
    return set(json.loads(run_python(told + code, *arguments).stdout.splitlines()[-1]))


GENERATE = (
    "from mini_sglang.cli import main\n"
    "assert main(['generate', '--quiet', '--max-new-tokens', '1', '--model', sys.argv[1], 'Hi']) == 0"
)


def test_an_answer_in_the_terminal_imports_only_what_it_uses(starter_gguf: Path) -> None:
    loaded = modules_of(GENERATE, str(starter_gguf))
    assert {"torch", "tokenizers", "jinja2"} <= loaded
    unused = UNUSED - modules_of("import torch")
    assert {"transformers", "torch._dynamo", "starlette", "llguidance"} <= unused
    assert not unused & loaded


@pytest.mark.parametrize("words", [["--help"], ["generate", "--help"], ["serve", "--help"], ["settings"]])
def test_help_imports_nothing_that_takes_long(words: list[str]) -> None:
    loaded = modules_of(f"from mini_sglang.cli import main\nassert main({words}) == 0")
    assert not (UNUSED | {"jinja2", "msgspec", "numpy", "tokenizers", "torch", "tqdm"}) & loaded


@pytest.mark.parametrize(("chosen", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "active"}, "ACTIVE")])
def test_openmp_waits_asleep_unless_told_otherwise(
    chosen: dict[str, str], policy: str, starter_gguf: Path
) -> None:
    told = GENERATE + "\nimport os; print(os.environ.get('OMP_WAIT_POLICY'))"
    done = run_python("import sys\n" + told, str(starter_gguf), OMP_DISPLAY_ENV="true", **chosen)
    # The library itself says on standard error what it goes by.
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr
    assert done.stdout.splitlines()[-1] == chosen.get("OMP_WAIT_POLICY", "None")


@pytest.mark.parametrize("name", ["OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME"])
def test_a_way_to_wait_that_the_user_chose_stays(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setenv(name, "7")
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    before = dict(os.environ)
    with sleeping_openmp():
        assert os.environ == before
    assert os.environ == before


def test_a_failed_start_collects_garbage_again(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError):
        load_engine(model=str(tmp_path / "none.gguf"))
    assert gc.isenabled()
    gc.unfreeze()
