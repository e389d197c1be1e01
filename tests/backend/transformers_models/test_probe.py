"""What our attention must not be used for is refused, by what the model asks for and by what it gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.masking_utils import (
    bidirectional_mask_function,
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_causal_mask_function,
)

from mini_sglang.backend.attention.base import AttentionForm
from mini_sglang.backend.attention.paged import PagedAttention
from mini_sglang.backend.transformers_models.attention import Recorder
from mini_sglang.backend.transformers_models.check import self_check
from mini_sglang.backend.transformers_models.decoder import TransformersConfig, TransformersDecoder, probe
from mini_sglang.backend.transformers_models.masks import AskedMask, NotPagedError
from tests.backend.transformers_models.families import CONTEXT, VOCAB_SIZE, Family, tiny_model

CONFIG = TransformersConfig("a test's", VOCAB_SIZE, CONTEXT, ())
TORCH = PagedAttention()


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model(Family("GLM-4", "glm4"))


def checked(model: Any) -> TransformersDecoder:
    decoder = probe(model, CONFIG)
    self_check(decoder, TORCH, torch.float32)
    return decoder


@pytest.mark.parametrize(
    ("function", "size", "context", "window"),
    [
        (causal_mask_function, None, 4096, None),
        (sliding_window_causal_mask_function(512), 512, 4096, 512),
        (sliding_window_causal_mask_function(1), 1, 4096, 1),
        # A window that no sequence fills is none.
        (sliding_window_causal_mask_function(4096), 4096, 4096, None),
        (chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.int64)), 512, 512, None),
    ],
)
def test_a_mask_tells_its_window(function: Any, size: int | None, context: int, window: int | None) -> None:
    assert AskedMask(function, size).window(context) == window


@pytest.mark.parametrize(
    ("function", "size"),
    [
        (bidirectional_mask_function, None),
        (chunked_causal_mask_function(512, torch.zeros(1, dtype=torch.int64)), 512),
        (sliding_window_causal_mask_function(511), 512),
        # Hides one position far from the start.
        (lambda batch, head, query, key: (key <= query) & ~((query == 4095) & (key == 4095)), None),
    ],
)
def test_any_other_mask_is_refused(function: Any, size: int | None) -> None:
    with pytest.raises(NotPagedError, match="neither causal nor a sliding window"):
        AskedMask(function, size).window(4096)


def record(mask: object = None, **given: Any) -> Recorder:
    recorder = Recorder(CONTEXT)
    query, key = torch.zeros(1, 4, 6, 8), torch.zeros(1, 2, 6, 8)
    recorder.attend(nn.Module(), query, key, key.clone(), mask, given)
    return recorder


def test_what_a_call_asks_for_is_kept() -> None:
    sinks = nn.Parameter(torch.arange(4.0))
    (call,) = record(
        scaling=0.3, softcap=20.0, s_aux=sinks, sliding_window=7, dropout=0.0, position_ids=torch.zeros(1, 6)
    ).calls
    assert (call.window, call.form.scale, call.form.softcap, call.heads) == (7, 0.3, 20.0, 4)
    assert call.form.sinks is not None and torch.equal(call.form.sinks, sinks)


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias, which is not supported"),
        ({"indices": torch.zeros(1)}, "indices, which is not supported"),
        ({"is_causal": False}, "not causal"),
        ({"dropout": 0.1}, "dropout"),
        ({"scaling": torch.ones(6)}, "scaling of its attention is not a number"),
        ({"s_aux": torch.zeros(4)}, "sinks"),
        ({"mask": torch.zeros(1, 1, 6, 6)}, "a mask of its own"),
    ],
)
def test_what_is_not_understood_is_refused(given: dict[str, Any], why: str) -> None:
    with pytest.raises(NotPagedError, match=why):
        record(**given)


def test_layers_that_share_their_kv_keep_it_once() -> None:
    shared = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_hidden_layers": 4}
    family = Family(
        "Gemma 3n",
        "gemma3n_text",
        config={
            **shared,
            "head_dim": 12,
            "intermediate_size": [40] * 4,
            "num_kv_shared_layers": 2,
            "activation_sparsity_pattern": [0.0] * 4,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB_SIZE,
        },
    )
    decoder = checked(tiny_model(family))
    assert [(call.layer, call.owner) for call in decoder.calls] == [
        (0, True),
        (1, True),
        (0, False),
        (1, False),
    ]
    assert len(decoder.shapes) == 2


def test_positions_that_are_not_used_show(model: PreTrainedModel) -> None:
    run = model.forward
    model.forward = lambda *args, position_ids=None, **kwargs: run(*args, **kwargs)  # type: ignore[method-assign]
    with pytest.raises(NotPagedError, match="its logits over pages differ"):
        checked(model)


def roll(module: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
    """What a convolution or a recurrent layer does: a token's neighbour in the row matters."""
    return out + 0.1 * out.roll(1, dims=1)


def test_what_passes_between_tokens_beside_attention_shows(model: PreTrainedModel) -> None:
    model.model.layers[1].mlp.register_forward_hook(roll)
    with pytest.raises(NotPagedError, match="its logits over pages differ"):
        checked(model)


@pytest.mark.parametrize(
    "change",
    [
        lambda call: {"form": AttentionForm(2 * call.form.scale)},
        lambda call: {"form": AttentionForm(call.form.scale, sinks=torch.zeros(4))},
        lambda call: {"form": AttentionForm(call.form.scale, softcap=0.5)},
        lambda call: {"window": 5},
    ],
    ids=["scale", "sinks", "softcap", "window"],
)
def test_attention_of_another_form_shows(
    model: PreTrainedModel, change: Callable[[Any], dict[str, Any]]
) -> None:
    from dataclasses import replace

    decoder = probe(model, CONFIG)
    decoder.calls[1] = replace(decoder.calls[1], **change(decoder.calls[1]))
    with pytest.raises(NotPagedError, match="its logits over pages differ"):
        self_check(decoder, TORCH, torch.float32)


def test_a_model_of_another_attention_is_refused() -> None:
    with pytest.raises(NotPagedError, match="does not call the attention"):
        probe(tiny_model(Family("Falcon", "falcon")), CONFIG)


def test_a_forward_that_turns_off_its_way_is_stopped(model: PreTrainedModel) -> None:
    decoder = probe(model, CONFIG)
    decoder.calls.reverse()
    with pytest.raises(NotPagedError, match="another way through its layers"):
        self_check(decoder, TORCH, torch.float32)


def test_positions_that_an_attention_takes_from_its_cache_are_refused() -> None:
    family = Family("Llama 4", "llama4_text", config={"head_dim": 8, "intermediate_size_mlp": 40})
    with pytest.raises(NotPagedError, match="counts positions by its cache"):
        probe(tiny_model(family, attn_temperature_tuning=True), CONFIG)
    layers = checked(tiny_model(family, attn_temperature_tuning=False)).calls
    # Chunks of 8,192 tokens do not show within a context of 128.
    assert {call.window for call in layers} == {None}
