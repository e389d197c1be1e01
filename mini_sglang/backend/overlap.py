"""Steps that run while the engine goes on: in the queue of a CUDA device, or in a thread."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from mini_sglang.backend.batch import Followed
from mini_sglang.backend.device_sampling import Chosen, DeviceSampler, Draw
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.parallel.backend import FollowingBackend, LeadingBackend
from mini_sglang.backend.step import Backend, Flight, LoadedBackend, SequenceResult, SequenceStep, Submitter
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError


def choose_submitter(settings: Settings, backend: LoadedBackend, device: torch.device) -> Submitter | None:
    """What ``OVERLAP_SCHEDULE`` asks for; None where steps run one at a time.

    Raises:
        InvalidValueError: it is demanded of what cannot do it.
    """
    if settings.overlap_schedule == "0" or isinstance(backend, FollowingBackend):
        return None
    demanded = settings.overlap_schedule == "1"
    if isinstance(backend, LeadingBackend) or device.type == "mps":
        if demanded:
            why = "on MPS" if device.type == "mps" else "with several ranks, which are told a step at a time"
            raise InvalidValueError("OVERLAP_SCHEDULE", "1", f"auto or 0 {why}")
        return None
    if isinstance(backend, ModelBackend) and isinstance(backend.sampler, DeviceSampler):
        return DeviceSubmitter(backend)
    return ThreadSubmitter(backend) if demanded else None


class ThreadSubmitter:
    """Runs steps in a thread of its own, one after another."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="mini-sglang-steps")
        self._last: Future[list[SequenceResult]] | None = None

    def submit(self, steps: Sequence[SequenceStep]) -> Flight:
        self._last = self._thread.submit(self._run, list(steps), self._last)
        return _ThreadFlight(self._last)

    def close(self) -> None:
        self._thread.shutdown()

    def _run(
        self, steps: list[SequenceStep], before: Future[list[SequenceResult]] | None
    ) -> list[SequenceResult]:
        return self._backend.run(_filled(steps, None if before is None else _ThreadFlight(before)))


class _ThreadFlight:
    def __init__(self, future: Future[list[SequenceResult]]) -> None:
        self._future = future

    def wait(self) -> list[SequenceResult]:
        return self._future.result()


def _filled(steps: Sequence[SequenceStep], before: Flight | None) -> Sequence[SequenceStep]:
    """``steps`` with the tokens that they follow, for which ``before`` is waited for."""
    if all(step.follows is None for step in steps):
        return steps
    if before is None:
        raise InvalidValueError("follows", "set", "left out in the first step")
    try:
        chosen = before.wait()
    except Exception as error:
        raise RuntimeError("the step before failed, and this one follows it") from error
    return [
        # Where none could be chosen any will do: nobody wants what comes of it.
        step if step.follows is None else replace(step, token_ids=[chosen[step.follows].token_id or 0])
        for step in steps
    ]


class DeviceSubmitter:
    """Puts steps in a CUDA device's queue; the tokens that they follow never leave it.

    What needs the host in the middle of a step (prompt logprobs, kept logits) is waited for at once.
    """

    def __init__(self, backend: ModelBackend) -> None:
        self._backend = backend
        self._last: _DeviceFlight | _Landed | None = None

    def submit(self, steps: Sequence[SequenceStep]) -> Flight:
        before, backend = self._last, self._backend
        if not backend.launches(steps):
            self._last = _Landed(backend.run(_filled(steps, before)))
            return self._last
        followed: Followed | None = None
        if isinstance(before, _DeviceFlight) and not before.done:
            followed = before.followed([step.follows for step in steps])
        else:
            steps = _filled(steps, before)
        draw, places = backend.launch(steps, followed)
        self._last = _DeviceFlight(draw, places, len(steps))
        return self._last

    def close(self) -> None:
        """Nothing to end: the queue is the device's."""
        self._last = None


class _Landed:
    """A step that was waited for."""

    def __init__(self, results: list[SequenceResult]) -> None:
        self._results = results

    def wait(self) -> list[SequenceResult]:
        return self._results


class _DeviceFlight:
    """A step in the device's queue.

    Args:
        places: of each row of ``draw``, the place of its sequence among the step's ``count``.
    """

    def __init__(self, draw: Draw | Chosen | None, places: Sequence[int], count: int) -> None:
        self._draw = draw
        self._row = {place: row for row, place in enumerate(places)}
        self._count = count
        self._results: list[SequenceResult] | None = None

    def wait(self) -> list[SequenceResult]:
        if self._results is None:
            results = [SequenceResult() for _ in range(self._count)]
            if self._draw is not None:
                chosen = self._draw.results()
                for place, row in self._row.items():
                    results[place] = chosen[row]
            self._draw, self._results = None, results  # with its logits
        return self._results

    @property
    def done(self) -> bool:
        """Whether it was waited for."""
        return self._results is not None

    def followed(self, follows: Sequence[int | None]) -> Followed | None:
        """The tokens that the sequences of the next step begin with: of those that follow one of this."""
        wanted = [(place, self._row[at]) for place, at in enumerate(follows) if at is not None]
        if not wanted:
            return None
        assert self._draw is not None
        ids: Tensor = self._draw.ids
        return Followed([place for place, _ in wanted], ids, [row for _, row in wanted])
