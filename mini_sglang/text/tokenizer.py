"""Text to token ids and back, for one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.text.chat_template import ChatTemplate, plain_data, plain_messages
from mini_sglang.text.decoder_stages import byte_level_alphabet, byte_level_bytes, decoder_specs
from mini_sglang.text.detokenizer import Detokenizer, WindowedDetokenizer, detokenizer_factory
from mini_sglang.text.special_text import SpecialTextGuard, texts_of
from mini_sglang.types import Message, Vocabulary

if TYPE_CHECKING:
    from tokenizers import Tokenizer as RustTokenizer

_NO_TEMPLATE = "The model has no chat template, so it takes a text prompt, not chat messages."


class Tokenizer:
    """The tokenizer of one model with its chat template. Thread-safe.

    Args:
        tokenizer: of the ``tokenizers`` library; not to be changed afterwards.
        chat_template: ``None`` for a model that knows no chat.
        bos_id: id of the beginning-of-text token, if the model has one.
        eos_id: id of the tokenizer's own end-of-text token, if it has one.
        eos_ids: every id that ends an answer.

    Attributes:
        vocab_size: one more than the highest id.
        special_ids: ids that decoding skips.
    """

    def __init__(
        self,
        tokenizer: RustTokenizer,
        *,
        chat_template: ChatTemplate | None = None,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Iterable[int] = (),
    ) -> None:
        tokenizer.no_truncation()
        tokenizer.no_padding()
        added = tokenizer.get_added_tokens_decoder()
        self.vocab_size = max([tokenizer.get_vocab_size(with_added_tokens=False), *(i + 1 for i in added)])
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self.chat_template = chat_template
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = frozenset(eos_ids)
        self._tokenizer = tokenizer
        self._guard = SpecialTextGuard(tokenizer)
        self._new_detokenizer: Callable[[], Detokenizer] = detokenizer_factory(tokenizer)
        specs = decoder_specs(tokenizer)
        byte_level = specs is not None and any(spec["type"] == "ByteLevel" for spec in specs)
        self._byte_of = byte_level_alphabet() if byte_level else None

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        """Ids of a raw prompt.

        Special tokens spelled in ``text`` become control tokens: who writes a raw prompt writes the
        template too. Text from users belongs into ``encode_chat``.

        Args:
            add_special: put the model's beginning-of-text token first, where its tokenizer does that.

        Raises:
            InvalidValueError: ``text`` is not text that has a UTF-8 form.
        """
        _check_unicode("prompt", text)
        return self._tokenizer.encode(text, add_special_tokens=add_special).ids

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Ids of a conversation, laid out by the model's chat template, which also places special tokens.

        Special tokens spelled in ``messages``, ``tools`` or ``template_kwargs`` are text. Added tokens
        that are not special (``<think>``, where a model declares it so) stay tokens.

        Args:
            messages: each with ``role`` and ``content``, a text or a list of ``{"type": "text"}`` parts.
            add_generation_prompt: end with the opening of the assistant's turn.
            continue_final_message: end where the text of the last message ends.
            tools: JSON schemas of functions the model may call.
            template_kwargs: further variables of this model's template.

        Raises:
            InvalidValueError: a message that is not allowed, or a conversation the template refuses.
            ModelLoadError: the model has no chat template, or a damaged one.
        """
        template = self.chat_template
        if template is None:
            raise ModelLoadError(_NO_TEMPLATE)
        inputs = [
            plain_messages(messages),
            plain_data(tools, "tools"),
            plain_data(template_kwargs or {}, "template_kwargs"),
        ]
        (shown, shown_tools, shown_kwargs), disguises = self._disguise(
            inputs, "".join(template.sources.values())
        )
        rendered = template.render(
            shown,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=shown_tools,
            template_kwargs=shown_kwargs,
        )
        _check_unicode("messages", rendered)
        if disguises:
            return self._guard.encode(rendered, disguises)
        return self.encode(rendered, add_special=False)

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; ids outside the vocabulary give none, broken UTF-8 gives U+FFFD."""
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special)

    def token_text(self, token_id: int) -> str:
        """One token readably, for logs: special tokens by name, bytes of half a character as ``\\xNN``."""
        token = self._tokenizer.id_to_token(token_id)
        if token is None:
            return f"<id {token_id}>"
        if self._byte_of is not None:
            return byte_level_bytes(token, self._byte_of).decode("utf-8", "backslashreplace")
        return token.replace("▁", " ")

    def detokenizer(self) -> Detokenizer:
        """For one answer: its pieces join to ``decode(ids)``."""
        return self._new_detokenizer()

    def vocabulary(self) -> Vocabulary:
        """What each token adds to an answer's text; made anew each time.

        Raises:
            ModelLoadError: that depends on its neighbours, so that no grammar can be followed.
        """
        from mini_sglang.text.vocabulary import vocabulary_of

        return vocabulary_of(self._tokenizer)

    def _disguise(self, inputs: list[Any], taken: str) -> tuple[list[Any], dict[str, str]]:
        return self._guard.disguise(inputs, taken)


class PythonTokenizer(Tokenizer):
    """A tokenizer that exists only as Python code, run through ``transformers``.

    It cannot encode a special token as text, so messages that spell one are refused.
    """

    def __init__(
        self, tokenizer: Any, *, chat_template: ChatTemplate | None = None, eos_ids: Iterable[int] = ()
    ) -> None:
        self._python = tokenizer
        self.vocab_size = len(tokenizer)
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.chat_template = chat_template
        self.bos_id = tokenizer.bos_token_id
        self.eos_id = tokenizer.eos_token_id
        self.eos_ids = frozenset(eos_ids)

    def encode(self, text: str, *, add_special: bool = True) -> list[int]:
        _check_unicode("prompt", text)
        return [int(token_id) for token_id in self._python.encode(text, add_special_tokens=add_special)]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        return str(
            self._python.decode(
                list(ids), skip_special_tokens=skip_special, clean_up_tokenization_spaces=False
            )
        )

    def token_text(self, token_id: int) -> str:
        return self.decode([token_id], skip_special=False)

    def detokenizer(self) -> Detokenizer:
        return WindowedDetokenizer(self.decode)

    def vocabulary(self) -> Vocabulary:
        raise ModelLoadError("No grammar can be followed with a tokenizer that exists as Python code only.")

    def _disguise(self, inputs: list[Any], taken: str) -> tuple[list[Any], dict[str, str]]:
        texts = list(texts_of(inputs))
        for token in self._python.all_special_tokens:
            if any(token in text for text in texts):
                raise InvalidValueError(
                    "messages", inputs[0], f"text without this model's special token {token}"
                )
        return inputs, {}


def load_tokenizer(
    path: Path, *, cache_dir: Path, trust_remote_code: bool = False, stand_in: bool = False
) -> Tokenizer:
    """Load the tokenizer of a model folder or GGUF file.

    Args:
        path: a folder with ``tokenizer.json``, or with older files that ``transformers`` can convert; or
            a ``.gguf`` file.
        cache_dir: where the converted tokenizer of a GGUF file is kept.
        trust_remote_code: let ``transformers`` run the repository's own Python code where it must.
        stand_in: take a token for each byte where a folder has no tokenizer.

    Raises:
        ModelLoadError: files are missing or damaged, or ``transformers`` is needed and not installed.
    """
    if path.is_dir():
        from mini_sglang.text.tokenizer_files import load_folder, load_folder_or_stand_in

        return (load_folder_or_stand_in if stand_in else load_folder)(
            path, trust_remote_code=trust_remote_code
        )
    if path.suffix.lower() != ".gguf":
        raise ModelLoadError(f"{path} is neither a model folder nor a .gguf file, so it has no tokenizer.")
    return _load_gguf(path, cache_dir)


def _load_gguf(path: Path, cache_dir: Path) -> Tokenizer:
    from mini_sglang.text.gguf_tokenizer import load_gguf_tokenizer

    # Without the file's metadata, which takes longer to read than a cached tokenizer.
    loaded = load_gguf_tokenizer(path, None, cache_dir)
    named = {"bos_token": loaded.bos_token, "eos_token": loaded.eos_token}
    template = None
    if loaded.chat_template:
        template = ChatTemplate(loaded.chat_template, {name: text for name, text in named.items() if text})
    return Tokenizer(
        loaded.tokenizer,
        chat_template=template,
        bos_id=loaded.bos_id,
        eos_id=loaded.eos_id,
        eos_ids=loaded.eos_ids,
    )


def _check_unicode(field: str, text: object) -> None:
    if not isinstance(text, str):
        raise InvalidValueError(field, text, "a text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidValueError(
            field, text, "text without lone surrogates (halves of UTF-16 pairs)"
        ) from None
