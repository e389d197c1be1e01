"""The tokenizer inside a GGUF file, as a ``tokenizers.Tokenizer`` that gives the ids llama.cpp gives.

Two kinds exist among the supported models: ``gpt2``, byte-level BPE with a list of merges, and ``llama``,
SentencePiece's BPE, where the merge with the highest score goes first.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from mini_sglang.errors import ModelLoadError, shorten
from mini_sglang.text.gguf_regexes import find_pre_tokenizer
from mini_sglang.text.gguf_vocab import PREFIX, GGUFVocab, TokenType, flag_value, list_value, text_value

logger = logging.getLogger(__name__)

# Part of the cache's key: raise it with every change of what the conversion gives.
CONVERSION_VERSION = 1

_SPACE = "▁"


@dataclass(frozen=True, slots=True)
class GGUFTokenizer:
    """A tokenizer and what its file says about how to use it.

    Attributes:
        tokenizer: ids to text and back. ``encode`` adds begin- and end-of-text as the file says, unless
            called with ``add_special_tokens=False``. Control tokens are special, user-defined ones are not.
        chat_template: the Jinja template, if the file has one.
        add_bos: whether a prompt begins with ``bos_id``.
        add_eos: whether a prompt ends with ``eos_id``.
        eos_ids: every id that ends an answer, ascending; ``eos_id`` is one of them.
    """

    tokenizer: Tokenizer
    chat_template: str | None
    bos_token: str | None
    eos_token: str | None
    bos_id: int | None
    eos_id: int | None
    add_bos: bool
    add_eos: bool
    eos_ids: tuple[int, ...]


def convert_tokenizer(metadata: Mapping[str, Any]) -> GGUFTokenizer:
    """Build the tokenizer that a GGUF file's metadata describes.

    Args:
        metadata: the file's keys (``tokenizer.ggml.model``, ``.pre``, ``.tokens``, ``.merges``, …) as plain
            Python values.

    Raises:
        ModelLoadError: the tokenizer is of a kind that is not supported, incomplete or contradicts itself.
    """
    kind = text_value(metadata, "model")
    if kind not in ("gpt2", "llama"):
        raise ModelLoadError(
            f"The GGUF file's tokenizer (tokenizer.ggml.model) is {shorten(kind)}; it must be gpt2 or llama."
        )
    vocab = GGUFVocab.read(metadata)
    pre = find_pre_tokenizer(text_value(metadata, "pre")) if kind == "gpt2" else None
    # SentencePiece's own ids, which llama.cpp assumes where a file names none.
    defaults: tuple[int | None, int | None, int | None] = (None, None, None) if pre else (1, 2, 0)
    bos_id = vocab.special_id(metadata, "bos", defaults[0])
    eos_id = vocab.special_id(metadata, "eos", defaults[1])
    unknown_id = vocab.special_id(metadata, "unknown", defaults[2])
    eos_ids = vocab.settle_types(metadata, eos_id)
    try:
        if pre:
            merges = _listed_merges(vocab, list_value(metadata, "merges", str))
            tokenizer = Tokenizer(models.BPE(vocab.ids, merges, ignore_merges=pre.ignore_merges))
            tokenizer.pre_tokenizer = _byte_level(vocab, pre.regexes)
            tokenizer.decoder = decoders.ByteLevel()
        else:
            tokenizer = _sentencepiece(vocab, metadata, unknown_id)
        tokenizer.add_tokens(
            [AddedToken(text, special=special, normalized=False) for text, special in vocab.added_tokens()]
        )
    except ModelLoadError:
        raise
    except Exception as error:  # the library raises nothing narrower
        raise ModelLoadError(f"The GGUF file's tokenizer cannot be used: {error}.") from error
    add_bos = flag_value(metadata, "add_bos_token", bos_id is not None and (pre is None or pre.add_bos))
    add_eos = flag_value(metadata, "add_eos_token", False)
    for name, wanted, token_id in (("bos", add_bos, bos_id), ("eos", add_eos, eos_id)):
        if wanted and token_id is None:
            raise ModelLoadError(
                f"The GGUF file asks for a token that it does not name: {PREFIX}add_{name}_token is true, "
                f"but there is no usable {PREFIX}{name}_token_id."
            )
    template = metadata.get("tokenizer.chat_template")
    result = GGUFTokenizer(
        tokenizer=tokenizer,
        chat_template=template if isinstance(template, str) and template else None,
        bos_token=None if bos_id is None else vocab.tokens[bos_id],
        eos_token=None if eos_id is None else vocab.tokens[eos_id],
        bos_id=bos_id,
        eos_id=eos_id,
        add_bos=add_bos,
        add_eos=add_eos,
        eos_ids=eos_ids,
    )
    _frame_prompts(result)
    return result


def load_gguf_tokenizer(path: Path, metadata: Mapping[str, Any] | None, cache_dir: Path) -> GGUFTokenizer:
    """The tokenizer of a GGUF file, converted once and then taken from the cache.

    The cache holds one file per model path, which counts as long as the model's size and time of change are
    the same. One that is damaged or old is made again; one that cannot be written costs only time.

    Args:
        path: the GGUF file.
        metadata: its metadata where that has been read already; else it is read when it is needed.
        cache_dir: the folder for ``tokenizers/``; made when missing.

    Raises:
        ModelLoadError: the file or its tokenizer cannot be used.
    """
    try:
        real_path = path.resolve(strict=True)
        status = real_path.stat()
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror}.") from error
    source = {
        "conversion": CONVERSION_VERSION,
        "path": str(real_path),
        "bytes": status.st_size,
        "mtime_ns": status.st_mtime_ns,
    }
    name = hashlib.sha256(os.fsencode(real_path)).hexdigest()[:24]
    cached = cache_dir / "tokenizers" / f"{name}.gguf-tokenizer"
    loaded = _read_cached(cached, source)
    if loaded is not None:
        return loaded
    if metadata is None:
        from mini_sglang.backend.loading.gguf import read_gguf

        with read_gguf(path) as file:
            metadata = file.metadata
    result = convert_tokenizer(metadata)
    try:
        _write_cached(cached, source, result)
    except OSError as error:
        logger.info("The converted tokenizer is not kept: %s cannot be written (%s).", cached, error.strerror)
    return result


def _write_cached(cached: Path, source: Mapping[str, Any], result: GGUFTokenizer) -> None:
    """Write three lines: a checksum of the rest, the source and the small fields, the tokenizer's JSON."""
    small = {f.name: getattr(result, f.name) for f in fields(result) if f.name != "tokenizer"}
    head = json.dumps({"source": source, "fields": small}).encode()
    body = head + b"\n" + result.tokenizer.to_str().encode()
    cached.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=cached.parent, prefix=cached.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(_checksum(body) + b"\n" + body)
            file.flush()
            temporary.replace(cached)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise


