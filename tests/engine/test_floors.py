"""Imports point down: api → engine → backend, and the engine does without torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import mini_sglang

PACKAGE = Path(mini_sglang.__file__).parent
ENGINE_MODULES = [
    "scheduler",
    "radix",
    "pages",
    "kv_cache",
    "cache_limits",
    "cache_file",
    "host_link",
    "host_tier",
    "prompt_cache",
    "saved_cache",
    "warming",
    "request",
    "engine",
    "worker",
    "handle",
    "limits",
    "flights",
    "slots",
    "routing",
    "pool",
    "admission",
    "process",
    "child",
    "process_main",
    "wire",
]
# Which modules of the package each floor may import; a name covers what lies below it.
GROUND = {"config", "setting", "types", "errors", "logs"}
ALLOWED = {
    "text": GROUND | {"text", "backend.loading"},  # a GGUF file holds its tokenizer
    "backend": GROUND | {"backend"},
    "engine": {"config", "types", "errors", "backend.step", "engine"},
    "api": GROUND | {"api", "engine", "backend", "text"},
}
FORBIDDEN_TO_GROUND = {"text", "backend", "engine", "api", "cli"}


def imports(path: Path) -> set[str]:
    """Absolute names of all modules a file imports, inside functions too."""
    found: set[str] = set()
    here = ("mini_sglang", *path.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = list(here[: len(here) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            # What is imported may be a module of its own.
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def own(names: set[str]) -> set[str]:
    """Those within the package, without its name."""
    return {name.removeprefix("mini_sglang.") for name in names if name.startswith("mini_sglang.")}


def covers(allowed: set[str], name: str) -> bool:
    return any(name == one or name.startswith(one + ".") for one in allowed)


@pytest.mark.parametrize("floor", sorted(ALLOWED))
def test_imports_point_down(floor: str) -> None:
    files = sorted((PACKAGE / floor).rglob("*.py"))
    assert files
    for path in files:
        wrong = {name for name in own(imports(path)) if not covers(ALLOWED[floor], name)}
        assert not wrong, f"{path.relative_to(PACKAGE)} imports {sorted(wrong)}"


def test_the_ground_imports_no_floor() -> None:
    for name in sorted(GROUND):
        wrong = {n for n in own(imports(PACKAGE / f"{name}.py")) if covers(FORBIDDEN_TO_GROUND, n)}
        assert not wrong, f"{name}.py imports {sorted(wrong)}"


def test_the_engine_never_imports_torch() -> None:
    for path in [*(PACKAGE / "engine").rglob("*.py"), PACKAGE / "backend" / "step.py"]:
        roots = {name.split(".")[0] for name in imports(path)}
        assert not roots & {"torch", "numpy", "transformers"}, path


def test_importing_the_engine_leaves_torch_out() -> None:
    modules = [
        f"mini_sglang.{name}" for name in (*(f"engine.{one}" for one in ENGINE_MODULES), "backend.step")
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules}:\n"
        "    importlib.import_module(name)\n"
        "    assert 'torch' not in sys.modules, f'{name} imports torch'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
