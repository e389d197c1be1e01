"""Quantisation of dense matrices into ggml's blocks, in plain torch; the way back is ``quant.py``.

A chunk of blocks stands as ``[32, n]``, a block in each column: sums over a block are then sums of rows,
which torch vectorises, and what belongs to a block (scale, minimum) is a row that broadcasts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from types import MappingProxyType

import torch
from torch import Tensor

from mini_sglang.backend.loading.ggml_types import GGMLType

BLOCK_SIZE = 32

# As in quant.py: a chunk in float32 stays in a core's cache, and torch does not split its operators between
# threads; the chunks are what is split.
_CHUNK_BLOCKS = 127 << 3

# A block's first guesses at its codes: its values spread a little beyond 0 to 15, shifted by part of a step.
# Of a grid tried on normal, Laplace and Student weights these served best: a squared error a fifth below that
# of the plain minimum and maximum. Ten guesses take away 2 % more.
_SPREAD = 1.03
_SHIFTS = (-0.25, 0.0, 0.25)


def quantize(values: Tensor, kind: GGMLType) -> Tensor:
    """Turn rows of numbers into rows of blocks, each number to the nearest one its block can hold.

    Beyond the result it takes a few MiB for each of torch's threads.

    Args:
        values: ``[rows, columns]`` on the CPU, of any floating type; ``columns`` a multiple of 32.
        kind: Q8_0 or Q4_1.

    Returns:
        uint8 ``[rows, columns / 32 * kind.block_bytes]``, as a GGUF file stores them.

    Raises:
        ValueError: a number is not finite or too large for a block's float16 scale.
    """
    rows, columns = values.shape
    encode = _ENCODERS[kind.name]
    blocks = values.reshape(-1, BLOCK_SIZE)
    out = torch.empty(len(blocks), kind.block_bytes, dtype=torch.uint8)
    threads = torch.get_num_threads()
    # Chunks begin at the same blocks for any number of threads, so that the result does not depend on it:
    # torch may add up the last columns of a chunk in another order.
    share = -(-len(blocks) // (threads * _CHUNK_BLOCKS)) * _CHUNK_BLOCKS or 1

    def work(first: int) -> None:
        # The mode belongs to a thread, and a tensor made in it may only be written in it.
        with torch.inference_mode(out.is_inference()):
            for start in range(first, min(first + share, len(blocks)), _CHUNK_BLOCKS):
                chunk = blocks[start : start + _CHUNK_BLOCKS]
                encode(torch.empty(BLOCK_SIZE, len(chunk)).copy_(chunk.t()), out[start : start + len(chunk)])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(0, len(blocks), share)))
    return out.view(rows, columns // BLOCK_SIZE * kind.block_bytes)


def _halves(*values: Tensor) -> Tensor:
    """Rows ``[n]`` of scales and minima as the bytes that begin each block."""
    halves = torch.stack(values, 1).half()
    if not halves.isfinite().all():
        raise ValueError("a number is not finite or too large for a block's float16 scale")
    return halves.view(torch.uint8)


def _inverse(scale: Tensor) -> Tensor:
    return torch.where(scale > 0, 1 / scale, 0.0)


def _q8_0(values: Tensor, out: Tensor) -> None:
    low, high = values.aminmax(dim=0)
    largest = torch.maximum(high, -low)
    scale = (largest / 127).half()
    # A float16 so small that rounding down moved it by much: the next one still reaches the largest number.
    scale.view(torch.int16).add_(scale.float() * 127.5 < largest)
    out[:, :2] = _halves(scale)
    codes = values.mul_(_inverse(scale.float())).round_().clamp_(-127, 127)
    out[:, 2:].view(torch.int8).copy_(codes.t())


def _q4_1(values: Tensor, out: Tensor) -> None:
    low, high = values.aminmax(dim=0)
    step = (high - low) / 15
    plain_scale, plain_minimum = step.half().float(), low.half().float()
    unit = (values - low).mul_(torch.where(plain_scale > 0, 1 / step, 0.0))
    scale, minimum = _fitted(unit)
    scale, minimum = (scale * step).half().float(), (minimum * step + low).half().float()
    codes, error = _nearest(values, scale, minimum)
    plain_codes, plain_error = _nearest(values, plain_scale, plain_minimum)
    # Rounding to float16 can take back what the fit gained; a NaN compares false.
    plain = ~(error < plain_error)
    scale = torch.where(plain, plain_scale, scale)
    minimum = torch.where(plain, plain_minimum, minimum)
    codes = torch.where(plain, plain_codes, codes)
    out[:, :4] = _halves(scale, minimum)
    out[:, 4:] = codes[16:].mul_(16).add_(codes[:16]).to(torch.uint8).t()


def _fitted(unit: Tensor) -> tuple[Tensor, Tensor]:
    """Scale and minimum of each block of ``unit``, numbers from 0 to 15, by least squares.

    The best line for given codes is linear regression, the best codes for a line are the nearest ones: this
    takes the best line of a few guesses at the codes, and from there one more turn.
    """
    mean = unit.sum(0).div_(BLOCK_SIZE)
    work = torch.empty_like(unit)

    def fit(codes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slope and intercept, and by how much they lower the squared error of a constant."""
        code_mean = codes.sum(0).div_(BLOCK_SIZE)
        variance = torch.mul(codes, codes, out=work).sum(0) - code_mean * code_mean * BLOCK_SIZE
        covariance = torch.mul(codes, unit, out=work).sum(0) - code_mean * mean * BLOCK_SIZE
        # Codes are whole numbers: unless all are equal the variance is at least 31/32.
        slope = torch.where(variance > 0.5, covariance / variance, 0.0)
        return slope, mean - slope * code_mean, slope * covariance

    slope, intercept, gain = torch.zeros_like(mean), mean, torch.zeros_like(mean)
    codes = torch.empty_like(unit)
    for shift in _SHIFTS:
        torch.mul(unit, _SPREAD, out=codes)
        found = fit(codes.add_(7.5 - 7.5 * _SPREAD + shift).round_().clamp_(0, 15))
        better = found[2] > gain
        slope, intercept, gain = (
            torch.where(better, new, old) for new, old in zip(found, (slope, intercept, gain), strict=True)
        )
    torch.sub(unit, intercept, out=codes)
    slope, intercept, _ = fit(codes.mul_(_inverse(slope)).round_().clamp_(0, 15))
    return slope, intercept


def _nearest(values: Tensor, scale: Tensor, minimum: Tensor) -> tuple[Tensor, Tensor]:
    """The codes from 0 to 15 for this scale and minimum, and each block's squared error with them."""
    codes = (values - minimum).mul_(_inverse(scale)).round_().clamp_(0, 15)
    error = (codes * scale).add_(minimum).sub_(values)
    return codes, error.mul_(error).sum(0)


_ENCODERS: Mapping[str, Callable[[Tensor, Tensor], None]] = MappingProxyType({"Q8_0": _q8_0, "Q4_1": _q4_1})
