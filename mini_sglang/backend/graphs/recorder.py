"""The device's part of a recorded step."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Protocol

import torch

from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError

Replay = Callable[[], None]


class Recorder(Protocol):
    """Writes down what a function has a device do, so that it can be done again without the function."""

    def record(self, step: Callable[[], None]) -> Replay:
        """Run ``step`` once or more, then write down what it has the device do.

        ``step`` must not wait for the device, nor read what the host may change. What it reads and writes
        beyond its own end are tensors that somebody keeps; the memory it takes for the rest is shared by all
        recordings.

        Returns:
            what does the same again with what is in those tensors by then, and does not wait for it.
        """

    def used_bytes(self) -> int:
        """Of the device's memory, by everything on it."""

    def release(self) -> None:
        """Give back the memory of recordings that are gone."""


class CudaRecorder:
    """``Recorder`` by CUDA graphs, all in one memory pool. One thread uses it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._begin()

    def _begin(self) -> None:
        # Always the same for one pool, which only what was recorded on one stream can share.
        self._stream = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()

    def record(self, step: Callable[[], None]) -> Replay:
        steps = torch.cuda.current_stream(self._device)
        # Kernels are compiled and libraries find their memory now: neither can be captured.
        self._stream.wait_stream(steps)
        with torch.cuda.stream(self._stream):
            step()
        steps.wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        try:
            # Errors of this thread alone: another engine's may load its model meanwhile.
            with torch.cuda.graph(
                graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
            ):
                step()
        finally:
            # torch stays on the other stream where the end of a capture fails.
            torch.cuda.set_stream(steps)
        replay: Replay = graph.replay
        return replay

    def used_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)

    def release(self) -> None:
        gc.collect()
        torch.cuda.empty_cache()
        # The pool went with the last of its graphs; after a failure the stream is of no use either.
        self._begin()


def choose_recorder(settings: Settings, device: torch.device) -> Recorder | None:
    """None where nothing is to be recorded.

    Raises:
        InvalidValueError: graphs were asked for by name, and the device has none; a length of prompts
            without recorded prompts.
    """
    wanted = {
        "ENABLE_DECODE_CUDA_GRAPH": settings.enable_decode_cuda_graph,
        "ENABLE_CUDA_GRAPH": settings.enable_cuda_graph,
    }
    if "cuda_graph_max_seq_len" in settings.chosen and not settings.enable_cuda_graph:
        raise InvalidValueError(
            "CUDA_GRAPH_MAX_SEQ_LEN", settings.cuda_graph_max_seq_len, "unset while ENABLE_CUDA_GRAPH is 0"
        )
    if device.type == "cuda":
        return CudaRecorder(device) if any(wanted.values()) else None
    why = f"CUDA graphs need CUDA, and the device is {device.type}"
    for variable, on in wanted.items():
        if on and variable.lower() in settings.chosen:
            raise InvalidValueError(variable, "1", f"0 or unset here: {why}")
    if "cuda_graph_max_seq_len" in settings.chosen:
        raise InvalidValueError(
            "CUDA_GRAPH_MAX_SEQ_LEN", settings.cuda_graph_max_seq_len, f"unset here: {why}"
        )
    return None
