"""What the rows of the table ask: which work, of which weights, by whom, and what must be reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

Ids = list[list[int]]
Reply = dict[str, Any]


class Text:
    """Real text as ids, cut into prompts; it begins again where it ends."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids

    def cut(self, start: int, length: int) -> list[int]:
        start %= len(self.ids)
        return (self.ids[start:] + self.ids * (length // len(self.ids) + 1))[:length]

    def apart(self, count: int, length: int, after: int = 0) -> Ids:
        """``count`` prompts of ``length`` ids, one after the other in the text, from position ``after``."""
        return [self.cut(after + i * length, length) for i in range(count)]


@dataclass(frozen=True)
class Task:
    """What one side does in a round, and the figure that comes of it.

    ``prompts`` and ``primed`` (served before, outside the time) are made of the text and the round's number.
    ``context`` is the tokens of KV that a decoded token reads, where memory's bandwidth is the limit.
    """

    new: int
    prompts: Callable[[Text, int], Ids]
    figure: Callable[[Reply, Ids], float]
    unit: str
    primed: Callable[[Text, int], Ids] | None = None
    context: int | None = None
    setting: dict[str, Any] = field(default_factory=dict)
    """Settings of ours that the task needs."""
    fresh: bool = False
    """Each round starts the process anew, and its ``seconds`` are from before that to the answer."""


@dataclass(frozen=True)
class Side:
    name: str
    engine: str
    task: Task
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str]:
        """Sides of one key share a process."""
        return self.engine, repr(self.options)


@dataclass(frozen=True)
class Row:
    """``target`` is what the ratio of the first side to the better of the others must be."""

    name: str
    weights: str
    sides: tuple[Side, ...]
    target: str
    share: str = ""
    """``bandwidth`` or ``matrix``: the limit that the first side is held against."""


def decode_rate(reply: Reply, prompts: Ids) -> float:
    return float((len(reply["ids"][0]) - 1) / (reply["seconds"] - reply["first"]))


def prompt_rate(reply: Reply, prompts: Ids) -> float:
    return float(sum(map(len, prompts)) / reply["seconds"])


def output_rate(reply: Reply, prompts: Ids) -> float:
    return float(sum(map(len, reply["ids"])) / reply["seconds"])


def seconds(reply: Reply, prompts: Ids) -> float:
    return float(reply["seconds"])


def first_ms(reply: Reply, prompts: Ids) -> float:
    return float(reply["first"] * 1e3)


def peak_mb(reply: Reply, prompts: Ids) -> float:
    return float(reply["peak_bytes"] / 1e6)


RATE, SECONDS, MS, MB = "tokens/s", "s", "ms", "MB"
KV_TOKENS = 4096
LONG = KV_TOKENS - 64
SHARED, TAIL = 800, 20


def shared_prompts(text: Text, turn: int, count: int, skip: int) -> Ids:
    """``count`` prompts with a prefix that no other round has."""
    prefix = text.cut(turn * 1009, SHARED)
    return [prefix + tail for tail in text.apart(count, TAIL, 50_000 + skip * TAIL)]


def together(count: int) -> Task:
    return Task(128, lambda text, _: text.apart(count, 128), output_rate, RATE)


ONE_STREAM = Task(128, lambda text, _: text.apart(1, 128), decode_rate, RATE, context=0)
PREFILL = Task(1, lambda text, _: text.apart(1, 1000), prompt_rate, RATE)
SHARED_PREFIX = Task(
    16,
    lambda text, turn: shared_prompts(text, turn, 16, 1),
    seconds,
    SECONDS,
    primed=lambda text, turn: shared_prompts(text, turn, 1, 0),
)
LONG_CONTEXT = Task(128, lambda text, _: text.apart(1, LONG), decode_rate, RATE, context=KV_TOKENS)
HIT = Task(
    1,
    lambda text, _: shared_prompts(text, 0, 1, 1),
    first_ms,
    MS,
    primed=lambda text, _: shared_prompts(text, 0, 1, 0),
)
COLD = Task(1, lambda text, _: shared_prompts(text, 0, 1, 1), first_ms, MS)
START = Task(1, lambda text, _: text.apart(1, 16), seconds, SECONDS, fresh=True)
MEMORY = Task(
    128, lambda text, _: text.apart(16, 128), peak_mb, MB, setting={"kv_token_budget": 2 * KV_TOKENS}
)
PEERS = {
    "q4_1": "openvino",
    "q8_0": "openvino",
    "bf16": "vllm",
    "fp32": "transformers",
    "int4": "llama",
    "int8": "llama",
}
"""The peer that a weights' prefill and batches are held against."""


def peer_sides(engine: str, weights: str, task: Task) -> tuple[Side, ...]:
    if engine == "llama":
        options = {"off": {"flash_attention": False}, "on": {"flash_attention": True}}
        return tuple(
            Side(f"llama.cpp, flash attention {word}", engine, task, one) for word, one in options.items()
        )
    names = {"openvino": "OpenVINO GenAI", "vllm": "vLLM", "transformers": "HF generate"}
    return (Side(names[engine], engine, task, {"dtype": weights} if engine == "transformers" else {}),)


def against(name: str, weights: str, engine: str, task: Task, target: str, share: str = "") -> Row:
    sides = (Side("mini-sglang", "ours", task), *peer_sides(engine, weights, task))
    return Row(f"{name}/{weights}", weights, sides, target, share)


def alone(name: str, weights: str, target: str, tasks: dict[str, Task], share: str = "") -> Row:
    sides = tuple(Side(side, "ours", task) for side, task in tasks.items())
    return Row(f"{name}/{weights}", weights, sides, target, share)


def all_rows() -> dict[str, Row]:
    """Every row by its name, ``work/weights``."""
    rows = [
        against("one-stream", "bf16", "transformers", ONE_STREAM, "≥ 3.0", "bandwidth"),
        against("one-stream", "fp32", "transformers", ONE_STREAM, "≥ 2.5", "bandwidth"),
        *(
            against("one-stream", weights, "llama", ONE_STREAM, "≥ 2.0", "bandwidth")
            for weights in ("q4_1", "q8_0", "int4", "int8")
        ),
    ]
    for weights in ("q4_1", "q8_0", "bf16", "int4", "int8"):
        peer = PEERS[weights]
        matrix = "matrix" if weights == "bf16" else ""
        rows += (
            against("prefill", weights, peer, PREFILL, "≥ 1.3", matrix),
            against("batch-16", weights, peer, together(16), "≥ 3.0"),
            against("shared-prefix", weights, peer, SHARED_PREFIX, "≤ 0.6"),
            alone("batch-64", weights, "≥ 1.2", {"64 together": together(64), "16 together": together(16)}),
            alone("prefix-hit", weights, "≤ 0.06", {"hit": HIT, "cold": COLD}),
            alone("long-context", weights, "", {"mini-sglang": LONG_CONTEXT}, "bandwidth"),
            alone("memory", weights, "", {"mini-sglang": MEMORY}),
            alone("start", weights, "", {"mini-sglang": START}),
        )
    return {row.name: row for row in sorted(rows, key=lambda row: row.name)}
