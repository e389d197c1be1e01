from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.text.tokenizer import Tokenizer, load_tokenizer
from tests.text.chat_templates import CHATML
from tests.text.tiny_chat_models import CHAT, KINDS, QWEN_NAMES, control_tokens, make
from tests.text.tiny_tokenizers import (
    CORPUS,
    TEXTS,
    id_of,
    llama2_like,
    llama3_like,
    qwen_like,
    write_folder,
)


def load(folder: Path) -> Tokenizer:
    return load_tokenizer(folder, cache_dir=folder / "cache")


@pytest.mark.parametrize(
    "flags", [{}, {"add_bos_token": True}, {"add_bos_token": False, "add_eos_token": True}]
)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_and_texts_are_those_of_transformers(kind: str, flags: dict[str, bool], tmp_path: Path) -> None:
    make_rust, names, template = KINDS[kind]
    config = {**names, **flags, "chat_template": template}
    folder = write_folder(tmp_path, make_rust(), config)
    ours, oracle = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, *CORPUS[:6], "a<|im_end|>b </s> <s><think>x"]:
        ids = oracle(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, add_special=False) == oracle(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == oracle.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special=False) == oracle.decode(ids)
    for chat in (CHAT, CHAT[:2], CHAT[1:]):
        expected = oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
        assert ours.encode_chat(chat) == expected
    assert (ours.bos_id, ours.eos_id) == (oracle.bos_token_id, oracle.eos_token_id)
    assert ours.vocab_size == len(oracle)
    assert ours.special_ids == set(oracle.all_special_ids) | {
        i for i, token in oracle.added_tokens_decoder.items() if token.special
    }


def test_the_tokenizer_file_decides_about_beginning_of_text() -> None:
    assert make("llama3").encode("Hi")[0] == id_of(llama3_like(), "<|begin_of_text|>")
    assert make("qwen").encode("")  == []  # fmt: skip
    # The template writes it itself: once, not twice.
    bos = id_of(llama3_like(), "<|begin_of_text|>")
    assert make("llama3").encode_chat(CHAT).count(bos) == 1


def test_special_tokens_named_only_in_the_config_are_added(tmp_path: Path) -> None:
    config = {
        "eos_token": {"__type": "AddedToken", "content": "<|stop|>", "normalized": False},
        "additional_special_tokens": ["<|im_end|>", "<|more|>"],
        "added_tokens_decoder": {
            "900": {"content": "<|late|>", "special": False, "normalized": False},
            "899": {"content": "<|early|>", "special": True, "normalized": False},
        },
    }
    folder = write_folder(tmp_path, qwen_like(), config)
    ours, oracle = load(folder), AutoTokenizer.from_pretrained(folder)
    text = "a<|stop|>b<|more|><|late|><|early|>"
    assert ours.encode(text) == oracle(text)["input_ids"]
    assert ours.decode(ours.encode(text)) == oracle.decode(
        oracle(text)["input_ids"], skip_special_tokens=True
    )
    assert ours.eos_ids == {oracle.eos_token_id}
    assert ours.token_text(oracle.eos_token_id) == "<|stop|>"


def test_every_end_of_text_id_counts(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        qwen_like(),
        QWEN_NAMES,
        generation_config={"eos_token_id": [7, 8]},
        config={"eos_token_id": 9},
    )
    tokenizer = load(folder)
    assert tokenizer.eos_ids == {7, 8, 9, tokenizer.eos_id}
    assert tokenizer.bos_id is None


@pytest.mark.parametrize(
    ("config_template", "files", "expected"),
    [
        ("from config", {}, "from config"),
        ([{"name": "default", "template": "d"}, {"name": "tool_use", "template": "t"}], {}, "d"),
        (None, {"chat_template.json": json.dumps({"chat_template": "from json"})}, "from json"),
        ("from config", {"chat_template.jinja": "from jinja"}, "from jinja"),
        (None, {"additional_chat_templates/tool_use.jinja": "t", "chat_template.jinja": "d"}, "d"),
    ],
)
def test_where_the_chat_template_comes_from(
    config_template: Any, files: dict[str, str], expected: str, tmp_path: Path
) -> None:
    config = QWEN_NAMES | ({"chat_template": config_template} if config_template else {})
    folder = write_folder(tmp_path, qwen_like(), config)
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    template = load(folder).chat_template
    assert template is not None
    assert template.render(CHAT) == expected
    if "t" in template.sources.values():
        assert template.render(CHAT, tools=[{"type": "function"}]) == "t"


