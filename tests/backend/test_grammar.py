"""Grammars: every text that masks allow is of the form asked for, and nothing hostile takes long."""

from __future__ import annotations

import json
import random
import re
import time
from array import array
from collections.abc import Callable, Iterator

import jsonschema_rs
import numpy as np
import psutil
import pytest
import torch
from tokenizers import Tokenizer as RustTokenizer

from mini_sglang.backend.grammar import GrammarCompiler
from mini_sglang.backend.penalties import deny_on_cpu, deny_on_device
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import SampleSpec, TokenGrammar
from mini_sglang.errors import InvalidValueError, ModelLoadError
from mini_sglang.text.tokenizer import Tokenizer
from mini_sglang.types import SamplingParams
from tests.text import tiny_tokenizers as tiny

KINDS: dict[str, tuple[Callable[[], RustTokenizer], str]] = {
    "byte level": (tiny.qwen_like, "<|im_end|>"),
    "sentencepiece": (tiny.llama2_like, "</s>"),
    "first metaspace": (tiny.mistral_like, "</s>"),
}
SCHEMAS: list[dict[str, object]] = [
    {
        "type": "object",
        "properties": {
            "name": {"type": "string", "maxLength": 6},
            "age": {"type": "integer", "minimum": 0, "maximum": 120},
            "tags": {"type": "array", "items": {"enum": ["red", "blé", 3, None]}, "maxItems": 3},
        },
        "required": ["name", "age", "tags"],
        "additionalProperties": False,
    },
    {"enum": ["a", "ab", "abc", {"x": [1, 2]}, True]},
    {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    {"anyOf": [{"type": "null"}, {"type": "string", "pattern": "^\\d{2}-[A-C]+\\w$", "maxLength": 8}]},
    {
        "$defs": {
            "n": {
                "type": "object",
                "properties": {"v": {"type": "boolean"}, "n": {"$ref": "#/$defs/n"}},
                "required": ["v"],
                "additionalProperties": False,
            }
        },
        "$ref": "#/$defs/n",
    },
]
REGEXES = [
    "[a-c]{3}",
    r"\d{4}-\d\d",
    "(yes|no|maybe so)!?",
    r" ?x\.y{0,3}",
    "é[ñü]{1,4}",
    r"[^a]{2,4}z",
    r"\\d",
]


class Setup:
    """A tokenizer, its compiler and a way to make random answers with them."""

    def __init__(self, rust: RustTokenizer, eos: str, extra_ids: int = 0, check: bool = False) -> None:
        self.tokenizer = Tokenizer(rust)
        self.eos = tiny.id_of(rust, eos)
        self.vocab_size = self.tokenizer.vocab_size + extra_ids
        self.compiler = GrammarCompiler(
            self.tokenizer.vocabulary, self.vocab_size, {self.eos}, check=check, cache_bytes=4 << 20
        )

    def new(self, **form: object) -> TokenGrammar:
        return self.compiler.new(SamplingParams(**form))  # type: ignore[arg-type]

    def allowed(self, grammar: TokenGrammar, end_ids: tuple[int, ...] | None = None) -> list[int]:
        words = array("i", bytes(4 * -(-self.vocab_size // 32)))
        assert grammar.fill_mask(memoryview(words), (self.eos,) if end_ids is None else end_ids) is None
        bits = np.unpackbits(np.asarray(words).view(np.uint8), bitorder="little")
        return [int(i) for i in np.flatnonzero(bits)]

    def answer(self, grammar: TokenGrammar, draw: random.Random, limit: int = 400) -> list[int] | None:
        """A random answer without its end; None where it is still going on after ``limit`` tokens."""
        ids: list[int] = []
        while not grammar.done and len(ids) < limit:
            allowed = self.allowed(grammar)
            if self.eos in allowed and draw.random() < 0.3:
                return ids
            chosen = draw.choice(allowed)
            if chosen == self.eos:
                return ids
            assert grammar.accept(chosen) is None
            ids.append(chosen)
        return ids if grammar.done else None


@pytest.fixture(scope="module", params=list(KINDS))
def kind(request: pytest.FixtureRequest) -> Setup:
    rust, eos = KINDS[request.param]
    return Setup(rust(), eos, extra_ids=37)


@pytest.fixture(scope="module")
def byte_level() -> Setup:
    return Setup(tiny.qwen_like(), "<|im_end|>")


@pytest.fixture(scope="module")
def checked() -> Iterator[Setup]:
    setup = Setup(tiny.qwen_like(), "<|im_end|>", check=True)
    setup.compiler.prepare()
    yield setup
    setup.compiler.close()


def test_answers_are_json_of_the_schema(kind: Setup) -> None:
    for number, schema in enumerate(SCHEMAS):
        ended = 0
        for seed in range(12):
            ids = kind.answer(kind.new(json_schema=schema), random.Random(seed))
            if ids is None:  # the recursive one may go on and on
                continue
            ended += 1
            value = json.loads(kind.tokenizer.decode(ids))
            jsonschema_rs.validate(schema, value)
        assert ended >= (3 if number == 4 else 12)


@pytest.mark.parametrize("regex", REGEXES)
def test_answers_match_the_whole_regex(kind: Setup, regex: str) -> None:
    for seed in range(10):
        ids = kind.answer(kind.new(regex=regex), random.Random(seed))
        assert ids is not None
        text = kind.tokenizer.decode(ids)
        assert re.fullmatch(regex, text), (text, ids)


def test_every_word_of_a_language_can_be_written(kind: Setup) -> None:
    words = ["the dog", " the", "fox", "fo", "🙂", "12"]
    grammar = kind.new(regex="|".join(words))
    seen = set()
    for seed in range(300):
        ids = kind.answer(grammar.copy(), random.Random(seed))
        assert ids is not None
        seen.add(kind.tokenizer.decode(ids))
    assert seen == set(words)


def test_a_unigram_tokenizer_writes_what_it_has_tokens_for() -> None:
    setup = Setup(tiny.metaspace_unigram(), "</s>")
    for seed in range(20):
        ids = setup.answer(setup.new(regex="the dog|fox| the"), random.Random(seed))
        assert ids is not None and setup.tokenizer.decode(ids) in ("the dog", "fox", " the")


def test_masks_allow_only_beginnings_of_words_and_the_end_after_one(byte_level: Setup) -> None:
    words = ["the", "there", "these days", "he", "lo"]
    vocabulary = byte_level.tokenizer.vocabulary()
    for seed in range(20):
        draw = random.Random(seed)
        grammar, text = byte_level.new(regex="|".join(words)), b""
        while not grammar.done:
            allowed = byte_level.allowed(grammar)
            for token_id in set(allowed) - {byte_level.eos}:
                longer = text + vocabulary.tokens[token_id]
                assert longer != text and any(word.encode().startswith(longer) for word in words)
            assert (byte_level.eos in allowed) == (text.decode() in words)
            assert byte_level.eos not in byte_level.allowed(grammar, ()) if len(allowed) > 1 else True
            chosen = draw.choice([i for i in allowed if i != byte_level.eos])
            assert grammar.accept(chosen) is None
            text += vocabulary.tokens[chosen]
        assert text.decode() in words


@pytest.mark.parametrize(
    "ebnf, pattern",
    [
        ('start: p ("," p)~0..2\np: K "=" /[0-9]{1,3}/\nK: "a" | "b"', r"[ab]=\d{1,3}(,[ab]=\d{1,3}){0,2}"),
        ('root ::= "yes" | "no" mark\nmark ::= [!?]', "yes|no[!?]"),
        ('start: "(" start ")" | "x"', r"\(*x\)*"),
    ],
)  # fmt: skip
def test_lark_and_gbnf(byte_level: Setup, ebnf: str, pattern: str) -> None:
    for seed in range(10):
        ids = byte_level.answer(byte_level.new(ebnf=ebnf), random.Random(seed))
        assert ids is not None
        text = byte_level.tokenizer.decode(ids)
        assert re.fullmatch(pattern, text) and text.count("(") == text.count(")")


def test_json_objects_do_not_drown_in_white_space(byte_level: Setup) -> None:
    for seed in range(8):
        grammar = byte_level.new(json_object=True)
        ids: list[int] = []
        draw = random.Random(seed)
        for _ in range(60):
            chosen = draw.choice(byte_level.allowed(grammar))
            if grammar.done or chosen == byte_level.eos:
                break
            assert grammar.accept(chosen) is None
            ids.append(chosen)
        space = re.split('["}]', byte_level.tokenizer.decode(ids))[0]
        assert re.fullmatch(r"\{( |\r?\n[ \t]{0,40})?", space)


@pytest.mark.parametrize(
    "ebnf", ["start: /(?s:.*)/", 'start: ~A\nA: "s"', "start: <[*]>", "start: <[0-2]> | /x/"]
)
def test_special_and_padding_ids_are_never_part_of_a_text(kind: Setup, ebnf: str) -> None:
    allowed = set(kind.allowed(kind.new(ebnf=ebnf)))
    special = kind.tokenizer.special_ids | {kind.eos}
    assert allowed - {kind.eos} and not (allowed - {kind.eos}) & special
    assert max(allowed) < kind.tokenizer.vocab_size
    after = kind.new(ebnf='start: "a" /(?s:.*)/')
    token = next(i for i in kind.allowed(after) if i != kind.eos)
    assert after.accept(token) is None
    assert not (set(kind.allowed(after)) - {kind.eos}) & special


def test_a_model_with_fewer_ids_than_its_tokenizer(byte_level: Setup) -> None:
    compiler = GrammarCompiler(byte_level.tokenizer.vocabulary, 300, {5}, check=False)
    words = array("i", bytes(4 * 10))
    assert compiler.new(SamplingParams(regex=".*")).fill_mask(memoryview(words), (5,)) is None
    bits = np.unpackbits(np.asarray(words).view(np.uint8), bitorder="little")
    assert bits[5] and not bits[300:].any() and bits[:300].sum() > 100


def test_a_copy_goes_its_own_way(byte_level: Setup) -> None:
    grammar = byte_level.new(regex="(ab|ac)d")
    first = next(i for i in byte_level.allowed(grammar) if byte_level.tokenizer.decode([i]) == "a")
    assert grammar.accept(first) is None
    before = byte_level.allowed(grammar)
    other = grammar.copy()
    while not other.done:
        assert other.accept(byte_level.allowed(other)[-1]) is None
    assert byte_level.allowed(grammar) == before and not grammar.done


def test_a_token_that_the_grammar_forbids_is_a_sentence(byte_level: Setup) -> None:
    grammar = byte_level.new(regex="abc")
    wrong = byte_level.tokenizer.encode("z")[0]
    sentence = grammar.accept(wrong)
    assert sentence is not None and "cannot be followed" in sentence
    words = memoryview(array("i", bytes(4 * -(-byte_level.vocab_size // 32))))
    assert grammar.fill_mask(words, ()) is not None


def test_a_tokenizer_whose_texts_depend_on_their_neighbours_is_refused() -> None:
    for rust in (tiny.word_piece(), tiny.end_of_word_bpe(), tiny.bare_words()):
        compiler = GrammarCompiler(Tokenizer(rust).vocabulary, 250, check=False)
        with pytest.raises(ModelLoadError, match="no grammar"):
            compiler.new(SamplingParams(regex="a"))


def test_the_sampler_lets_no_bias_overrule_a_grammar_and_no_row_feel_another(byte_level: Setup) -> None:
    sampler = Sampler(byte_level.vocab_size)
    logits = torch.randn(4, byte_level.vocab_size + 5, generator=torch.Generator().manual_seed(3))
    wrong = byte_level.tokenizer.encode("z")[0]
    hot = {wrong: 100.0}

    def spec(form: dict[str, object], **params: object) -> SampleSpec:
        made = SamplingParams(**form, **params)  # type: ignore[arg-type]
        grammar = byte_level.compiler.new(made) if form else None
        return SampleSpec(made, 7, 0, grammar=grammar, end_ids=(byte_level.eos,))

    digits: dict[str, object] = {"regex": "[0-9]+"}
    bare: dict[str, object] = {}

    def specs() -> list[SampleSpec]:
        return [
            spec(digits, logit_bias=hot),
            spec(bare, temperature=1.0),
            spec(digits, temperature=2.0, top_k=300, logit_bias=hot),
            spec(digits, temperature=1.5, top_p=0.5, repetition_penalty=1.5),
        ]

    together = sampler.sample(logits.clone(), specs())
    for row, one in enumerate(specs()):
        assert sampler.sample(logits[row : row + 1].clone(), [one])[0] == together[row]
    for row in (0, 2, 3):
        token_id = together[row].token_id
        assert token_id is not None and byte_level.tokenizer.decode([token_id]).isdecimal()
    free = [spec(bare, logit_bias=hot)]
    assert sampler.sample(logits[:1].clone(), free)[0].token_id == wrong


def test_a_dead_end_is_the_error_of_its_own_row(byte_level: Setup) -> None:
    params = SamplingParams(regex="ab")
    ids = byte_level.tokenizer.encode("ab") + byte_level.tokenizer.encode("a")
    banned = SampleSpec(params, 0, 0, banned_ids=tuple(ids), grammar=byte_level.compiler.new(params))
    logits = torch.randn(2, byte_level.vocab_size)
    bad, good = Sampler(byte_level.vocab_size).sample(logits, [banned, SampleSpec(SamplingParams(), 0, 0)])
    assert bad.error is not None and "grammar" in bad.error and bad.token_id is None
    assert good.error is None and good.token_id is not None


@pytest.mark.parametrize("vocab_size", [31, 32, 70])
def test_both_ways_to_apply_a_mask_agree(vocab_size: int) -> None:
    draw = np.random.default_rng(vocab_size)
    words = draw.integers(-(1 << 31), 1 << 31, (2, -(-vocab_size // 32)), dtype=np.int64).astype(np.int32)
    x = torch.randn(5, vocab_size)
    expected = x.clone()
    for row, bits in zip((1, 3), words, strict=True):
        for i in range(vocab_size):
            if not int(bits[i // 32]) >> (i % 32) & 1:
                expected[row, i] = -torch.inf
    for deny in (deny_on_cpu, deny_on_device):
        got = x.clone()
        deny(got, [1, 3], words)
        assert torch.equal(got, expected)


SLOW_SCHEMA = {"type": "string", "allOf": [{"pattern": f"[a-z]*{c}[a-z]*"} for c in "abcdefghijklmnopqrst"]}
CIRCLE = {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"}
HUGE = {"type": "array", "minItems": 10**6, "items": {"type": "string", "minLength": 10**6}}
MANY = {"type": "object", "properties": {f"k{i}": {} for i in range(9000)}}


def nested(depth: int) -> str:
    return '{"items":' * depth + "{}" + "}" * depth


# Whether it must be refused; the others may be refused or compile.
HOSTILE: list[tuple[dict[str, object], bool]] = [
    ({"regex": "(a+)+$"}, False),
    ({"regex": ".{1,99999}"}, False),
    ({"regex": "((((a{1,100}){1,100}){1,100}){1,100}){1,100}"}, False),
    ({"regex": "(" * 4000 + "a" + ")" * 4000}, True),
    ({"regex": "(a"}, True),
    ({"regex": r"(?=a)b"}, True),
    ({"regex": r"[^\s\S]"}, True),
    ({"regex": "a" * 100_000}, True),
    ({"json_schema": {"$ref": "#"}}, True),
    ({"json_schema": CIRCLE}, True),
    ({"json_schema": {"allOf": [{"$ref": "#"}, {"$ref": "#"}]}}, True),
    ({"json_schema": {"$ref": "https://example.com/schema.json"}}, True),
    ({"json_schema": {"type": "strin"}}, True),
    ({"json_schema": {"not": {}}}, True),
    ({"json_schema": {"enum": []}}, True),
    ({"json_schema": HUGE}, False),
    ({"json_schema": nested(60)}, False),
    ({"json_schema": nested(5000)}, True),
    ({"json_schema": json.dumps({"enum": ["x" * 1_000_000]})}, True),
    ({"json_schema": SLOW_SCHEMA}, True),
    ({"json_schema": MANY}, True),
    ({"ebnf": "start: missing"}, True),
    ({"ebnf": "start: start start | \"a\" |"}, False),
    ({"ebnf": "start: " + "(" * 5000 + '"a"' + ")" * 5000}, True),
    ({"ebnf": "root ::= " + "(" * 5000 + '"a"' + ")" * 5000}, True),
    ({"ebnf": "start: \"a\"{1,1000000}"}, False),
]  # fmt: skip


@pytest.mark.parametrize("form, refused", HOSTILE)
def test_hostile_grammars_are_refused_or_compiled_soon(
    checked: Setup, form: dict[str, object], refused: bool
) -> None:
    started = time.monotonic()
    try:
        checked.new(**form)
        assert not refused
    except InvalidValueError as error:
        assert error.field == next(iter(form)) and len(str(error)) < 900 and "\n" not in str(error)
    assert time.monotonic() - started < 10.0


def test_after_a_helper_is_killed_the_next_grammar_is_checked_and_the_bad_one_remembered(
    checked: Setup,
) -> None:
    with pytest.raises(InvalidValueError, match="compile"):
        checked.new(json_schema=SLOW_SCHEMA)
    for child in psutil.Process().children():
        if "grammar_check" in " ".join(child.cmdline()):
            child.kill()
    assert checked.answer(checked.new(regex="[ab]{2}"), random.Random(1)) is not None
    with pytest.raises(InvalidValueError):
        checked.new(regex="(unclosed")


def test_the_cache_is_bounded_in_bytes(byte_level: Setup) -> None:
    for number in range(60):
        byte_level.new(json_schema={"enum": [f"{number}-{i}" for i in range(300)]})
        assert byte_level.compiler.cached_bytes <= 4 << 20
    assert byte_level.compiler.cached_bytes > 0
    assert byte_level.answer(byte_level.new(json_schema={"enum": ["0-1"]}), random.Random(0)) is not None
