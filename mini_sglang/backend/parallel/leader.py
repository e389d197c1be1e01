"""The start of a group: where the ranks are placed, and their processes."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.parallel.backend import LeadingBackend
from mini_sglang.backend.parallel.followers import SILENCE, Followers
from mini_sglang.backend.parallel.group import Group, TorchGroup
from mini_sglang.backend.parallel.wire import Join
from mini_sglang.config import Settings, plain_settings
from mini_sglang.errors import BackendLostError, MiniSglangError, ModelLoadError

# How long the reason why another rank did not load may take to arrive.
_REASON_SECONDS = 3.0


class Leader:
    """Rank 0 while the model is loaded.

    Starts the other ranks' processes and meets them; within ``loading`` what fails ends them.

    Args:
        sharing: as ``load_backend`` takes it.

    Raises:
        ModelLoadError: another rank did not come.
    """

    group: Group

    def __init__(self, path: Path, settings: Settings, size: int, device: torch.device, sharing: int) -> None:
        own = replace(settings, tensor_parallel_size=size, chosen=settings.chosen | {"tensor_parallel_size"})
        plain = plain_settings(own)
        folder = tempfile.mkdtemp(prefix="mini-sglang-ranks-")
        joins = [Join(rank, size, folder, str(path.resolve()), sharing, plain) for rank in range(1, size)]
        silence = min(SILENCE, settings.step_timeout or SILENCE)
        self.group = Group()
        self._on_cpu = device.type == "cpu"
        self._followers = Followers(joins, lambda: self.group.abort(), silence)
        with self.loading():
            self._followers.wait_for("hello")
            self.group = TorchGroup(0, size, Path(folder), device, settings.step_timeout)

    @contextmanager
    def loading(self) -> Iterator[None]:
        """End the other ranks where the block raises; a failure of theirs is then raised in its place."""
        try:
            yield
        except BaseException as error:
            known = isinstance(error, MiniSglangError) and not isinstance(error, BackendLostError)
            said = None if known else self._followers.why(_REASON_SECONDS)
            self._followers.close()
            self.group.close()
            if said is not None:
                raise ModelLoadError(said) from error
            raise

    def backend(self, *parts: Any, **more: Any) -> ModelBackend:
        self._followers.wait_for("ready")
        if self._on_cpu:
            # Gloo's ranks have met for good: nothing is left on disk to clean up later.
            self._followers.forget_folder()
        return LeadingBackend(self._followers, self.group, *parts, **more)