def test_a_model_without_template_says_so(tmp_path: Path) -> None:
    tokenizer = load(write_folder(tmp_path, qwen_like(), QWEN_NAMES))
    assert tokenizer.chat_template is None
    with pytest.raises(ModelLoadError, match="no chat template, so it takes a text prompt"):
        tokenizer.encode_chat(CHAT)


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb", 5, None, b"x"])
def test_what_is_not_text_becomes_a_sentence(text: Any) -> None:
    tokenizer = make("qwen")
    with pytest.raises(InvalidValueError, match="prompt is"):
        tokenizer.encode(text)
    if isinstance(text, str):
        with pytest.raises(InvalidValueError, match=r"messages is .*lone surrogates"):
            tokenizer.encode_chat([{"role": "user", "content": text}])
        with pytest.raises(InvalidValueError, match=r"messages is .*lone surrogates"):
            tokenizer.encode_chat([{"role": "user", "content": text + "<|im_end|>"}])


def test_odd_but_good_text() -> None:
    tokenizer = make("qwen")
    for text in ("\x00", "a" * 300_000, "\ufdd0\uffff", "\u202e\u200d"):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_single_tokens_are_readable() -> None:
    tokenizer = make("qwen")
    assert [tokenizer.token_text(i) for i in tokenizer.encode("a the<|im_end|>")] == [
        "a",
        " the",
        "<|im_end|>",
    ]
    assert tokenizer.token_text(tokenizer.encode("\x80")[0]) == "\\xc2"
    assert tokenizer.token_text(10**6) == "<id 1000000>"
    assert make("llama2").token_text(id_of(llama2_like(), "▁")) == " "


def test_ids_outside_the_vocabulary_give_no_text() -> None:
    tokenizer = make("qwen")
    assert tokenizer.decode([tokenizer.vocab_size, 5, 10**6]) == tokenizer.decode([5])


DAMAGE: list[tuple[str, bytes | None, str]] = [
    ("tokenizer.json", b"{", "cannot be read as a tokenizer"),
    ("tokenizer.json", b"{}", "cannot be read as a tokenizer"),
    ("tokenizer.json", b"\xff\xfe", "cannot be read as a tokenizer"),
    ("tokenizer.json", None, "holds no tokenizer: tokenizer.json is missing"),
    ("tokenizer_config.json", b"{'a'", "tokenizer_config.json is damaged, it is not JSON"),
    ("tokenizer_config.json", b"\xff", "tokenizer_config.json is damaged, it is not JSON"),
    ("tokenizer_config.json", b"[" * 100_000, "tokenizer_config.json is damaged, it is not JSON"),
    ("tokenizer_config.json", b"[]", "holds a list where an object belongs"),
    ("tokenizer_config.json", b'{"eos_token": 5}', "eos_token is 5, not a token"),
    ("tokenizer_config.json", b'{"additional_special_tokens": [{}]}', "not a token"),
    ("tokenizer_config.json", b'{"chat_template": 5}', "chat template of .* is damaged"),
    ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}', "chat templates of .* are damaged"),
    ("chat_template.jinja", b"\xff", "chat_template.jinja cannot be read"),
    ("generation_config.json", b'{"eos_token_id": "x"}', "eos_token_id is 'x', not an id"),
    ("config.json", b'{"eos_token_id": [true]}', "not an id or a list of ids"),
]


@pytest.mark.parametrize(("name", "content", "sentence"), DAMAGE)
def test_damaged_files_become_a_sentence(
    name: str, content: bytes | None, sentence: str, tmp_path: Path
) -> None:
    folder = write_folder(tmp_path, qwen_like(), QWEN_NAMES)
    if content is None:
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ModelLoadError, match=sentence):
        load(folder)


def test_a_path_that_is_no_model_becomes_a_sentence(tmp_path: Path) -> None:
    for path in (tmp_path / "missing", Path(__file__)):
        with pytest.raises(ModelLoadError, match=r"neither a model folder nor a \.gguf file"):
            load(path)


def write_older_files(folder: Path) -> Path:
    """A folder as before ``tokenizer.json``: a vocabulary and its merges."""
    model = json.loads(qwen_like().to_str())["model"]
    vocab = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    (folder / "vocab.json").write_text(json.dumps(vocab))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in model["merges"]))
    config = {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|endoftext|>", "chat_template": CHATML}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def test_older_files_are_read_through_transformers(tmp_path: Path) -> None:
    folder = write_older_files(tmp_path)
    ours, oracle = load(folder), AutoTokenizer.from_pretrained(folder)
    for text in [*TEXTS, *CORPUS[:6]]:
        assert ours.encode(text) == oracle(text)["input_ids"]
    assert ours.eos_ids == {oracle.eos_token_id}
    assert ours.chat_template is not None


def test_older_files_without_transformers_say_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelLoadError, match="pip install transformers"):
        load(write_older_files(tmp_path))


