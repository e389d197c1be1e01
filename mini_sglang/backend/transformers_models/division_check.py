"""The proof at load that a model divided by its ``tp_plan`` gives what the whole model gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mini_sglang.backend.transformers_models.check import error_of_logits
from mini_sglang.backend.transformers_models.decoder import probe_ids
from mini_sglang.backend.transformers_models.runner import said

_TOKENS = 12
# Both add up the same numbers in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.1}


class NotDividedError(Exception):
    """The plan is not right for this model; the message is a clause that says why."""


class DivisionCheck:
    """Compares a divided model with itself made whole again, a module at a time, over a few tokens.

    A plan may be wrong for a config: what looks at a whole row between two matrices sees a part of it.

    Args:
        model: as ``load_model`` gives it on one of several ranks. All of them make one, and call it.

    Raises:
        NotDividedError: the forward fails.
    """

    def __init__(self, model: Any, vocab_size: int, dtype: torch.dtype) -> None:
        self._model = model
        self._tolerance = _TOLERANCE[dtype]
        self._ids = probe_ids(vocab_size, _TOKENS).to(model.device)[None]
        with _whole(model):
            self._whole = self._logits()

    def __call__(self) -> None:
        """See that the model is right as it is now.

        Raises:
            NotDividedError: the logits differ by more than the dtype explains, or the forward fails.
        """
        off = error_of_logits(self._logits(), self._whole)
        if not off <= self._tolerance:
            raise NotDividedError(f"divided by its tp_plan, its logits are off by {off:.2g} of their size")

    @torch.inference_mode()
    def _logits(self) -> Tensor:
        try:
            logits: Tensor = self._model(input_ids=self._ids, use_cache=False).logits
        except Exception as error:
            raise NotDividedError(f"divided by its tp_plan, its forward failed: {said(error)}") from error
        return logits.float()


@contextmanager
def _whole(model: nn.Module) -> Iterator[None]:
    """Within it each module gathers its parameters when it is called, and the plan's hooks do nothing."""
    hooked = {}
    for module in model.modules():
        divided = [name for name, tensor in module._parameters.items() if hasattr(tensor, "full_tensor")]
        if divided or "forward" in module.__dict__:
            hooked[module] = module.__dict__.get("forward")
            module.forward = partial(_call_whole, module, divided)
    try:
        yield
    finally:
        for module, forward in hooked.items():
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _call_whole(module: nn.Module, divided: list[str], *args: Any, **kwargs: Any) -> Any:
    parts = {name: module._parameters[name] for name in divided}
    try:
        for name, part in parts.items():
            assert part is not None
            module._parameters[name] = nn.Parameter(part.full_tensor(), requires_grad=False)  # type: ignore[attr-defined]
        return type(module).forward(module, *args, **kwargs)
    finally:
        module._parameters.update(parts)
