"""From a folder to one of transformers' models."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mini_sglang.errors import ModelLoadError, shorten

INSTALL = 'pip install "mini-sglang[transformers]"'


def import_transformers(model_type: object) -> Any:
    """The module ``transformers``.

    Raises:
        ModelLoadError: it is not installed; the sentence names the ``model_type`` that needs it.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError:
        raise ModelLoadError(
            f"A model of the type {shorten(model_type)} runs through transformers, which is not "
            f"installed: {INSTALL}."
        ) from None


def read_config(path: Path, checkpoint_config: Mapping[str, Any], trust_remote_code: bool) -> Any:
    """The folder's config as transformers reads it, a ``PreTrainedConfig``.

    Raises:
        ModelLoadError: transformers is missing, does not know the model, or refuses its config.
    """
    transformers = import_transformers(_model_type(checkpoint_config))
    try:
        return transformers.AutoConfig.from_pretrained(
            str(path), local_files_only=True, trust_remote_code=trust_remote_code
        )
    except Exception as error:
        raise _refused(path, checkpoint_config, trust_remote_code, error) from None


def load_model(
    path: Path,
    checkpoint_config: Mapping[str, Any],
    dtype: torch.dtype,
    device: torch.device,
    attn_implementation: str,
    trust_remote_code: bool,
    ranks: int = 1,
) -> nn.Module:
    """The causal LM in a folder of safetensors, in eval mode on ``device``.

    Args:
        path: the folder; nothing is asked of the network.
        checkpoint_config: the content of its ``config.json``.
        dtype: of the weights.
        attn_implementation: transformers' name: ``eager``, ``sdpa``, ``flash_attention_2``, …
        trust_remote_code: whether the folder's own Python code may run.
        ranks: more have the model's ``tp_plan`` divide it over torch's default group of as many.

    Raises:
        ModelLoadError: transformers is missing, does not know the model, or cannot load it; a weight is
            missing or has another shape.
    """
    transformers = import_transformers(_model_type(checkpoint_config))
    config = read_config(path, checkpoint_config, trust_remote_code)
    divided: dict[str, Any] = {}
    if ranks > 1:
        distributed = importlib.import_module("transformers.distributed")
        divided["distributed_config"] = distributed.DistributedConfig(tp_size=ranks)
    try:
        with _quiet(transformers):
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                str(path),
                config=config,
                dtype=dtype,
                attn_implementation=attn_implementation,
                local_files_only=True,
                trust_remote_code=trust_remote_code,
                # Opening pickled weights can run code.
                use_safetensors=True,
                # Refused below, with a sentence of our own.
                ignore_mismatched_sizes=True,
                output_loading_info=True,
                **divided,
            )
    except Exception as error:
        raise _refused(path, checkpoint_config, trust_remote_code, error) from None
    for what, key in (("no tensor", "missing_keys"), ("another shape of the tensor", "mismatched_keys")):
        names = sorted(str(name[0] if isinstance(name, tuple) else name) for name in report.get(key) or ())
        if names:
            raise ModelLoadError(
                f"The weights of {path} have {what} {shorten(names[0])}, which a "
                f"{_model_type(checkpoint_config)} model needs" + _and_more(len(names) - 1) + "."
            )
    loaded: nn.Module = model.to(device).eval()
    return loaded.requires_grad_(False)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own progress bar and report, which would break our lines."""
    logging = transformers.utils.logging
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _model_type(config: Mapping[str, Any]) -> str:
    named = config.get("model_type") or next(iter(config.get("architectures") or ()), None)
    return str(named) if named else "that config.json does not name"


def _and_more(count: int) -> str:
    return f", and {count} more" if count else ""


def _refused(
    path: Path, config: Mapping[str, Any], trust_remote_code: bool, error: Exception
) -> ModelLoadError:
    # The first sentence: transformers likes to go on with advice.
    reason = " ".join(str(error).split()).split(". ")[0][:300].rstrip(".!") or type(error).__name__
    own_code = bool(config.get("auto_map")) and not trust_remote_code
    hint = "; where it needs the repository's own code, set TRUST_REMOTE_CODE=1" if own_code else ""
    return ModelLoadError(
        f"transformers cannot load the {_model_type(config)} model in {path}: {reason}{hint}."
    )
