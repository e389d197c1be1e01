"""What a row gave: the runs, and the lines and JSON made of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cpu_rows import Ids, Reply, Row, Side

OVERHEAD_BYTES = 400e6
"""What memory may take beside the model's file and the KV pool."""

QUIET = 0.15
"""Cores that others may keep busy; with more, threads that wait for each other by spinning crawl."""


@dataclass
class Run:
    """One side's turn in one round."""

    side: str
    turn: int
    prompt_tokens: int
    figure: float
    reply: Reply


@dataclass
class RowReport:
    """``reference``: float32 Hugging Face's ids of round 1.

    Of each round: ``bandwidth`` in GB/s, ``matrix`` in GFLOP/s.
    """

    row: Row
    model: Path
    runs: list[Run] = field(default_factory=list)
    reference: Ids = field(default_factory=list)
    abouts: dict[str, dict[str, Any]] = field(default_factory=dict)
    bandwidth: list[float] = field(default_factory=list)
    matrix: list[float] = field(default_factory=list)
    spread: Reply | None = None

    def of(self, side: Side) -> list[Run]:
        return [run for run in self.runs if run.side == side.name]

    def median(self, side: Side) -> float:
        return statistics.median(run.figure for run in self.of(side))

    def ratio(self) -> float | None:
        """The first side's figure over the better of the others'."""
        ours, *others = self.row.sides
        if not others:
            return None
        best = max if ours.task.unit == "tokens/s" else min
        return self.median(ours) / best(self.median(side) for side in others)

    def allowed(self) -> float | None:
        """Tokens/s that the machine's limit would allow the first side."""
        side = self.row.sides[0]
        if self.row.share == "bandwidth":
            about = self.abouts[side.name]
            per_token = about["weight_bytes"] + (side.task.context or 0) * about["kv_bytes_per_token"]
            return statistics.median(self.bandwidth) * 1e9 / float(per_token)
        if self.row.share == "matrix":
            tokens = self.of(side)[0].prompt_tokens
            config = json.loads((self.model / "config.json").read_text())
            return statistics.median(self.matrix) * 1e9 * tokens / prefill_operations(config, tokens)
        return None

    def same(self, side: Side) -> tuple[int, int]:
        """Ids equal to the first side's, over all rounds, and how many there are."""
        pairs = [
            equal(one.reply["ids"], other.reply["ids"])
            for one, other in zip(self.of(self.row.sides[0]), self.of(side), strict=True)
        ]
        return sum(pair[0] for pair in pairs), sum(pair[1] for pair in pairs)


def equal(one: Ids, other: Ids) -> tuple[int, int]:
    """Ids that are the same at the same place, and how many places there are."""
    places = [place for a, b in zip(one, other, strict=False) for place in zip(a, b, strict=True)]
    return sum(a == b for a, b in places), len(places)


def prefill_operations(config: dict[str, Any], tokens: int) -> float:
    """Operations of one prompt: the weights' products, causal attention, one row of logits."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    width = config.get("head_dim") or hidden // heads
    qkv = hidden * width * (heads + 2 * config.get("num_key_value_heads", heads))
    weights = qkv + heads * width * hidden + 3 * hidden * config["intermediate_size"]
    attention = 2 * heads * width * tokens * (tokens + 1)
    return float(
        config["num_hidden_layers"] * (2 * weights * tokens + attention) + 2 * hidden * config["vocab_size"]
    )


def lines(report: RowReport) -> Iterator[str]:
    """The row as it is printed."""
    row, ours = report.row, report.row.sides[0]
    unit = ours.task.unit
    yield f"\n{row.name}"
    for side in row.sides:
        figures = [run.figure for run in report.of(side)]
        peak = max(run.reply["peak_bytes"] for run in report.of(side)) / 1e6
        words = f"{report.median(side):10.2f} {unit} ({min(figures):.2f} to {max(figures):.2f})"
        if side is not ours:
            words += "; {} of {} ids equal".format(*report.same(side))
        if report.reference:
            agree = equal(report.of(side)[0].reply["ids"], report.reference)
            words += "; {} of {} as float32".format(*agree)
        yield f"  {side.name:30} {words}; peak {peak:.0f} MB"
    if (ratio := report.ratio()) is not None:
        yield f"  ratio {ratio:.3f}, to reach {row.target}"
    if (allowed := report.allowed()) is not None:
        rate, name = (
            (report.bandwidth, "GB/s read") if row.share == "bandwidth" else (report.matrix, "GFLOP/s bf16")
        )
        share = report.median(ours) / allowed
        lowest = share * statistics.median(rate) / max(rate)
        yield (
            f"  {statistics.median(rate):.1f} {name} ({min(rate):.1f} to {max(rate):.1f}) "
            f"allow {allowed:.1f} {unit}: "
            f"{share:.1%}, to reach ≥ 75% (of the best round's {lowest:.1%})"
        )
    others = [run.reply["others"] for run in report.runs if "others" in run.reply]
    if others and max(others) > QUIET:
        yield (
            f"  NOT QUIET: other processes kept {statistics.median(others):.2f} cores busy meanwhile, "
            f"up to {max(others):.2f}"
        )
    if report.spread is not None:
        firsts, ends = report.spread["firsts"], report.spread["ends"]
        yield (
            f"  {len(ends)} requests: first ids after {min(firsts):.2f} to {max(firsts):.2f} s, "
            f"last after {min(ends):.2f} to {max(ends):.2f} s"
        )
    if ours.task.unit == "MB":
        limit = memory_limit(report)
        yield f"  file + KV pool + 400 MB is {limit:.0f} MB: {report.median(ours) / limit:.1%}"


def memory_limit(report: RowReport) -> float:
    """MB that the first side may take."""
    about = report.abouts[report.row.sides[0].name]
    return float(
        (model_bytes(report.model) + about["kv_tokens"] * about["kv_bytes_per_token"] + OVERHEAD_BYTES) / 1e6
    )


def model_bytes(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.safetensors")
    return sum(file.stat().st_size for file in files)


def as_json(report: RowReport) -> dict[str, Any]:
    """Every run with its times and ids, and what was made of them."""
    row = report.row
    return {
        "row": row.name,
        "target": row.target,
        "model": str(report.model),
        "medians": {side.name: report.median(side) for side in row.sides},
        "unit": row.sides[0].task.unit,
        "ratio": report.ratio(),
        "same_ids": {side.name: report.same(side) for side in row.sides[1:]},
        "reference": report.reference,
        "allowed": report.allowed(),
        "bandwidth_gb_s": report.bandwidth,
        "matrix_gflop_s": report.matrix,
        "spread": report.spread,
        "sides": report.abouts,
        "runs": [
            {"side": run.side, "round": run.turn, "figure": run.figure, **run.reply} for run in report.runs
        ],
    }
