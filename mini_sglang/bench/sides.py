"""Who is compared with whom: peers in groups that run the same weights in the same type."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mini_sglang.bench.models import BenchModel
from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import all_peers, interpreter
from mini_sglang.bench.process import PeerError, Process
from mini_sglang.config import Settings, setting_fields

OURS = "ours"
START_SECONDS = 900.0
"""What a start may take; vLLM's took 130 s with a small model."""
_QUIET_SETTINGS = frozenset({"model", "model_local_dir", "cache_dir", "num_threads", "log_level"})


@dataclass(frozen=True)
class Side:
    """One peer with one form of the weights.

    Attributes:
        name: the peer's.
        group: the weights and dtype compared, ``bf16`` or ``gguf Q4_1``.
        worker: as ``Process`` takes it.
        python: the interpreter that runs it.
        options: of the worker.
        env: of its process.
        missing: why it cannot be run at all, in one sentence; None where it may.
        notes: what a reader of its figures has to know.
    """

    name: str
    title: str
    group: str
    worker: str | Path = ""
    python: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)
    missing: str | None = None
    notes: tuple[str, ...] = ()

    def start(self, seconds: float = START_SECONDS) -> Process:
        """Raises: PeerError, where it does not load, or not within ``seconds``."""
        return Process(self.worker, self.python, self.options, self.env, seconds)


@dataclass(frozen=True)
class Seating:
    """Makes the sides of one comparison.

    Args:
        dtype: of the folder group, ``bf16`` or ``fp32``.
        tokens: the longest prompt and answer together.
        notify: is given a line for what takes long.
    """

    model: BenchModel
    dtype: str
    threads: int
    tokens: int
    settings: Settings
    notify: Callable[[str], None]

    def groups(self, peers: Sequence[Peer]) -> list[list[Side]]:
        """A list of sides for each group, ours first; a peer that cannot be run has a side that says why."""
        others = [peer for peer in peers if peer.name != OURS]
        folder = [peer for peer in others if peer.weights == "folder"]
        gguf = [peer for peer in others if peer.weights == "gguf"]
        groups = []
        if folder or self.model.gguf is None:
            groups.append(self._folder_group(folder))
        # A GGUF that cannot be made a folder is shown with ours, as it is.
        shown = any(side.name == OURS for group in groups for side in group)
        if gguf or not shown:
            groups.append(self._gguf_group(gguf))
        return groups

    def _folder_group(self, peers: Sequence[Peer]) -> list[Side]:
        ours = all_peers()[OURS]
        try:
            path = self.model.folder(self.dtype, self.settings, self._transformers, self.notify)
        except PeerError as error:
            why = f"there is no {self.dtype} folder of the model: {error}"
            return [_missing(peer, self.dtype, why) for peer in (*peers, ours) if peer is not ours]
        return [self._side(peer, self.dtype, path) for peer in (ours, *peers)]

    def _gguf_group(self, peers: Sequence[Peer]) -> list[Side]:
        path = self.model.gguf
        if path is None:
            why = f"it reads GGUF files, and the model {self.model.name} is a folder"
            return [_missing(peer, "gguf", why) for peer in peers]
        group = f"gguf {self.model.blocks}"
        return [self._side(peer, group, path) for peer in (all_peers()[OURS], *peers)]

    def _side(self, peer: Peer, group: str, path: Path) -> Side:
        if peer.worker is None:
            return _missing(peer, group, "it runs only as a server: server_bench.py compares servers")
        try:
            python = interpreter(peer, self.settings)
        except PeerError as error:
            return _missing(peer, group, str(error))
        if why := peer.runs_here():
            return _missing(peer, group, why)
        options: dict[str, Any] = {
            "model": str(path),
            "threads": self.threads,
            "dtype": self.dtype,
            "prefix_cache": True,
            "requests": 1,
            "tokens": self.tokens,
            **peer.options,
        }
        notes = self._own_notes() if peer.name == OURS else []
        env = {"OMP_NUM_THREADS": str(self.threads)}
        return Side(peer.name, peer.title, group, peer.worker, python, options, env, None, tuple(notes))

    def _own_notes(self) -> list[str]:
        """Of ours: what it is run with that nobody asked for here."""
        given = self.settings.chosen - _QUIET_SETTINGS
        names = (spec.metadata["env"][0] for spec in setting_fields() if spec.name in given)
        return [f"runs with settings of the environment: {', '.join(names)}"] if given else []

    @property
    def _transformers(self) -> str:
        return interpreter(all_peers()["hf"], self.settings)


def _missing(peer: Peer, group: str, why: str) -> Side:
    return Side(peer.name, peer.title, group, missing=why)
