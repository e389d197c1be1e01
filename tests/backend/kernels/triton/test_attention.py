"""Paged attention in Triton, interpreted, against its twin in torch."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from mini_sglang.backend.attention.base import AttentionForm
from mini_sglang.backend.attention.triton import TritonAttention
from mini_sglang.backend.batch import Batch
from mini_sglang.backend.kernels.triton.launch import attention_launch, chunk_launch
from tests.backend.kernels.triton.scene import LAYER, Scene
from tests.backend.test_attention import SCENES
from tests.backend.test_attention import Scene as LayeredScene

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# Heads, KV heads, head_dim: every size of a head, groups of one, of powers of two and of others.
SHAPES = (
    (1, 1, 64),
    (4, 4, 80),
    (7, 1, 96),
    (6, 2, 128),
    (8, 8, 16),
    (8, 2, 256),
    (3, 1, 72),
    (40, 8, 64),
)
# Around the borders of pages and of blocks.
LENGTHS = (1, 2, 15, 16, 17, 31, 33, 63, 64, 65, 129, 300)


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_twin(shape: tuple[int, int, int], page_size: int) -> None:
    rng = random.Random(f"{shape} {page_size}")
    for dtype in DTYPES:
        sequences = [(1, rng.choice(LENGTHS) - 1), (1, rng.choice(LENGTHS) - 1)]
        sequences += [(rng.choice(LENGTHS[:6]), rng.choice((0, 1, 16, 40))) for _ in range(2)]
        rng.shuffle(sequences)
        scene = Scene(sequences, shape, page_size, dtype, seed=rng.randrange(1000))
        scene.check(TritonAttention(), rng.choice((None, None, 1, 7, 16, 100)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 1, 20, 300])
def test_a_chunk_of_several_tiles(dtype: torch.dtype, window: int | None) -> None:
    for sequences in ([(140, 0)], [(70, 33), (1, 90), (35, 0)]):
        Scene(sequences, (4, 2, 64), 16, dtype).check(TritonAttention(), window)


@pytest.mark.parametrize("page_size", [1, 16, 64, 256])
@pytest.mark.parametrize("window", [None, 1, 20, 64, 65, 150])
def test_chunks_that_begin_and_end_around_blocks(window: int | None, page_size: int) -> None:
    """Of 64 positions, in tiles of 128 rows; among sequences that are another launch's."""
    rng = random.Random(f"{page_size} {window}")
    ends = (64, 65, 127, 128, 129, 191, 193)
    for dtype in (torch.float16, torch.bfloat16):
        lengths = rng.sample(ends, 3)
        sequences = [(new, length - new) for length in lengths for new in [rng.randint(33, min(length, 100))]]
        sequences += [(33, 0), (1, 70), (5, 64)]
        rng.shuffle(sequences)
        Scene(sequences, (6, 3, 64), page_size, dtype).check(TritonAttention(), window)


@pytest.mark.parametrize("window", [40, 100])
def test_windows_that_begin_around_blocks(window: int) -> None:
    """Of 32 positions, in float32: one key too many would be seen."""
    ends = [window + 1 + 32 * blocks + off for blocks in (0, 1) for off in (-1, 0, 1)]
    Scene([(33, end - 33) for end in ends], (4, 2, 64)).check(TritonAttention(), window)


def test_a_chunk_replayed_with_fewer_rows() -> None:
    """As a CUDA graph does: the grid of a longer one, and rows of padding."""
    large = Scene([(200, 0)], (4, 2, 64), dtype=torch.float16)
    attention = TritonAttention()
    step = attention.begin(large.batch, large.kv)
    small = Scene([(70, 50)], (4, 2, 64), dtype=torch.float16, seed=1)
    attention.tables.fill(small.batch, small.kv.data.device)
    step._kv = small.kv
    padded = torch.full((200, 4, 64), torch.nan, dtype=torch.float16)
    padded[:70] = small.query
    out = step(LAYER, None, padded, small.key, small.value)[:70]
    torch.testing.assert_close(out.float(), small.expected(), rtol=4e-3, atol=4e-3)


@pytest.mark.parametrize("window", [None, 1, 100])
@pytest.mark.parametrize("spans", [1, 2, 7, 64])
def test_a_long_context_in_any_number_of_parts(spans: int, window: int | None) -> None:
    scene = Scene([(1, 699), (5, 320), (1, 0), (1, 63)], (4, 2, 16))
    for span in (1, 192):
        scene.check(TritonAttention(span, spans), window)


