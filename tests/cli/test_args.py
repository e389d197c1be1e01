"""Flags: one for each setting and sampling parameter, honoured or refused with a sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import fields

import pytest

from mini_sglang.cli import args
from mini_sglang.config import Settings, default_text, setting_fields, settings_table, value_type
from mini_sglang.types import SamplingParams
from tests.cli.process import ENV

GIVEN = {
    "max_new_tokens": ("7", 7),
    "min_new_tokens": ("3", 3),
    "temperature": ("0.5", 0.5),
    "top_k": ("40", 40),
    "top_p": ("0.9", 0.9),
    "min_p": ("0.05", 0.05),
    "repetition_penalty": ("1.1", 1.1),
    "presence_penalty": ("-1.5", -1.5),
    "frequency_penalty": ("1", 1.0),
    "logit_bias": ('{"42": -100}', {42: -100.0}),
    "seed": ("-9", -9),
    "stop": ("\n", ("\n",)),
    "stop_token_ids": ("5", (5,)),
    "ignore_eos": (None, True),
    "logprobs": (None, True),
    "top_logprobs": ("2", 2),
    "prompt_logprobs": (None, True),
    "priority": ("-3", -3),
    "speculative": ("prompt_lookup", "prompt_lookup"),
}
# An answer has one form at most.
FORMS = {
    "json_schema": ('{"type": "object"}', '{"type":"object"}'),
    "regex": ("12", "12"),
    "ebnf": ("start: A", "start: A"),
    "json_object": (None, True),
}


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


@pytest.mark.parametrize("form", FORMS)
def test_every_sampling_parameter_arrives(form, cli):
    given = GIVEN | {form: FORMS[form]}
    words = [word for name, (text, _) in given.items() for word in (flag(name), text) if word is not None]
    ran = cli("generate", *words, "hello")
    params = ran.engine.calls[0][1]
    expected = {f.name: f.default for f in fields(SamplingParams) if f.name in FORMS}
    assert {f.name: getattr(params, f.name) for f in fields(SamplingParams)} == expected | {
        name: value for name, (_, value) in given.items()
    }


def test_repeatable_parameters_collect(cli):
    ran = cli(
        "generate", "--stop", "a", "--stop", "b", "--stop-token-ids", "1", "--stop-token-ids=2", "hello"
    )
    params = ran.engine.calls[0][1]
    assert (params.stop, params.stop_token_ids) == (("a", "b"), (1, 2))


@pytest.mark.parametrize("spec", setting_fields(), ids=lambda spec: spec.name)
def test_every_setting_arrives(spec, cli):
    kind = value_type(spec)
    fraction = "0.5" if spec.metadata["high"] == 1 else "2.5"
    other = {bool: str(int(not spec.default)), int: "3", float: fraction}.get(kind, "elsewhere")
    if spec.metadata["choices"]:
        other = next(choice for choice in spec.metadata["choices"] if choice != spec.default)
    ran = cli("generate", flag(spec.name), other, "hello")
    assert ran.status == 0, ran.err
    expected = getattr(Settings.resolve({spec.name: other}, {}), spec.name)
    assert getattr(ran.engine.settings, spec.name) == expected != spec.default
    assert ran.engine.given.keys() == {spec.name}, "what nobody gave is left to the environment"


def test_flag_wins_over_environment(cli, monkeypatch):
    monkeypatch.setenv("PAGE_SIZE_TOKENS", "4")
    assert cli("generate", "hello").engine.settings.page_size_tokens == 4
    assert cli("generate", "hello", "--page-size-tokens", "8").engine.settings.page_size_tokens == 8


def test_bare_bool_setting_is_on_and_short_model(cli):
    ran = cli("generate", "hello", "--adaptive-max-new-tokens", "-m", "folder")
    assert (ran.engine.settings.adaptive_max_new_tokens, ran.engine.settings.model) == (True, "folder")


@pytest.mark.parametrize("command", ["generate", "chat"])
def test_help_names_each_variable_default_and_parameter(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "10000")
    with pytest.raises(SystemExit) as done:
        args.command_parser().parse([command, "--help"])
    assert done.value.code == 0
    entries = re.split(r"\n  (?=-)", capsys.readouterr().out)
    for spec in setting_fields():
        entry = next(entry for entry in entries if f"{flag(spec.name)} " in entry)
        for variable in spec.metadata["env"]:
            assert variable in entry
        assert spec.metadata["help"] in entry
        assert f"default {default_text(spec)}".replace("`", "") in entry
    for spec in fields(SamplingParams):
        shown = any(entry.startswith(flag(spec.name)) for entry in entries)
        assert shown == (command == "generate" or "logprobs" not in spec.name)


def test_chat_answers_are_longer_by_default(cli):
    assert cli("generate", "hello").engine.calls[0][1] == SamplingParams()
    assert cli("chat", "hello").engine.calls[0][1] == SamplingParams(max_new_tokens=512)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--max-new-tokens", "0"], "max_new_tokens is 0; it must be a whole number from 1"),
        (["--max-new-tokens", "-1"], "max_new_tokens is -1"),
        (["--max-new-tokens", "many"], "max_new_tokens is 'many'; it must be a whole number"),
        (["--temperature", "nan"], "temperature is nan"),
        (["--temperature", "warm"], "temperature is 'warm'"),
        (["--top-p", "0"], "top_p is 0.0"),
        (["--logit-bias", "{"], "logit_bias is '{'"),
        (["--logit-bias", "[" * 100_000], "logit_bias is '[["),
        (["--logit-bias", '{"1": 1e999}'], "logit_bias is inf"),
        (["--seed", "9" * 5000], "seed is '999"),
        (["--stop", ""], "stop is ''"),
        (["--stop=x"] * 200, "stop is a tuple of 200 entries"),
        (["--stop-token-ids", "x"], "stop_token_ids is 'x'"),
        (["--top-logprobs", "3"], "top_logprobs is 3; it must be 0 unless logprobs is on"),
        (["--dtype", "fp8"], "dtype is 'fp8'; it must be one of auto"),
        (["--page-size-tokens", "0"], "page_size_tokens is '0'"),
        (["--prefix-cache", "maybe"], "prefix_cache is 'maybe'; it must be 1 or 0"),
        (["--model", ""], "model is ''"),
        (["--dtype"], "--dtype: expected one argument"),
        (["--max-tokens", "5"], "'--max-tokens' is not an option here; did you mean --max-new-tokens?"),
        (["--zzz"], "'--zzz' is not an option here; `mini-sglang generate --help`"),
        (["more"], "'more' is one word too many; a prompt of several words needs quotes."),
    ],
    ids=lambda value: str(value)[:40],
)
def test_bad_value_is_one_sentence_and_status_2(words, said, cli):
    ran = cli("generate", "hello", *words)
    assert (ran.status, ran.out, ran.engine) == (2, "", None)
    assert ran.err.startswith("mini-sglang: ") and said in ran.err
    assert ran.err.count("\n") == 1 and len(ran.err) < 500


def test_bad_variable_is_named(cli, monkeypatch):
    monkeypatch.setenv("PREFILL_CHUNK_SIZE", "lots")
    ran = cli("generate", "hello")
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "PREFILL_CHUNK_SIZE is 'lots'" in ran.err


@pytest.mark.parametrize("words", [[], ["serve-me"]])
def test_no_or_unknown_command(words, cli):
    ran = cli(*words)
    assert (ran.status, ran.err.count("\n")) == (2, 1)
    assert "COMMAND" in ran.err


def test_settings_prints_the_table_even_when_one_is_wrong(cli, monkeypatch):
    monkeypatch.setenv("LOG_LEVEL", "loud")
    assert (cli("settings").out, cli("settings").status) == (settings_table(), 0)


def test_version(cli):
    ran = cli("--version")
    assert ran.status == 0 and ran.out.startswith("mini-sglang ")


def test_arguments_are_read_without_torch():
    program = (
        "import sys\n"
        "from mini_sglang.cli import main\n"
        "assert main(['generate', '--help']) == 0\n"
        "assert main(['settings']) == 0\n"
        "assert main(['generate', '--max-new-tokens', '0', 'x']) == 2\n"
        "assert main(['generate', '']) == 2\n"
        "heavy = {'torch', 'numpy', 'transformers', 'huggingface_hub', 'jinja2'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0, done.stderr


def test_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "mini_sglang", "--version"], capture_output=True, text=True, env=ENV
    )
    assert (done.returncode, done.stdout[:12], done.stderr) == (0, "mini-sglang ", "")
