"""One forward of a model with caches of its own, and what can be asked of it: tried out at load."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.transformers_models.caches import (
    CacheKind,
    NotStackableError,
    Past,
    grows,
    nbytes,
    stack,
    take,
)
from mini_sglang.backend.transformers_models.decoder import probe_ids
from mini_sglang.errors import ModelLoadError

# Of the root mean square of the logits, as in ``check``.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.2}
# What a layer may be for the trial's short prompts to prove something of long ones.
_PLAIN_LAYERS = frozenset(
    {
        "full_attention",
        "attention",
        "sliding_attention",
        "linear_attention",
        "mamba",
        "hybrid",
        "conv",
        "recurrent",
        "mlp",
        "moe",
    }
)
# Prompts of the trial and the tokens that follow each.
_PROMPTS, _DECODES = (12, 7, 3), 3


@dataclass(frozen=True, slots=True)
class Abilities:
    """What a model's caches allow, as tried out; a clause says why not, empty where they do.

    Attributes:
        no_chunks: to read on from a cache with several tokens at a time.
        no_stacks: to run sequences of different lengths as one batch.
        no_replay: to give, by one token at a time, what a whole prompt gives, so that a sequence can be set
            back and resumed.
        fixed_bytes: of a sequence's cache, whatever its length.
        token_bytes: of its cache per token.
    """

    no_chunks: str
    no_stacks: str
    no_replay: str
    fixed_bytes: int
    token_bytes: int


class Runner:
    """Runs sequences through a model of transformers, each with what it has left behind.

    Args:
        model: in eval mode.
        kind: of its caches.
        vocab_size: logits from there on are padding.
        decode: the model's forward for one token a sequence, by default its own.
    """

    def __init__(
        self, model: Any, kind: CacheKind, vocab_size: int, decode: Callable[..., Any] | None = None
    ) -> None:
        names = inspect.signature(model.forward).parameters
        self.model = model
        self.kind = kind
        self._vocab_size = vocab_size
        self.decode = decode or model
        self._takes_positions = "position_ids" in names
        self._takes_mask = "attention_mask" in names
        self._picks_rows = "logits_to_keep" in names
        if kind.keyword is not None:
            kind.watch(lambda: self.forward([[3, 4]], [0], kind.fresh()))

    @property
    def grows(self) -> bool:
        """Whether a sequence's cache grows with every token."""
        return self.kind.keyword is None or grows(self.forward([[3, 4]], [0], self.kind.fresh())[1])

    def forward(
        self, ids: Sequence[Sequence[int]], starts: Sequence[int], past: Past, every_row: bool = False
    ) -> tuple[Tensor, Past]:
        """Run as many tokens of each sequence of a batch.

        Args:
            ids: of each sequence, all as many.
            starts: positions of the first of them; ``past`` holds those before, padded to the longest.
            past: changed in place.
            every_row: give the logits after every token, not only the last.

        Returns:
            float32 ``[sequences, tokens or 1, vocab_size]``, and what is left behind now.
        """
        count = len(ids[0])
        if self.kind.keyword is None:
            return self._forward_whole(ids[0], past, every_row)
        device = self.model.device
        given: dict[str, Any] = {self.kind.keyword: past.cache, "use_cache": True}
        if self._takes_positions:
            given["position_ids"] = torch.tensor([[*range(start, start + count)] for start in starts]).to(
                device
            )
        if min(starts) < max(starts) and self._takes_mask and grows(past):
            longest = max(starts)
            mask = [[0] * (longest - start) + [1] * (start + count) for start in starts]
            given["attention_mask"] = torch.tensor(mask).to(device)
        if self._picks_rows and not every_row:
            given["logits_to_keep"] = 1
        self.kind.put(past)
        call = self.decode if count == 1 and max(starts) > 0 else self.model
        output = call(input_ids=torch.tensor(ids).to(device), **given)
        logits: Tensor = output.logits if every_row else output.logits[:, -1:]
        return logits[..., : self._vocab_size].float(), self.kind.after(past, output)

    def _forward_whole(self, ids: Sequence[int], past: Past, every_row: bool) -> tuple[Tensor, Past]:
        """Without a cache: everything again at every step."""
        past.cache = [*(past.cache or ()), *ids]
        logits = self.model(input_ids=torch.tensor([past.cache]).to(self.model.device)).logits
        first = -len(ids) if every_row else -1
        return logits[:, first:, : self._vocab_size].float(), past


