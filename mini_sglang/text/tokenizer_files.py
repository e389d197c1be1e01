"""The tokenizer files of a Hugging Face model folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import ModelLoadError, shorten
from mini_sglang.text.chat_template import ChatTemplate
from mini_sglang.text.tokenizer import PythonTokenizer, Tokenizer

if TYPE_CHECKING:
    from tokenizers import AddedToken
    from tokenizers import Tokenizer as RustTokenizer

_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OLDER_FILES = ("*.model", "vocab.json", "vocab.txt", "tekken.json", "*.tiktoken", "tokenization_*.py")


def load_folder(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """Load a folder's tokenizer, chat template and end-of-text ids.

    As in transformers, ``tokenizer.json`` decides what is put around a prompt (``add_bos_token`` beside it
    is not read), ``chat_template.jinja`` wins over the template in ``tokenizer_config.json``, and special
    tokens that only ``tokenizer_config.json`` names are added. Every id that ``generation_config.json``,
    ``config.json`` or the tokenizer names as end-of-text ends an answer.

    Raises:
        ModelLoadError: a file is missing or damaged, or ``transformers`` is needed and not installed.
    """
    config = _read_json(folder / "special_tokens_map.json") | _read_json(folder / "tokenizer_config.json")
    eos_ids = _eos_ids(folder / "generation_config.json") | _eos_ids(folder / "config.json")
    templates = _templates(folder, config)
    file = folder / "tokenizer.json"
    if file.is_file():
        rust = _read_tokenizer(file)
    else:
        foreign = _through_transformers(folder, trust_remote_code)
        named = {name: str(token) for name in _NAMED_TOKENS if (token := getattr(foreign, name, None))}
        config = config | named
        backend = getattr(foreign, "backend_tokenizer", None)
        if backend is None:
            eos_ids |= {foreign.eos_token_id} - {None}
            return PythonTokenizer(foreign, chat_template=_template(templates, named), eos_ids=eos_ids)
        rust = backend
    special = _add_special_tokens(rust, config, folder)
    bos_id, eos_id = (
        rust.token_to_id(special[name]) if name in special else None for name in ("bos_token", "eos_token")
    )
    if eos_id is not None:
        eos_ids |= {eos_id}
    return Tokenizer(
        rust,
        chat_template=_template(templates, special),
        bos_id=bos_id,
        eos_id=eos_id,
        eos_ids=eos_ids,
    )


def load_folder_or_stand_in(folder: Path, *, trust_remote_code: bool = False) -> Tokenizer:
    """``load_folder``, or a token for each byte where the folder has no tokenizer.

    Raises:
        ModelLoadError: as ``load_folder``, or config.json is damaged.
    """
    if any(next(folder.glob(name), None) for name in ("tokenizer.json", *_OLDER_FILES)):
        return load_folder(folder, trust_remote_code=trust_remote_code)
    from mini_sglang.text.byte_tokenizer import byte_tokenizer

    size = _read_json(folder / "config.json").get("vocab_size")
    return byte_tokenizer(size if isinstance(size, int) else 256)


def _read_tokenizer(file: Path) -> RustTokenizer:
    from tokenizers import Tokenizer as RustTokenizer

    try:
        return RustTokenizer.from_file(str(file))
    except (KeyboardInterrupt, SystemExit):
        raise
    # A panic of the Rust library is a BaseException.
    except BaseException as error:
        raise ModelLoadError(f"{file} cannot be read as a tokenizer: {str(error)[:200]}.") from None


def _read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file; empty where there is no such file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ModelLoadError(f"{file} cannot be read: {error.strerror or error}.") from None
    except (ValueError, RecursionError) as error:
        raise ModelLoadError(f"{file} is damaged, it is not JSON: {error}.") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{file} is damaged: it holds a {type(value).__name__} where an object belongs.")
    return value


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{file} cannot be read: {error}.") from None


def _eos_ids(file: Path) -> frozenset[int]:
    value = _read_json(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(token_id) is int and token_id >= 0 for token_id in ids):
        raise ModelLoadError(
            f"{file} is damaged: eos_token_id is {shorten(value)}, not an id or a list of ids."
        )
    return frozenset(ids)


def _templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The folder's chat templates by name."""
    templates: dict[str, str] = {}
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        return {name: _read_text(file) for name, file in files.items()}
    given = config.get("chat_template") or _read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(given, str):
        templates["default"] = given
    elif isinstance(given, list):
        for entry in given:
            if not isinstance(entry, dict) or not all(
                isinstance(entry.get(k), str) for k in ("name", "template")
            ):
                raise ModelLoadError(f"The chat templates of {folder} are damaged: {shorten(entry)}.")
            templates[entry["name"]] = entry["template"]
    elif given is not None:
        raise ModelLoadError(f"The chat template of {folder} is damaged: {shorten(given)}.")
    return templates


