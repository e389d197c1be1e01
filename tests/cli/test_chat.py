"""``chat``: turns, slash commands, and Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from mini_sglang.cli import args
from tests.cli.fake_engine import CONTEXT
from tests.cli.process import DRIVER, ENV, piped


def roles(prompt):
    return [message["role"] for message in prompt]


def test_lines_are_turns_and_answers_alone_come_out():
    done = piped(["main", "chat"], "one\n\n  \ngrüß dich\n/exit\nnot this\n".encode())
    assert (done.returncode, done.stdout.decode()) == (0, "one \ngrüß dich \n")


def test_history_is_sent_again_and_found_in_the_cache(cli):
    ran = cli("chat", "--system", "Be brief.", "--stats", stdin=b"one two\nthree\n")
    first, second = (prompt for prompt, _ in ran.engine.calls)
    assert second[: len(first)] == first
    assert second[len(first) :] == [
        {"role": "assistant", "content": "one two "},
        {"role": "user", "content": "three"},
    ]
    figures = [line for line in ran.err.splitlines() if "prompt tokens from cache" in line]
    assert [line.split(", ")[-1] for line in figures] == [
        "0 of 7 prompt tokens from cache",
        # "<system> Be brief. <user> one two": after it come <go> in the first turn, the answer in this.
        "6 of 12 prompt tokens from cache",
    ]


def test_reset_and_system(cli):
    lines = b"/system Be kind.\none\n/reset\ntwo\n/system\nthree\n"
    ran = cli("chat", stdin=lines)
    assert [roles(prompt) for prompt, _ in ran.engine.calls] == [
        ["system", "user"],
        ["system", "user"],
        ["user", "assistant", "user"],
    ]
    assert "it was: Be kind." in ran.err and ran.status == 0


@pytest.mark.parametrize(
    ("said", "name", "value"),
    [
        ("/set temperature 0.7", "temperature", 0.7),
        ("/set max-new-tokens 9", "max_new_tokens", 9),
        ("/set seed 4", "seed", 4),
        ("/set ignore_eos on", "ignore_eos", True),
        ("/set stop END OF IT", "stop", ("END OF IT",)),
        (r'/set stop ["\n", "x"]', "stop", ("\n", "x")),
        (r'/set stop "\n\n"', "stop", ("\n\n",)),
        ("/set stop [x", "stop", ("[x",)),
        ("/set stop_token_ids [1, 2]", "stop_token_ids", (1, 2)),
        ("/set stop_token_ids 3", "stop_token_ids", (3,)),
        ('/set logit_bias {"3": 1.5}', "logit_bias", {3: 1.5}),
    ],
)
def test_set_changes_the_answers_to_come(said, name, value, cli):
    ran = cli("chat", stdin=f"one\n{said}\ntwo\n/set {name} default\nthree\n".encode())
    assert ran.status == 0, ran.err
    before, changed, after = (params for _, params in ran.engine.calls)
    assert getattr(changed, name) == value != getattr(before, name)
    assert after == before


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ("/set temperature hot", "mini-sglang: temperature is 'hot'; it must be a number from 0 to 2."),
        ("/set temperature nan", "mini-sglang: temperature is nan"),
        ("/set ignore_eos perhaps", "mini-sglang: ignore_eos is 'perhaps'; it must be true or false."),
        ("/set stop_token_ids [1.5]", "mini-sglang: stop_token_ids is '1.5'"),
        ("/set warmth 1", "mini-sglang: parameter is 'warmth'; it must be one of max_new_tokens, "),
        ("/set logprobs 1", "mini-sglang: parameter is 'logprobs'"),
        ("/nonsense", "mini-sglang: command is '/nonsense'; it must be one of /help, /reset, /system, "),
        ("/save", "mini-sglang: /save needs the name of a file."),
        ("/save /no/such/folder/x", "mini-sglang: /no/such/folder/x cannot be written: No such file"),
        ("fail now", "mini-sglang: request r0 failed: out of memory"),
        ("word " * 80, "This message alone does not fit"),
        ("bad \udcff", "mini-sglang: The text on standard input is not UTF-8"),
    ],
)
def test_what_goes_wrong_is_said_and_the_chat_goes_on(said, sentence, cli):
    ran = cli("chat", "-q", stdin=f"{said}\nafter\n".encode("utf-8", "surrogateescape"))
    assert sentence in ran.err and "Traceback" not in ran.err
    assert ran.out.endswith("after \n")
    prompt, params = ran.engine.calls[-1]
    assert (roles(prompt), params.temperature) == (["user"], 0.0), "nothing of it stays"
    assert ran.status == 2, "a script is told"


def test_full_context_is_said_and_reset_helps(cli):
    long = "word " * (CONTEXT // 3)
    ran = cli("chat", "-q", stdin=f"{long}\n{long}\nshort\n/reset\n{long}\n".encode())
    assert "The conversation no longer fits the model's context; /reset starts a new one." in ran.err
    assert [roles(prompt) for prompt, _ in ran.engine.calls] == [
        ["user"],
        ["user", "assistant", "user"],
        ["user"],
    ]


def test_set_lists_and_shows(cli):
    ran = cli("chat", "-q", "--temperature", "0.5", "--stop", "ü", stdin=b"/set\n/set seed\n")
    listed = dict(line.split(maxsplit=1) for line in ran.err.splitlines()[:-1])
    assert list(listed) == list(args.CHAT_PARAMS)
    assert (listed["temperature"], listed["max_new_tokens"], listed["stop"]) == ("0.5", "512", '["ü"]')
    assert ran.err.splitlines()[-1] == "seed is not set"
    assert ran.out == ""


def test_help_lists_every_command(cli):
    ran = cli("chat", "-q", stdin=b"/help\n")
    commands = [line.split()[0] for line in ran.err.splitlines()]
    assert commands == ["/help", "/reset", "/system", "/set", "/stats", "/save", "/exit"]
    for command in commands:
        assert "it must be one of" not in cli("chat", "-q", stdin=f"{command}\n".encode()).err


def test_stats_shows_the_engine_and_the_conversation(cli):
    ran = cli("chat", "-q", stdin=b"one\n/stats\n")
    shown = dict(line.split() for line in ran.err.splitlines())
    assert shown == {"turns": "1", "conversation_tokens": "5", "requests": "1", "prefix_hit_tokens": "7"}


def test_save_writes_messages_and_never_over_a_file(cli, tmp_path):
    path = tmp_path / "talk here.json"
    ran = cli("chat", "--system", "s", stdin=f"grüß\n/save {path}\nmore\n/save {path}\n".encode())
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "grüß"},
        {"role": "assistant", "content": "grüß "},
    ]
    assert f"{path} exists already" in ran.err and ran.status == 2


def test_model_without_chat_format_cannot_chat(cli):
    ran = cli("chat", "-m", "plain", "-q", stdin=b"hi\n")
    assert (ran.status, ran.out, ran.engine.closed) == (2, "", 1)
    assert "no chat template" in ran.err and ran.err.count("\n") == 1


def test_ctrl_c_stops_the_answer_and_not_the_program(on_terminal, tmp_path):
    path = tmp_path / "talk.json"
    terminal = on_terminal("main", "chat")
    terminal.expect("/help lists the commands")
    terminal.expect("> ")
    terminal.type("count 1000\n")
    terminal.expect("w3 ")
    terminal.type("\x03")
    terminal.expect(", stopped")
    terminal.expect("> ")
    terminal.press_until("\x03", "/exit leaves")  # at the prompt it is no reason to leave either
    terminal.expect("> ")
    terminal.type("hello there\n")
    terminal.expect("there ")
    terminal.expect("prompt tokens from cache")
    terminal.type(f"/save {path}\n")
    terminal.expect("Written to")
    terminal.expect("> ")  # an end of file typed before the prompt is there gets lost
    terminal.type("\x04")
    assert terminal.expect_end() == 0
    question, partial, *rest = json.loads(path.read_text())
    assert question["content"] == "count 1000"
    assert partial["role"] == "assistant" and partial["content"].startswith("w0 w1 w2 w3 ")
    assert [message["content"] for message in rest] == ["hello there", "hello there "]


def test_ctrl_c_before_any_text_leaves_no_turn(on_terminal, tmp_path):
    path = tmp_path / "talk.json"
    terminal = on_terminal("main", "chat")
    terminal.expect("> ")
    terminal.type("hang\n")
    terminal.expect("(hanging)")
    terminal.type("\x03")
    terminal.expect("> ")
    terminal.type(f"/save {path}\n/exit\n")
    assert terminal.expect_end() == 0
    assert json.loads(path.read_text()) == []


def test_third_ctrl_c_leaves_whatever_the_engine_does(on_terminal):
    terminal = on_terminal("main", "chat")
    terminal.expect("> ")
    terminal.type("stuck\n")
    terminal.expect("(hanging)")
    terminal.type("\x03")
    terminal.expect("(closing)")
    terminal.type("\x03")
    terminal.expect("Ctrl-C once more leaves at once.")
    terminal.type("\x03")
    assert terminal.expect_end() == 130
    assert "Traceback" not in terminal.shown


def test_ctrl_c_ends_a_chat_through_a_pipe():
    process = subprocess.Popen(
        [sys.executable, *DRIVER, "main", "chat"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV,
    )  # fmt: skip
    assert process.stdin is not None and process.stdout is not None
    process.stdin.write(b"count 500\nnext\n")
    process.stdin.flush()
    assert process.stdout.read(3) == b"w0 "
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, b"next" in out, b"Traceback" in err) == (130, False, False)


def test_typed_at_a_terminal_with_answers_to_a_file(on_terminal, tmp_path):
    path = tmp_path / "answers"
    file = os.open(path, os.O_CREAT | os.O_WRONLY)
    terminal = on_terminal("main", "chat", stdout=file)
    os.close(file)
    for line in ("one", "", "two"):
        terminal.expect("> ")
        terminal.type(line + "\n")
    terminal.expect("> ")
    terminal.type("\x04")
    assert terminal.expect_end() == 0
    assert path.read_text() == "one \ntwo \n"
