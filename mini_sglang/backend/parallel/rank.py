"""This process's place in a group of ranks while its model is loaded, and what it holds there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mini_sglang.backend.loading.checkpoint import Checkpoint
from mini_sglang.backend.machine import Machine
from mini_sglang.backend.model_backend import ModelBackend
from mini_sglang.backend.models.config import ModelConfig
from mini_sglang.backend.models.decoder import Decoder
from mini_sglang.backend.parallel.checkpoint import ShardedCheckpoint
from mini_sglang.backend.parallel.group import Group
from mini_sglang.backend.parallel.shards import Division, Shard
from mini_sglang.backend.parallel.weights import join
from mini_sglang.config import Settings


class Member(Protocol):
    """One rank of several while its model is loaded."""

    group: Group

    def backend(self, *parts: Any, **more: Any) -> ModelBackend:
        """What ``ModelBackend`` is for a rank of its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """This process's place in a group; of a group of one where nothing is said.

    Attributes:
        sharing: backends that share the memory of its device, of this model and of others.
    """

    group: Group = field(default_factory=Group)
    sharing: int = 1
    member: Member | None = None

    def backend(self, *parts: Any, **more: Any) -> ModelBackend:
        """``ModelBackend``, or what it is for a rank of several."""
        make = ModelBackend if self.member is None else self.member.backend
        return make(*parts, **more)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rank(Place):
    """What one rank loads and runs of a native model; alone it is the whole.

    Attributes:
        checkpoint: of its part.
        config: of its part; the vocabulary stays whole.
    """

    checkpoint: Checkpoint
    config: ModelConfig
    shard: Shard | None = None

    def join(self, decoder: Decoder) -> None:
        """Have the decoder of this part compute what the whole does; waits until all ranks have theirs."""
        if self.shard is not None:
            join(decoder, self.group)
            # Each sees what memory is free once all have loaded.
            self.group.least(0)


@contextmanager
def place_of(
    path: Path, settings: Settings, machine: Machine, size: int, member: Member | None
) -> Iterator[Place]:
    """This process as one of ``size`` ranks, which the block loads: rank 0 where it is no ``member`` yet.

    Rank 0 starts the others here; where the block raises they end.

    Raises:
        ModelLoadError: another rank did not come.
    """
    if size == 1:
        yield Place(sharing=machine.sharing)
        return
    guard: Any = nullcontext()
    if member is None:
        # Imported here: it starts processes, which most models do without.
        from mini_sglang.backend.parallel.leader import Leader

        leader = Leader(path, settings, size, machine.device, machine.sharing)
        member, guard = leader, leader.loading()
    with guard:
        sharing = machine.sharing * (size if machine.device.type == "cpu" else 1)
        yield Place(group=member.group, sharing=sharing, member=member)


def rank_at(place: Place, checkpoint: Checkpoint, division: Division) -> Rank:
    """What a native model's ``division`` gives to a ``place``."""
    group, config = place.group, division.config
    shard = None
    if group.size > 1:
        shard = division.shard(group.rank, group.size)
        checkpoint, config = ShardedCheckpoint(checkpoint, shard), shard.local
    return Rank(
        group=group,
        sharing=place.sharing,
        member=place.member,
        checkpoint=checkpoint,
        config=config,
        shard=shard,
    )