def _template(templates: Mapping[str, str], special: Mapping[str, str]) -> ChatTemplate | None:
    return ChatTemplate(templates, special) if templates else None


def _add_special_tokens(tokenizer: RustTokenizer, config: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """Make every token that the config names special known to the tokenizer; give the named ones' texts."""
    file = folder / "tokenizer_config.json"
    special = {name: _token(config[name], name, file) for name in _NAMED_TOKENS if config.get(name)}
    wanted = list(special.values())
    declared = config.get("added_tokens_decoder")
    if isinstance(declared, dict):
        known = {repr(token) for token in tokenizer.get_added_tokens_decoder().values()}
        keys = sorted((key for key in declared if key.isdecimal()), key=int)
        tokens = [_token(value, "added_tokens_decoder", file) for value in (declared[key] for key in keys)]
        tokenizer.add_tokens([token for token in tokens if repr(token) not in known])
    for name in ("additional_special_tokens", "extra_special_tokens"):
        more = config.get(name) or []
        values = more.values() if isinstance(more, dict) else more if isinstance(more, list) else [more]
        wanted += [_token(value, name, file) for value in values]
    known_special = {t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special}
    tokenizer.add_special_tokens([token for token in wanted if token.content not in known_special])
    return {name: token.content for name, token in special.items()}


def _token(value: Any, name: str, file: Path) -> AddedToken:
    """A token given as its text, or as an object with ``content`` and flags."""
    from tokenizers import AddedToken

    if isinstance(value, str):
        return AddedToken(value, special=True, normalized=False)
    if isinstance(value, dict) and isinstance(value.get("content"), str):
        flags = {
            flag: bool(value[flag])
            for flag in ("lstrip", "rstrip", "single_word", "normalized")
            if flag in value
        }
        special = bool(value.get("special", name != "added_tokens_decoder"))
        return AddedToken(value["content"], special=special, **flags)
    raise ModelLoadError(f"{file} is damaged: {name} is {shorten(value)}, not a token.")


def _through_transformers(folder: Path, trust_remote_code: bool) -> Any:
    """The folder's tokenizer as ``transformers`` makes it, for models older than ``tokenizer.json``."""
    if not any(path for pattern in _OLDER_FILES for path in folder.glob(pattern)):
        raise ModelLoadError(f"The folder {folder} holds no tokenizer: tokenizer.json is missing.")
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise ModelLoadError(
            f"The folder {folder} has no tokenizer.json; to convert its older tokenizer files, "
            "install transformers (pip install transformers sentencepiece protobuf)."
        ) from None
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), trust_remote_code=trust_remote_code, local_files_only=True
        )
    except Exception as error:
        hint = "" if trust_remote_code else "; where it needs the model's own code, set TRUST_REMOTE_CODE=1"
        reason = " ".join(str(error).split())[:200]
        raise ModelLoadError(
            f"The tokenizer of {folder}, which has no tokenizer.json, cannot be loaded: {reason}{hint}."
        ) from None
