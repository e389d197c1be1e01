"""What records: the stand-in of these tests tells static steps from others, and CUDA's does as it must."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from mini_sglang.backend.graphs.recorder import CudaRecorder
from tests.backend.graphs.recorder import FaithfulRecorder, NotStaticError


def test_a_replay_reads_what_is_there_by_then() -> None:
    x, out = torch.arange(4.0), torch.zeros(4)
    factor = [2.0]

    def step() -> None:
        view = x.view(2, 2)
        out.copy_((view * factor[0] + torch.zeros_like(view)).flatten())

    replay = FaithfulRecorder().record(step)
    x += 1
    # What the host knows is what it was.
    factor[0] = 9.0
    replay()
    assert out.tolist() == [2.0, 4.0, 6.0, 8.0]


def test_a_buffer_made_anew_is_not_looked_at() -> None:
    held = [torch.ones(3)]
    out = torch.zeros(3)

    def step() -> None:
        out.copy_(held[0])

    replay = FaithfulRecorder().record(step)
    held[0] = torch.full((3,), 7.0)
    replay()
    assert out.tolist() == [1.0] * 3


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.numpy(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x + torch.from_numpy(torch.ones(2).numpy().copy()),
        lambda x: x[x > 0],
    ],
)
def test_what_waits_or_comes_from_the_host_cannot_be_recorded(read: Callable[..., Any]) -> None:
    x = torch.ones(2)
    with pytest.raises(NotStaticError):
        FaithfulRecorder().record(lambda: read(x))


def test_cuda_warms_up_beside_the_steps_and_shares_one_pool(monkeypatch: pytest.MonkeyPatch) -> None:
    """By what torch's documentation says: run once on a side stream, then capture on it."""
    said: list[str] = []

    class Stream:
        def __init__(self, name: object) -> None:
            self.name = name if isinstance(name, str) else "side"

        def wait_stream(self, other: Stream) -> None:
            said.append(f"{self.name} waits for {other.name}")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    @contextmanager
    def stream(chosen: Stream) -> Iterator[None]:
        said.append(f"on {chosen.name}")
        yield
        said.append("off")

    @contextmanager
    def graph(own: Graph, pool: object, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        said.append(f"capture on {stream.name} into {pool}, {capture_error_mode}")
        yield
        said.append("captured")

    pools = iter(range(9))
    for name, value in {
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "graph": graph,
        "graph_pool_handle": lambda: f"pool {next(pools)}",
        "current_stream": lambda device: Stream("main"),
        "set_stream": lambda stream: said.append(f"back on {stream.name}"),
        "synchronize": lambda device: said.append("synchronize"),
        "mem_get_info": lambda device: (300, 1000),
        "empty_cache": lambda: said.append("empty"),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    recorder = CudaRecorder(torch.device("cuda"))
    replay = recorder.record(lambda: said.append("step"))
    one = [
        "side waits for main", "on side", "step", "off", "main waits for side",
        "capture on side into pool 0, thread_local", "step", "captured",
        "back on main",
    ]  # fmt: skip
    assert said == one
    replay()
    recorder.record(lambda: said.append("step"))
    assert said == [*one, "replay", *one]
    said.clear()
    assert recorder.used_bytes() == 700 and said == ["synchronize"]
    recorder.release()
    recorder.record(lambda: said.append("step"))
    assert "empty" in said and "capture on side into pool 1, thread_local" in said
