"""Gates, ups and SiLU in one go, as many rows take them: the same bits as one after another."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from mini_sglang.backend.kernels.jobs import Entry, Job, Product, SiluAndMul
from mini_sglang.backend.kernels.library import NativeKernels
from mini_sglang.backend.loading.ggml_types import GGMLType
from tests.backend.kernels.twins import FORMATS, VARIANTS, random_matrix

# From so many rows on gates do not go out to memory (part.h).
GATED = 32
HIDDEN = 256


class Layer:
    """What comes after attention in a layer: gates and ups, SiLU, and the product down."""

    def __init__(
        self, kernels: NativeKernels, kind: GGMLType, rows: int, width: int, bias: bool, seed: int
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.kernels, self.rows = kernels, rows
        self.x = torch.randn(rows, HIDDEN, generator=generator)
        self.bias = torch.randn(2 * width, generator=generator) if bias else None
        self.gate_up = torch.empty(rows, 2 * width)
        self.inner, self.out = torch.empty(rows, width), torch.empty(rows, HIDDEN)
        shapes = (2 * width, HIDDEN), (HIDDEN, width)
        self.weights = [kernels.pack(random_matrix(kind, *shape, seed), kind) for shape in shapes]
        up, down = (kernels.product(w, kind, shape) for w, shape in zip(self.weights, shapes, strict=True))
        up.x, up.y = self.x.data_ptr(), self.gate_up.data_ptr()
        up.bias = None if self.bias is None else self.bias.data_ptr()
        down.x, down.y = self.inner.data_ptr(), self.out.data_ptr()
        self.jobs: tuple[Product, SiluAndMul, Product] = (up, SiluAndMul.of(self.gate_up, self.inner), down)

    def clear(self) -> None:
        for buffer in (self.gate_up, self.inner, self.out):
            buffer.fill_(torch.nan)

    def together(self, *jobs: Job) -> None:
        self.clear()
        self.kernels.run_all((Entry * len(jobs))(*map(Entry.of, jobs)), self.rows)

    def one_by_one(self) -> tuple[Tensor, Tensor]:
        self.clear()
        for job in self.jobs:
            self.kernels.run(job, self.rows)
        assert bool(self.gate_up.isfinite().all())
        return self.inner.clone(), self.out.clone()


@pytest.mark.parametrize("kind", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("seed", range(3))
def test_a_layer_is_what_its_jobs_are(kernels: NativeKernels, kind: GGMLType, seed: int) -> None:
    rng = np.random.default_rng([seed, len(kind.name)])
    # Widths of which the groups are odd, and not a multiple of those that a product takes together.
    width = 256 * int(rng.integers(1, 3)) if kind.block_size > 1 else 16 * int(rng.integers(1, 30))
    rows = (GATED - 1, GATED, int(rng.integers(GATED + 1, 120)))[seed]
    layer = Layer(kernels, kind, rows, width, bool(seed % 2), seed)
    inner, out = layer.one_by_one()
    layer.together(*layer.jobs)
    assert torch.equal(layer.inner, inner) and torch.equal(layer.out, out)
    assert bool(layer.gate_up.isnan().all()) == (rows >= GATED)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("rows", [255, 300, 1100])
@pytest.mark.parametrize("name", ["BF16", "Q4_1", "Q8_0"])
def test_rows_divided_among_the_threads(library: Path, name: str, rows: int, threads: int) -> None:
    """By rows or by groups, more than are prepared at a time, by threads that each have a part."""
    kernels = NativeKernels(library, threads, VARIANTS[-1])
    layer = Layer(kernels, FORMATS[name], rows, 320, True, rows)
    inner, out = layer.one_by_one()
    layer.together(*layer.jobs)
    assert torch.equal(layer.inner, inner) and torch.equal(layer.out, out)
    assert bool(layer.gate_up.isnan().all())
    some = slice(7, 7 + GATED)
    part = Layer(kernels, FORMATS[name], GATED, 320, True, rows)
    part.x.copy_(layer.x[some])
    part.bias.copy_(layer.bias)  # type: ignore[union-attr, arg-type]
    part.together(*part.jobs)
    assert torch.equal(part.inner, inner[some]) and torch.equal(part.out, out[some])


def test_what_is_no_gate(kernels: NativeKernels) -> None:
    """SiLU of something else, of a part of the product, or of a product that is not just before."""
    layer = Layer(kernels, FORMATS["Q8_0"], 40, 64, False, 0)
    inner, _ = layer.one_by_one()
    gate_up = layer.gate_up.clone()
    up, silu, down = layer.jobs
    elsewhere = gate_up * 2
    layer.together(up, SiluAndMul.of(elsewhere, layer.inner))
    assert torch.equal(layer.gate_up, gate_up)
    other = layer.inner.clone()
    kernels.run(SiluAndMul.of(elsewhere, layer.inner), 40)
    assert torch.equal(layer.inner, other) and not torch.equal(other, inner)
    half = torch.empty(40, 32)
    layer.together(up, SiluAndMul.of(layer.gate_up.view(80, 64)[:40], half))
    assert torch.equal(layer.gate_up, gate_up)
    layer.together(up, down, silu)
    assert torch.equal(layer.gate_up, gate_up) and torch.equal(layer.inner, inner)
