"""Which files of a repository or folder make a model."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from pathlib import Path

from mini_sglang.errors import ModelLoadError, shorten

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
SMALL_FILES = (
    CONFIG,
    "generation_config.json",
    *TOKENIZERS,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
# The first of these found in a file's name decides: the best answers for their size come first.
GGUF_PREFERENCE = (
    "Q4_K_M", "Q4_K_S", "Q4_1", "Q4_0", "Q5_K_M", "Q5_K_S", "Q5_1", "Q5_0", "Q6_K", "Q8_0",
    "BF16", "F16", "F32",
)  # fmt: skip
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt")

_MAX_INDEX_BYTES = 64 << 20
_SPLIT_GGUF = re.compile(r"-\d{5}-of-\d{5}\.gguf$", re.IGNORECASE)
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._ +-]{0,199}")


def is_plain_name(name: str) -> bool:
    """Whether ``name`` is a file name without folders that is safe to create."""
    return _PLAIN_NAME.fullmatch(name) is not None and ".." not in name


def small_files(names: Collection[str], *, remote_code: bool) -> list[str]:
    """The configuration and tokenizer files among ``names``; Python code only with ``remote_code``."""
    wanted = [name for name in SMALL_FILES if name in names]
    if remote_code:
        wanted += sorted(name for name in names if name.endswith(".py") and is_plain_name(name))
    return wanted


def choose_gguf(names: Collection[str]) -> str | None:
    """The one ``.gguf`` file to load among ``names``; None where there is none.

    A single file is taken as it is. Of several, the first whose name holds one of
    ``GGUF_PREFERENCE``, tried in that order (Q4_K_M first). Split files and the vision towers that
    llama.cpp calls mmproj are left aside.

    Raises:
        ModelLoadError: there are several and none has a type that this stack reads, or only split ones.
    """
    every = sorted(name for name in names if name.lower().endswith(".gguf") and is_plain_name(name))
    whole = [name for name in every if not _SPLIT_GGUF.search(name) and "mmproj" not in name.lower()]
    if len(whole) == 1:
        return whole[0]
    for kind in GGUF_PREFERENCE:
        for name in whole:
            if re.search(rf"(?<![A-Za-z0-9]){kind}(?![A-Za-z0-9_])", name, re.IGNORECASE):
                return name
    if whole:
        raise ModelLoadError(
            f"None of the {len(whole)} .gguf files names a type that can be read "
            f"({', '.join(GGUF_PREFERENCE)}); choose one as owner/name/file.gguf."
        )
    if every:
        raise ModelLoadError(f"Its .gguf is split or no language model ({every[0]}); a whole file is needed.")
    return None


def shard_names(index: Path) -> list[str]:
    """The weight files that a ``model.safetensors.index.json`` names, sorted, each once.

    Raises:
        ModelLoadError: the index cannot be read, or names a file outside its folder.
    """
    try:
        if index.stat().st_size > _MAX_INDEX_BYTES:
            raise ValueError("it is too large")
        weight_map = json.loads(index.read_bytes())["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelLoadError(f"The weight index {index} cannot be read: {shorten(str(error))}.") from None
    for shard in shards:
        if not isinstance(shard, str) or not is_plain_name(shard) or not shard.endswith(".safetensors"):
            raise ModelLoadError(
                f"The weight index {index} names {shorten(shard)}; "
                "only .safetensors files beside it are allowed."
            )
    if not shards:
        raise ModelLoadError(f"The weight index {index} names no weight file.")
    return shards


def no_weights_reason(names: Collection[str]) -> str:
    """Why ``names`` holds nothing to load, as the end of "it …"."""
    pickles = sorted(name for name in names if name.lower().endswith(PICKLE_SUFFIXES))
    if pickles:
        return f"has only pickle weights ({pickles[0]}), which are not loaded: they can run code"
    return f"has neither {WEIGHTS} nor {WEIGHTS_INDEX} nor a .gguf file"


def whole_model(folder: Path, gguf: str | None = None) -> Path | None:
    """The model that is whole in ``folder``: the folder itself or a ``.gguf`` in it; None where none is.

    A folder is whole with a configuration, a tokenizer and every weight file that its index names.
    """
    if gguf is not None:
        return folder / gguf if (folder / gguf).is_file() else None
    try:
        names = {entry.name for entry in folder.iterdir() if entry.is_file()}
        if WEIGHTS in names or WEIGHTS_INDEX in names:
            weights = [WEIGHTS] if WEIGHTS in names else shard_names(folder / WEIGHTS_INDEX)
            has_tokenizer = any(name in names for name in TOKENIZERS)
            return folder if CONFIG in names and has_tokenizer and names.issuperset(weights) else None
        chosen = choose_gguf(names)
    except (OSError, ModelLoadError):
        return None
    return folder / chosen if chosen else None
