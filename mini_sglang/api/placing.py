"""How many engines a server has, and on which GPUs each of them runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from mini_sglang.backend.gpus import ask_need, visible_gpus
from mini_sglang.config import Settings


@dataclass(frozen=True, slots=True)
class Placement:
    """Engines over groups of GPUs, in turn.

    Attributes:
        settings: of the server, with the numbers that were left to it.
        groups: of each group what CUDA_VISIBLE_DEVICES is to say; none leaves it to torch.
    """

    settings: Settings
    groups: tuple[str, ...] = ()

    def environment(self, index: int) -> dict[str, str]:
        """What the process of an engine is to find in its environment."""
        return {"CUDA_VISIBLE_DEVICES": self.groups[index % len(self.groups)]} if self.groups else {}

    def settings_of_engine(self) -> Settings:
        """The settings of each engine, whose ``num_engines`` share a group's memory."""
        if not self.groups:
            return self.settings
        return replace(self.settings, num_engines=-(-self.settings.num_engines // len(self.groups)))


def place(settings: Settings, path: Path) -> Placement:
    """One engine for each GPU, or for each group that the model at ``path`` needs, unless settings say more.

    Raises:
        ModelLoadError: the model does not allow what the settings ask for.
    """
    names = visible_gpus()
    fixed = settings.device in ("cpu", "mps") or settings.engine_isolation == "thread"
    if fixed or len(names) < 2:
        return Placement(settings)
    need = ask_need(settings, path)
    if need.gpus < 2:
        return Placement(settings)
    count = min(need.gpus, len(names)) // need.size if settings.enable_multi_device else 1
    groups = [",".join(names[first * need.size : (first + 1) * need.size]) for first in range(max(1, count))]
    return Placement(
        replace(
            settings,
            num_engines=settings.num_engines or len(groups),
            tensor_parallel_size=need.size,
            chosen=settings.chosen | {"num_engines", "tensor_parallel_size"},
        ),
        tuple(groups),
    )