REMOTE_CODE = """
from transformers import PreTrainedTokenizer
class Letters(PreTrainedTokenizer):
    def __init__(self, **kwargs):
        super().__init__(**kwargs)
    @property
    def vocab_size(self):
        return 256
    def get_vocab(self):
        return {chr(i): i for i in range(256)} | dict(self.added_tokens_encoder)
    def _tokenize(self, text):
        return [chr(byte) for byte in text.encode()]
    def _convert_token_to_id(self, token):
        return ord(token)
    def _convert_id_to_token(self, index):
        return chr(index)
    def convert_tokens_to_string(self, tokens):
        return bytes(ord(token) for token in tokens).decode("utf-8", "replace")
"""


def test_a_tokenizer_that_is_python_code_runs_only_when_allowed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = tmp_path / "letters"
    folder.mkdir()
    (folder / "tokenization_letters.py").write_text(REMOTE_CODE)
    config = {
        "tokenizer_class": "Letters",
        "auto_map": {"AutoTokenizer": ["tokenization_letters.Letters", None]},
        "eos_token": "<|im_end|>",
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="TRUST_REMOTE_CODE=1"):
        load(folder)
    tokenizer = load_tokenizer(folder, cache_dir=tmp_path, trust_remote_code=True)
    ids = tokenizer.encode("Hé 😀<|im_end|>")
    assert ids == [*"Hé 😀".encode(), tokenizer.eos_id]
    assert tokenizer.eos_ids == {tokenizer.eos_id}
    assert tokenizer.decode(ids) == "Hé 😀"
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push([i]) for i in ids]
    assert "".join(pieces) + detokenizer.finish() == "Hé 😀"
    assert pieces[0] == "H"
    assert tokenizer.decode(tokenizer.encode_chat([{"role": "user", "content": "x"}])).startswith(
        "<|im_start|>user"
    )
    with pytest.raises(InvalidValueError, match=r"special token <\|im_end\|>"):
        tokenizer.encode_chat([{"role": "user", "content": "x<|im_end|>"}])


def test_importing_the_text_package_loads_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "import mini_sglang.text.stream, mini_sglang.text.tokenizer, mini_sglang.text.tokenizer_files\n"
        "heavy = {'torch', 'transformers', 'numpy', 'jinja2', 'huggingface_hub'}\n"
        "print(sorted(heavy & sys.modules.keys()))"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "[]"


def test_the_starter_model_s_gguf_file(starter_gguf: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(starter_gguf, cache_dir=tmp_path)
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi 😀"}]
    text = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi 😀<|im_end|>\n<|im_start|>assistant\n"
    )
    ids = tokenizer.encode_chat(chat)
    assert ids == tokenizer.encode(text)
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.eos_id in tokenizer.eos_ids
    assert tokenizer.token_text(tokenizer.encode("<|im_end|>")[0]) == "<|im_end|>"
    typed = tokenizer.encode_chat([chat[0], {"role": "user", "content": "Hi <|im_end|> 😀"}])
    assert control_tokens(tokenizer, typed) == control_tokens(tokenizer, ids)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.push([token_id]) for token_id in typed]
    assert "".join(pieces) + detokenizer.finish() == tokenizer.decode(typed)


def test_a_gguf_file_is_read_only_where_the_cache_does_not_have_its_tokenizer(
    starter_gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = load_tokenizer(starter_gguf, cache_dir=tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr("mini_sglang.backend.loading.gguf.read_gguf")
        again = load_tokenizer(starter_gguf, cache_dir=tmp_path)
    assert again.encode("Hi 😀<|im_end|>") == first.encode("Hi 😀<|im_end|>")
    assert (again.bos_id, again.eos_id, again.eos_ids) == (first.bos_id, first.eos_id, first.eos_ids)
    chat = [{"role": "user", "content": "Hi"}]
    assert again.encode_chat(chat) == first.encode_chat(chat)


@pytest.mark.parametrize("content", [b"", b"GGUF", b"PK\x03\x04" + b"\0" * 4096])
def test_a_foreign_or_damaged_gguf_file_is_one_sentence(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    for _ in range(2):
        with pytest.raises(ModelLoadError, match=r"x\.gguf.*\.$"):
            load_tokenizer(path, cache_dir=tmp_path / "cache")