FORMS = (
    AttentionForm(scale=0.7),
    AttentionForm(softcap=1.5),
    AttentionForm(sinks=torch.linspace(-2, 3, 6)),
    AttentionForm(0.4, 2.0, torch.linspace(3, -2, 6)),
)


@pytest.mark.parametrize("form", FORMS, ids=["scale", "softcap", "sinks", "all"])
@pytest.mark.parametrize("window", [None, 7])
def test_scale_softcap_and_sinks(form: AttentionForm, window: int | None) -> None:
    """In layers of different shapes too, with values narrower than keys, against a softmax in float64."""
    for span in (32, 256):
        Scene([(1, 80), (9, 3), (1, 0)], (6, 2, 64)).check(TritonAttention(span), window, form)
        LayeredScene(SCENES["mixed"][:8], 4, True, layered=True).check(window, TritonAttention(span, 3), form)
    for dtype in (torch.float32, torch.float16):
        Scene([(70, 80), (40, 0)], (6, 2, 64), 16, dtype).check(TritonAttention(), window, form)


def test_a_row_is_the_same_bits_alone_and_beside_others() -> None:
    sequences = [(1, 400), (1, 20), (1, 64), (40, 30), (3, 200), (150, 10)]
    scene = Scene(sequences, (4, 2, 16))
    together = scene.attend(TritonAttention(64))
    for i, (start, stop) in enumerate(
        zip(scene.batch.query_starts, scene.batch.query_starts[1:], strict=False)
    ):
        step = TritonAttention(64).begin(only(scene.batch, i), scene.kv)
        rows = slice(start, stop)
        out = step(LAYER, None, scene.query[rows], scene.key[rows], scene.value[rows])
        assert torch.equal(out, together[rows])


def only(batch: Batch, i: int) -> Batch:
    """Sequence ``i`` of a batch, by itself."""
    count = batch.query_starts[i + 1] - batch.query_starts[i]
    return replace(
        batch,
        num_decodes=int(count == 1),
        query_starts=[0, count],
        seq_lens=batch.seq_lens[i : i + 1],
        page_table=batch.page_table[i : i + 1],
    )


def test_a_step_can_be_replayed_with_other_sequences_at_the_same_addresses() -> None:
    """What a CUDA graph does: the grid of the first step, the tables of another, with rows of padding."""
    attention = TritonAttention(64)
    large = Scene([(1, 600), (1, 500), (1, 300), (1, 40)], (4, 2, 16))
    step = attention.begin(large.batch, large.kv)
    tables = attention.tables
    at = [tensor.data_ptr() for tensor in (tables.page_table, tables.query_starts, tables.seq_lens)]
    small = Scene([(1, 130), (1, 0)], (4, 2, 16), seed=1)
    attention.tables.fill(small.batch, small.kv.data.device)
    assert at == [tensor.data_ptr() for tensor in (tables.page_table, tables.query_starts, tables.seq_lens)]
    tables.seq_lens[2:] = 0
    tables.query_starts[3:] = 2
    step._kv = small.kv
    padded = torch.full((4, 4, 16), torch.nan)
    padded[:2] = small.query
    out = step(LAYER, None, padded, small.key, small.value)[:2]
    torch.testing.assert_close(out, small.expected(), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256, 512])
@pytest.mark.parametrize("shared", [64 * 1024, 99 * 1024, 227 * 1024])
def test_tiles_fit_shared_memory(head_dim: int, itemsize: int, shared: int) -> None:
    width = 1 << (head_dim - 1).bit_length()
    for rows, group in ((1, 1), (1, 7), (1, 32), (500, 1), (500, 7), (9, 4)):
        chosen = attention_launch(rows, group, head_dim, itemsize, shared)
        sizes = chosen.block_m, chosen.block_n
        assert min(sizes) >= 16 and all(size & (size - 1) == 0 for size in sizes)
        assert chosen.queries >= 1 and chosen.queries * group <= chosen.block_m
        if width * itemsize * 16 * 5 <= shared and group < 32:
            used = (chosen.block_m + chosen.stages * 2 * chosen.block_n) * width * itemsize
            assert used <= shared
    for group in (1, 7, 128):
        chunk = chunk_launch(group, head_dim, itemsize, shared)
        sizes = chunk.block_m, chunk.block_n
        assert min(sizes) >= 16 and all(size & (size - 1) == 0 for size in sizes)
        assert chunk.queries >= 1 and chunk.queries * group <= chunk.block_m
        if width * itemsize * 16 * 5 <= shared and group < 32:
            assert (chunk.block_m + chunk.stages * 2 * chunk.block_n) * width * itemsize <= shared
