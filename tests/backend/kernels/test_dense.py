"""The dense products against float64 and themselves in other company."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from mini_sglang.backend.kernels.library import NativeKernels
from tests.backend.kernels.twins import VARIANTS

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def case(seed: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rng = np.random.default_rng(seed)
    m, n, k = (int(rng.integers(1, high)) for high in (41, 60, 300))
    generator = torch.Generator().manual_seed(seed)
    weight, x = (torch.randn(rows, k, generator=generator).to(dtype) for rows in (n, m))
    return weight, x, torch.randn(n, generator=generator).to(dtype) if seed % 2 else None


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("seed", range(8))
def test_products_are_near_float64_ones(kernels: NativeKernels, seed: int, dtype: torch.dtype) -> None:
    weight, x, bias = case(seed, dtype)
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    scale = x.double().abs() @ weight.double().abs().T
    out = kernels.dense(weight, x, bias)
    assert out.dtype == dtype
    unit = torch.finfo(dtype).eps
    assert ((out.double() - exact).abs() <= 2e-6 * scale + unit * exact.abs() + 1e-7).all()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others_nor_on_the_threads(
    library: Path, variant: str, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 331, generator=generator).to(dtype) for rows in (203, 70))
    results = []
    for threads in (1, 2, 3):
        kernels = NativeKernels(library, threads, variant)
        results += [kernels.dense(weight, x[:rows], None) for rows in (1, 2, 3, 4, 5, 18, 19, 40, 70)]
    for result in results:
        assert torch.equal(result, results[-1][: len(result)])
    assert torch.equal(kernels.dense(weight, x[50:60], None), results[-1][50:60])
    # Nor on which other rows of the matrix share the call.
    assert torch.equal(kernels.dense(weight[5:9], x, None), results[-1][:, 5:9])


def test_what_does_not_fit_is_refused(kernels: NativeKernels) -> None:
    weight = torch.zeros(5, 19)
    with pytest.raises(ValueError, match=r"\[5, 19\]"):
        kernels.dense(weight, torch.zeros(2, 18), None)
    with pytest.raises(ValueError, match="bias"):
        kernels.dense(weight, torch.zeros(2, 19), torch.zeros(4))


def test_a_view_that_is_not_aligned_and_no_rows(kernels: NativeKernels) -> None:
    memory = torch.randn(1 + 5 * 19, generator=torch.Generator().manual_seed(0))
    weight = memory[1:].view(5, 19)
    x = torch.randn(2, 3, 19, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(kernels.dense(weight, x, None), x @ weight.T)
    assert kernels.dense(weight, torch.empty(0, 19), None).shape == (0, 5)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_its_row_alone(kernels: NativeKernels, bad: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 19, generator=generator) for rows in (6, 4))
    clean = kernels.dense(weight, x, None)
    x[1, 18] = bad
    out = kernels.dense(weight, x, None)
    assert not out[1].isfinite().any() and torch.equal(out[[0, 2, 3]], clean[[0, 2, 3]])


def test_half_precision_is_left_to_a_cpu_that_has_it(library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for has_bf16 in (False, True):
        monkeypatch.setattr(
            "mini_sglang.backend.kernels.library.cpu_has_bf16", lambda has_bf16=has_bf16: has_bf16
        )
        kernels = NativeKernels(library, 1)
        assert kernels.has_dense(torch.float32) == kernels.fast
        assert kernels.has_dense(torch.bfloat16) == (kernels.fast and not has_bf16)
        assert not kernels.has_dense(torch.float64)
        assert not NativeKernels(library, 1, "generic").has_dense(torch.float32)


def test_a_forked_child_computes_and_ends(library: Path) -> None:
    kernels = NativeKernels(library, 3)
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(rows, 64, generator=generator) for rows in (500, 2))
    expected = kernels.dense(weight, x, None)
    child = os.fork()
    if child == 0:
        # Neither pytest nor the interpreter may go on in the child.
        try:
            same = torch.equal(kernels.dense(weight, x, None), expected)
            kernels._finalizer()
        except BaseException:
            os._exit(2)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert torch.equal(kernels.dense(weight, x, None), expected)
