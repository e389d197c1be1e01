"""Who is compared over HTTP: servers that are started here, or that a URL names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mini_sglang.bench.peers.base import Peer
from mini_sglang.bench.peers.registry import interpreter
from mini_sglang.bench.process import PeerError
from mini_sglang.bench.server_process import ServerProcess, free_port
from mini_sglang.bench.sides import OURS, Seating, Side
from mini_sglang.bench.wire.base import Dialect
from mini_sglang.bench.wire.dialects import dialect


@dataclass(frozen=True)
class ServerSide(Side):
    """A peer's server with one form of the weights.

    Attributes:
        peer: whose it is; None only where it is missing.
        path: of the weights.
        url: of a server that somebody else started; None where it is started for each round.
    """

    peer: Peer | None = None
    path: Path = Path()
    threads: int = 1
    url: str | None = None

    @property
    def dialect(self) -> Dialect:
        assert self.peer is not None
        return dialect(self.peer.wire)

    def serve(self) -> ServerProcess:
        """Start it.

        Raises:
            PeerError: it does not start.
        """
        assert self.peer is not None and self.peer.launch is not None
        launch, port = self.peer.launch, free_port()
        command = launch.command(self.python, self.path, port, self.threads)
        env = launch.env(self.threads)
        return ServerProcess(self.name, command, port, env, launch.ready, launch.seconds)


@dataclass(frozen=True)
class ServerSeating(Seating):
    """Makes the sides of a comparison over HTTP.

    Args:
        urls: of peers that run already, by name.
    """

    urls: Mapping[str, str] = field(default_factory=dict)

    def _side(self, peer: Peer, group: str, path: Path) -> Side:
        notes = [peer.recipe.note] if peer.recipe and peer.recipe.note else []
        if peer.name == OURS:
            notes += self._own_notes()
        url = self.urls.get(peer.name)
        missing, python = None, ""
        if url is not None:
            notes = ["runs at a URL: which weights, dtype and threads it has is not known here"]
        elif peer.launch is None:
            missing = f"it is only reached by its URL: --{peer.name}-url" if peer.worker is None else None
            missing = missing or "it has no server: local_bench.py compares in process"
        else:
            missing = peer.runs_here()
            try:
                python = interpreter(peer, self.settings)
            except PeerError as error:
                missing = str(error)
        return ServerSide(
            peer.name,
            peer.title,
            group,
            python=python,
            missing=missing,
            notes=() if missing else tuple(notes),
            peer=peer,
            path=path,
            threads=self.threads,
            url=url,
        )
