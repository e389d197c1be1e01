"""Triton compiles the kernels for GPUs that are not here, and they fit these."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


# A Q6_K product takes the longest to compile; the tile for many features is the larger one.
@pytest.mark.parametrize(
    ("capability", "kinds"),
    [
        (90, ("16,8,128", "bfloat16", "Q4_K", "1024 9216", "151936,1")),
        (86, ("14,2,64", "float16", "Q6_K", "9216", "49153,64")),
    ],
    ids=["sm90", "sm86"],
)
def test_every_kernel_compiles_without_spilling(
    capability: int, kinds: tuple[str, ...], tmp_path: Path
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "tests.backend.kernels.triton.compile_all", str(capability), *kinds]
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[4]
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    names = {name.split()[1] for name in said["kernels"]}
    operations = {"add_and_norm", "rotate_and_store", "silu_and_mul"}
    if capability >= 89:
        operations.add("round_row")
    attention = {"attend", "attend_chunk", "merge"}
    choosing = {"find_best", "weigh_parts", "pick_tokens", "take_chosen"}
    choosing |= {"find_peaks", "find_thresholds", "gather_largest", "pick_ranked"}
    products = {"multiply", "add_parts", "unpack", "few_rows"}
    assert names == {*attention, *operations, *products, *choosing}
    for name, taken in said["kernels"].items():
        assert taken["shared"] <= said["shared"] and taken["stack"] <= 16, (name, taken)