@torch.inference_mode()
def try_out(runner: Runner, vocab_size: int, dtype: torch.dtype) -> Abilities:
    """Run three short sequences in every way there is, and compare.

    Raises:
        ModelLoadError: not even one sequence, token by token, works.
    """
    trial = _Trial(runner, vocab_size, dtype)
    try:
        no_replay = trial.one_by_one()
    except Exception as error:
        raise ModelLoadError(
            f"The {runner.model.config.model_type} model cannot be served: its forward failed: {said(error)}."
        ) from error
    unknown = _unknown_layers(runner.model.config.get_text_config(decoder=True))
    return Abilities(
        unknown or trial.chunks(), unknown or trial.stacked(), unknown or no_replay, *trial.sizes()
    )


class _Trial:
    def __init__(self, runner: Runner, vocab_size: int, dtype: torch.dtype) -> None:
        lengths = [length + _DECODES for length in _PROMPTS]
        ids = torch.split_with_sizes(probe_ids(vocab_size, sum(lengths)), lengths)
        self._ids = [part.tolist() for part in ids]
        self._runner = runner
        self._tolerance = _TOLERANCE[dtype]
        self._fresh = runner.kind.fresh

    def one_by_one(self) -> str:
        """Prompts, then decodes of all sequences in turn."""
        self._whole = [self._runner.forward([ids], [0], self._fresh(), True)[0][0] for ids in self._ids]
        pasts = self._prompts()
        worst = 0.0
        for step in range(_DECODES):
            for index, (ids, prompt) in enumerate(zip(self._ids, _PROMPTS, strict=True)):
                at = prompt + step
                logits, pasts[index] = self._runner.forward([[ids[at]]], [at], pasts[index])
                worst = max(worst, self._off(logits[0, -1], index, at))
        return "" if worst <= self._tolerance else "its logits after a token depend on where the prompt ended"

    def chunks(self) -> str:
        if self._runner.kind.keyword is None:
            return "it has no cache"
        try:
            past, worst = self._fresh(), 0.0
            for first, stop in ((0, 5), (5, 8), (8, 12)):
                logits, past = self._runner.forward([self._ids[0][first:stop]], [first], past)
                worst = max(worst, self._off(logits[0, -1], 0, stop - 1))
        except Exception as error:
            return f"reading on with several tokens failed: {said(error)}"
        return "" if worst <= self._tolerance else "its cache does not read on with several tokens"

    def stacked(self) -> str:
        if self._runner.kind.keyword is None:
            return "it has no cache"
        lengths = list(_PROMPTS)
        rows = range(len(lengths))
        try:
            past = stack(self._prompts(), lengths)
            worst = 0.0
            for _ in range(_DECODES - 1):
                tokens = [[self._ids[row][lengths[row]]] for row in rows]
                logits, past = self._runner.forward(tokens, lengths, past)
                worst = max([worst, *(self._off(logits[row, -1], row, lengths[row]) for row in rows)])
                lengths = [length + 1 for length in lengths]
            for row in rows:
                alone = take(past, row, lengths[row])
                logits, _ = self._runner.forward([[self._ids[row][lengths[row]]]], [lengths[row]], alone)
                worst = max(worst, self._off(logits[0, -1], row, lengths[row]))
        except NotStackableError as error:
            return str(error)
        except Exception as error:
            return f"a batch of them failed: {said(error)}"
        return "" if worst <= self._tolerance else "in a batch of them its logits differ"

    def sizes(self) -> tuple[int, int]:
        """Bytes of a cache whatever its length, and per token."""
        ids, shorter = self._ids[0], len(self._ids[2])
        small, large = (nbytes(self._after(ids[:count])) for count in (shorter, len(ids)))
        per_token = max(0, -(-(large - small) // (len(ids) - shorter)))
        return max(0, small - shorter * per_token), per_token

    def _after(self, ids: list[int]) -> Past:
        return self._runner.forward([ids], [0], self._fresh())[1]

    def _prompts(self) -> list[Past]:
        return [self._after(ids[:prompt]) for ids, prompt in zip(self._ids, _PROMPTS, strict=True)]

    def _off(self, logits: Tensor, index: int, at: int) -> float:
        """The difference from the whole forward, in units of the logits' size; NaN is infinite."""
        own = self._whole[index][at]
        size = (own - own.mean()).square().mean().sqrt().clamp_min(1e-30)
        off = ((logits - own).square().mean().sqrt() / size).item()
        return off if off == off else float("inf")


def _unknown_layers(config: Any) -> str:
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None) or ()
    others = sorted({str(kind) for kind in kinds} - _PLAIN_LAYERS)
    return f"it has layers of the kind {others[0]}" if others else ""


def said(error: Exception) -> str:
    """What an error says, as a clause."""
    return (" ".join(str(error).split()) or type(error).__name__)[:200].rstrip(".")
