"""Record which ids llama.cpp gives for many texts, as the fixture of test_gguf_tokenizer.py.

Run it by hand, with a Python that has llama-cpp-python, gguf and tokenizers, and the starter model's file:

    python tests/text/make_llamacpp_ids.py SmolLM2-135M-Instruct.Q4_1.gguf

Beside the starter's vocabulary it uses two small ones made here, one per kind of tokenizer. Their tokens
are learned across words, lines and digits, so that each cut a pre-tokenizer makes, or does not, shows.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

FIXTURE = Path(__file__).parent / "data" / "llamacpp_ids.json"

PRE_TOKENIZERS = (
    "default gpt-2 smollm llama-bpe smaug-bpe qwen2 tekken gpt-4o seed-coder minicpm5 falcon deepseek-coder"
)
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

PROSE = [
    "",
    "a",
    " ",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog. 1234567890",
    "I don't think they'll say she'd've gone; it's what we're after, isn't it? I'm sure you'd.",
    "I DON'T THINK THEY'LL SAY SHE'D'VE GONE; IT'S WHAT WE'RE AFTER. I'M SURE.",
    "Don’t, can’t, we’ll, o’clock, ‘quoted’, “double”, it’S",
    "'s 't 're 've 'm 'll 'd 'S 'T 'RE 'Ve 'M 'lL 'D 'x ''s '' 'ſ 'rE'lLs",
    "CamelCaseWords XMLHttpRequest getURLForID iPhone eBay McDonald snake_case kebab-case",
    "https://example.com/path/to?query=1&other=%20two#fragment and mailto:someone@example.org",
    "E = mc² · ½ + ¼ = ¾, x³ − y⁴ ≤ ∞ ∑∏√ ⅷ Ⅻ ①②③ 一二三 ٣٤٥ १२३",
    "$100, €5.50, £1,000,000.00; 50% off! #1 @user ~tilde~ `code` ^caret^ |pipe| a+b=c <d> \\e/",
    "naïve café Ångström Straße İstanbul ǅungla ʰaspirated ªº ﬁnd ﬂow",
    "e\u0301 a\u0308\u0323 n\u0303 x\u20d7 \u0301alone Z͑ͫ̓ͪ̂ͫ̽͏̴̙̤A̴̵̜̰͔ͫ͗͢L̠ͨͧͩ͘G̴̻͈͍͔̹̑͗̎̅͛́O",
    "你好，世界！这是一个测试。今天是2024年5月17日。",
    "日本語のテキスト、ひらがなとカタカナ。ｶﾀｶﾅ ＦＵＬＬ　ＷＩＤＴＨ",
    "안녕하세요 세계! 한국어 문장입니다.",
    "Привет, мир! Ελληνικά κείμενο. Հայերեն ქართული",
    "مرحبا بالعالم، هذا نص عربي ١٢٣. שלום עולם!",
    "नमस्ते दुनिया, यह हिन्दी है। বাংলা தமிழ் తెలుగు",
    "สวัสดีชาวโลก ภาษาไทยไม่มีช่องว่าง ລາວ မြန်မာ ខ្មែរ",
    "😀👍🏽 👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪🇫🇷 ❤️ ☺ ✈︎ 🧑🏿‍🚀",
    "\U000e0067\U000e0062 \U0001f3f4\U000e0067\U000e007f \uf8ff \U000f0000 \ufffd",
    "\ufeffBOM \u200bzero\u200dwidth \u202ertl\u202c soft\u00adhyphen",
    "\U00013460 \ua7cb\U00010d4a \U00010d40\U00010d41 a\U0001cccfb \u0897 \u1b4e\u1b4f",
    "def f(x):\n    if x > 0:\n        return x ** 2\n\telse:\n\t\treturn None\n",
    "for (int i = 0; i < n; ++i) {\r\n\tsum += a[i] * b[i]; // dot\r\n}\r\n",
    '<div class="a">\n  <p>text &amp; more</p>\n</div>\n\n\n<!-- end -->',
    '{"key": [1, 2.5, -3e10, null, true], "nested": {"a": "b\\n"}}',
    "| a | b |\n|---|---|\n| 1 | 2 |\n\n- [ ] todo\n- [x] done\n\n***\n",
    "line one\nline two\n\nparagraph\n\n\n\nmany\r\nwindows\r\n\r\nold mac\rend\n",
    "trailing spaces   \nleading\n   leading three\n\ttab\n \t mixed \t \n",
    "   three at the start",
    "three at the end   ",
    "a  b   c    d     e      f       g        h",
    "\t\t\tdeep\n\t\t\t\tdeeper\n",
    "\n",
    "\n\n",
    "\n\n\n\n",
    "\r\n",
    "\r\r\n\n\r",
    " \n \n ",
    "  \n  x  \n",
    "\x00\x01\x02\x03\x04\x05\x06\x07\x08\x0e\x13\x14\x16\x1b\x1c\x1d\x1e\x1f\x7f",
    "!\x04! -\x13- th\x04e \x13\x13 nul\x00byte",
    "\x0b\x0c\x85\xa0\u1680\u2000\u2003\u2028\u2029\u202f\u205f\u3000",
    "a\xa0b\u3000c\u2003\u2003d \xa0 e\x85f\x0bg\x0c\x0ch",
    "... --- *** === ~~~ ```python\nprint('hi')\n``` !!! ??? ;;; :::",
    "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n",
    "<|endoftext|>",
    "text<|endoftext|>text <|endoftext|> text",
    "<|im_end|><|im_end|> <|im_end",
    "<s>[INST] hi [/INST]</s><unk> <tool>x</tool> <0x0A> <0xe2> ▁ ▁▁a",
    "a<tool><tool> b <tool>  c",
    "Ġhello Ċ â\x80\x99 Ã©",
    "unreachable unreachable unreachableunreachable unreachable.",
    "<fim_prefix>a<fim_suffix>b <fim_prefix>",
    "'ſa 'ſab 'Sa 'sab x'ſa 'lLa 'Rea",
    "中a中A中 aA中a Aa中A 中AA aaA é\u00c9é \u3000中\u3000文 가\u2003나",
    "a\U00010d4ab 1\U00010d40\U00010d41 !\U00010d4a! a\u1b4ea !\u1b4e! \U00010d4aa \U00010d401",
    "the the the thethethe t he th e",
]


KINDS_OF_CHARACTERS = [*"aBst19'!/~$` \t\n\r", *"中éſ½—€가\u0301\u3000\xa0\u1b4e\U00010d4a\U00010d40"]


def numbers() -> Iterator[str]:
    for length in range(1, 13):
        yield "9876543210123"[:length]
        yield f"x{'1234567890123'[:length]} y"
    yield from (
        "3.14159",
        "1,234,567.89",
        "0xDEADBEEF",
        "007 2024-05-17T12:34:56Z",
        "v1.2.3-rc4",
        "12ab34CD56",
    )


def random_texts(rng: random.Random, count: int, words: list[str]) -> Iterator[str]:
    spaces = [" ", "  ", "   ", "\n", "\r\n", "\t", "\r", "\xa0", "\u3000", "\x0b", "\x85", "\n\n", " \n"]

    def char() -> str:
        low, high = rng.choice(
            [(0, 0x80), (0, 0x250), (0x250, 0xD800), (0xE000, 0x20000), (0x20000, 0x110000)]
        )
        return chr(rng.randrange(low, high))

    for index in range(count):
        if index % 3 == 0:
            yield "".join(
                rng.choice(words) + rng.choice(["", " ", *spaces]) for _ in range(rng.randrange(2, 9))
            )
        elif index % 3 == 1:
            yield "".join(char() for _ in range(rng.randrange(1, 16)))
        else:
            yield "".join(rng.choice(KINDS_OF_CHARACTERS) for _ in range(rng.randrange(2, 16)))


def all_texts() -> tuple[list[str], int]:
    """Every text, and how many of them, from the first, are used with the small vocabularies."""
    rng = random.Random(20240517)
    words = sorted({word for text in PROSE for word in text.split(" ") if 0 < len(word) < 16})
    first = [*PROSE, *list(numbers())[::3], *random_texts(rng, 48, words)]
    texts = list(dict.fromkeys([*first, *numbers(), *random_texts(rng, 330, words)]))
    return texts, len(set(first))


def learn(corpus: list[str], size: int, alphabet: list[str]) -> tuple[list[str], list[str]]:
    """Tokens and merges of a BPE whose words are whole texts."""
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, max_token_length=7, show_progress=False
    )
    tokenizer.train_from_iterator(corpus, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def byte_level_vocab() -> dict[str, Any]:
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(text: str) -> str:
        return "".join(piece for piece, _ in to_bytes.pre_tokenize_str(text))

    learned, merges = learn([spell(text) for text in PROSE if "<" not in text], 600, to_bytes.alphabet())
    # One token for each two bytes at which two kinds of characters can meet: it appears where they are in
    # one word, and does not where they are cut apart.
    spelled = [spell(char) for char in KINDS_OF_CHARACTERS]
    meetings = sorted({(a[-1], b[0]) for a in spelled for b in spelled})
    tokens = list(dict.fromkeys([*learned, *map("".join, meetings)]))
    merges = list(dict.fromkeys([*map(" ".join, meetings), *merges]))
    # Bytes without a token, as in the starter's vocabulary: 0x04, 0x13 and 0xF1.
    tokens = [token for token in tokens if not set(token) & set("Ąēñ")]
    merges = [merge for merge in merges if not set(merge) & set("Ąēñ")]
    extra = {
        "<|endoftext|>": CONTROL,
        "<|im_start|>": CONTROL,
        "<|im_end|>": NORMAL,
        "<unk>": UNKNOWN,
        "<tool>": USER_DEFINED,
        "<fim_prefix>": NORMAL,
        "<reponame>": CONTROL,
        "Ġunreachable": NORMAL,
        "": NORMAL,
    }
    types = [NORMAL] * len(tokens) + list(extra.values())
    # A second, later entry for a merge changes nothing.
    return {"tokens": [*tokens, *extra], "token_type": types, "merges": [*merges, merges[0]]}


def sentencepiece_vocab() -> dict[str, Any]:
    first = {"<unk>": UNKNOWN, "<s>": CONTROL, "</s>": CONTROL}
    first |= {f"<0x{byte:02X}>": BYTE for byte in range(256)}
    texts = [text.replace(" ", "▁") for text in PROSE if text.isprintable() and "<" not in text]
    tokens, _ = learn(texts * 2, 1000, [])
    chars = [token for token in tokens if len(token) == 1]
    pieces = [token for token in tokens if len(token) > 1 and token not in first]
    extra = {"<|im_end|>": CONTROL, "<tool>": USER_DEFINED, "\t\t": USER_DEFINED, "▁▁▁▁": UNUSED}
    extra = {text: kind for text, kind in extra.items() if text not in pieces}
    types = [*first.values(), *[NORMAL] * (len(pieces) + len(chars)), *extra.values()]
    scores = [0] * len(first) + [-i for i in range(len(pieces) + len(chars))] + [-1000] * len(extra)
    return {"tokens": [*first, *pieces, *chars, *extra], "token_type": types, "scores": scores}


def write_gguf(path: Path, metadata: dict[str, Any]) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in metadata.items():
        if key.endswith(".scores"):
            writer.add_token_scores([float(score) for score in value])
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def record(path: Path, texts: list[str]) -> dict[str, Any]:
    """What llama.cpp says about a vocabulary and the texts; ``plain`` ids only where they differ."""
    model = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    vocab = llama_cpp.llama_model_get_vocab(model._model.model)
    special = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    plain = [model.tokenize(text.encode(), add_bos=True, special=False) for text in texts]
    count = llama_cpp.llama_vocab_n_tokens(vocab)
    return {
        "special": special,
        "plain": {str(i): ids for i, ids in enumerate(plain) if ids != special[i]},
        "eos_ids": [i for i in range(count) if llama_cpp.llama_vocab_is_eog(vocab, i)],
        "bos_id": llama_cpp.llama_vocab_bos(vocab),
        "eos_id": llama_cpp.llama_vocab_eos(vocab),
        "add_bos": bool(llama_cpp.llama_vocab_get_add_bos(vocab)),
    }


def small_metadata(vocabs: dict[str, Any], kind: str) -> dict[str, Any]:
    """The metadata of one small file. The test builds the same from the fixture's ``vocabs``."""
    if kind.startswith("sentencepiece"):
        metadata: dict[str, Any] = {"tokenizer.ggml.model": "llama"}
        vocab = vocabs["sentencepiece"]
        if kind.endswith("without-prefix"):
            metadata |= {"tokenizer.ggml.add_space_prefix": False, "tokenizer.ggml.add_bos_token": False}
    else:
        vocab = vocabs["byte_level"]
        end = vocab["tokens"].index("<|endoftext|>")
        metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": kind}
        metadata |= {"tokenizer.ggml.bos_token_id": end, "tokenizer.ggml.eos_token_id": end}
    return metadata | {f"tokenizer.ggml.{name}": values for name, values in vocab.items()}


def main(starter: Path) -> None:
    texts, short = all_texts()
    vocabs = {"byte_level": byte_level_vocab(), "sentencepiece": sentencepiece_vocab()}
    kinds: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in [*PRE_TOKENIZERS.split(), "sentencepiece", "sentencepiece-without-prefix"]:
            path = Path(folder) / f"{kind}.gguf"
            write_gguf(path, small_metadata(vocabs, kind))
            kinds[kind] = record(path, texts[:short])
    fixture = {"texts": texts, "vocabs": vocabs, "kinds": kinds, "starter": record(starter, texts)}
    FIXTURE.parent.mkdir(exist_ok=True)
    FIXTURE.write_text(json.dumps(fixture, ensure_ascii=True, separators=(",", ":")) + "\n")
    print(f"{len(texts)} texts, {short} of them short, {FIXTURE.stat().st_size} bytes")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