def _read_cached(cached: Path, source: Mapping[str, Any]) -> GGUFTokenizer | None:
    try:
        checksum, _, body = cached.read_bytes().partition(b"\n")
        if checksum != _checksum(body):
            raise ValueError("wrong checksum")
        head, _, tokenizer_json = body.partition(b"\n")
        stored = json.loads(head)
        if stored["source"] != source:
            return None
        small = stored["fields"]
        small["eos_ids"] = tuple(small["eos_ids"])
        return GGUFTokenizer(tokenizer=Tokenizer.from_buffer(tokenizer_json), **small)
    except FileNotFoundError:
        return None
    except Exception as error:  # whatever is wrong with a cached file, the model itself is still there
        logger.info("The cached tokenizer %s cannot be used (%s); it is made again.", cached, error)
        return None


def _checksum(body: bytes) -> bytes:
    return hashlib.sha256(body).hexdigest().encode()


def _listed_merges(vocab: GGUFVocab, merges: Sequence[str]) -> list[tuple[str, str]]:
    # The first of two equal merges counts; the library would take the last.
    pairs: dict[tuple[str, str], None] = {}
    unusable = 0
    for merge in merges:
        cut = merge.find(" ", 1)
        left, right = merge[:cut], merge[cut + 1 :]
        if cut < 0 or not (left in vocab.ids and right in vocab.ids and left + right in vocab.ids):
            unusable += 1
        else:
            pairs.setdefault((left, right))
    if unusable:
        logger.warning("%d merges of the GGUF file name no tokens; they are left out.", unusable)
    return list(pairs)


def _byte_level(vocab: GGUFVocab, regexes: Iterable[str]) -> pre_tokenizers.PreTokenizer:
    steps: list[pre_tokenizers.PreTokenizer] = [
        pre_tokenizers.Split(Regex(regex), "isolated") for regex in regexes
    ]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    missing = [char for char in pre_tokenizers.ByteLevel.alphabet() if char not in vocab.ids]
    if missing:
        # A byte without a token is dropped, but keeps its neighbours from merging.
        chars = "".join(rf"\x{{{ord(char):X}}}" for char in sorted(missing))
        steps.append(pre_tokenizers.Split(Regex(f"[{chars}]"), "removed"))
    return pre_tokenizers.Sequence(steps)


def _sentencepiece(vocab: GGUFVocab, metadata: Mapping[str, Any], unknown_id: int | None) -> Tokenizer:
    unknown = None if unknown_id is None else vocab.tokens[unknown_id]
    tokenizer = Tokenizer(models.BPE(vocab.ids, _scored_merges(vocab), unk_token=unknown, byte_fallback=True))
    prefix = flag_value(metadata, "add_space_prefix", True)
    escape = normalizers.Replace(" ", _SPACE)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefix else escape
    stages = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*stages, decoders.Strip(" ", 1, 0)] if prefix else stages)
    return tokenizer


def _scored_merges(vocab: GGUFVocab) -> list[tuple[str, str]]:
    """Every split of every token into two tokens, the token of the highest score first.

    Control, unknown and byte tokens are left out: typed text never becomes one, as in SentencePiece.
    """
    if not vocab.scores:
        raise ModelLoadError(f"The GGUF file's tokenizer is incomplete: {PREFIX}scores is missing.")
    if any(score != score for score in vocab.scores):
        raise ModelLoadError(f"The GGUF file's tokenizer is damaged: {PREFIX}scores has a NaN.")
    apart = (TokenType.CONTROL, TokenType.UNKNOWN, TokenType.BYTE)
    pieces = {text: i for text, i in vocab.ids.items() if vocab.types[i] not in apart}
    ordered = sorted(pieces, key=lambda text: (-vocab.scores[pieces[text]], pieces[text]))
    return [
        (text[:cut], text[cut:])
        for text in ordered
        for cut in range(1, len(text))
        if text[:cut] in pieces and text[cut:] in pieces
    ]


def _frame_prompts(result: GGUFTokenizer) -> None:
    """Have ``encode`` put begin- and end-of-text around a prompt where the file says so."""
    wanted = {
        "bos": (result.add_bos, result.bos_id, result.bos_token),
        "eos": (result.add_eos, result.eos_id, result.eos_token),
    }
    special = [{"id": n, "ids": [i], "tokens": [text]} for n, (add, i, text) in wanted.items() if add]
    if special:
        names = [str(token["id"]) for token in special]
        result.tokenizer.post_processor = processors.TemplateProcessing(
            single=[name for name in ("bos", "$A", "eos") if name in (*names, "$A")],
            special_tokens=special,
        )
