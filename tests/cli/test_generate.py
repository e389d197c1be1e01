"""``generate`` and the doors: one prompt in, text alone out, and the exit status."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mini_sglang import logs
from tests.cli.process import DRIVER, ENV, ROOT, piped


def test_text_alone_on_stdout(cli):
    ran = cli("generate", "one two")
    assert (ran.status, ran.out, ran.engine.closed) == (0, "one two \n", 1)
    assert ran.err == f"Loading {ran.engine.settings.model} …\n", "no figures where nobody watches"


def test_quiet_and_stats(cli):
    assert cli("generate", "one two", "--quiet").err == ""
    ran = cli("generate", "count 3", "-q", "--stats")
    assert ran.out == "w0 w1 w2 \n"
    first, rate, after, cache = ran.err.rstrip("\n").split(", ")
    assert (first, cache) == ("3 tokens", "0 of 4 prompt tokens from cache")
    assert rate.endswith(" tokens/s") and 0 < float(rate.split()[0]) <= 50
    assert after.startswith("first after 0.") and after.endswith(" s")


def test_cut_answer_says_so(cli):
    ran = cli("generate", "one two three", "--max-new-tokens", "1", "--stats")
    assert ran.out == "one \n"
    assert "1 token, first after" in ran.err and ran.err.endswith(", cut at its length limit\n")


@pytest.mark.parametrize(
    ("words", "stdin", "prompt"),
    [
        (["hi"], b"", [{"role": "user", "content": "hi"}]),
        (["hi"], b"not read", [{"role": "user", "content": "hi"}]),
        ([], "grüß\n".encode(), [{"role": "user", "content": "grüß"}]),
        (["-"], b"a\nb\r\n", [{"role": "user", "content": "a\nb"}]),
        (
            ["hi", "--system", "s"],
            b"",
            [{"role": "system", "content": "s"}, {"role": "user", "content": "hi"}],
        ),
        (["hi", "--raw"], b"", "hi"),
        (["--raw"], b"hi\n", "hi\n"),
        (["hi", "-m", "plain"], b"", "hi"),
    ],
)
def test_how_the_prompt_is_sent(words, stdin, prompt, cli):
    ran = cli("generate", *words, stdin=stdin)
    assert ran.status == 0, ran.err
    assert [sent for sent, _ in ran.engine.calls] == [prompt]


@pytest.mark.parametrize(
    ("words", "stdin", "said"),
    [
        ([""], b"", "prompt is ''"),
        ([], b"", "prompt is ''"),
        ([], b"\n", "prompt is ''"),
        ([], b"ab\xff", "not UTF-8: byte 0xff at 2"),
        (["a\udcff"], b"", "The prompt is not UTF-8 text at character 2."),
        (["a", "--system", "\udcff"], b"", "The system message is not UTF-8"),
        (["a", "--system", "b", "--raw"], b"", "--system has no place"),
    ],
)
def test_bad_prompt_is_found_before_a_model_is_loaded(words, stdin, said, cli):
    ran = cli("generate", *words, stdin=stdin)
    assert (ran.status, ran.out, ran.engine) == (2, "", None)
    assert said in ran.err and ran.err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["-m", "missing", "hi"], "mini-sglang: missing was found in none"),
        (["-m", "broken", "hi"], "mini-sglang: broken/model.safetensors ends"),
        (["word " * 70], "prompt is '72 tokens'; it must be shorter than 60"),
        (["-m", "plain", "hi", "--system", "x"], "no chat template"),
    ],
)
def test_what_the_engine_refuses_is_a_sentence(words, said, cli):
    ran = cli("generate", "--quiet", *words)
    assert (ran.status, ran.out, ran.err.count("\n")) == (2, "", 1)
    assert said in ran.err


def test_failure_after_some_text_keeps_the_text(cli):
    ran = cli("generate", "fail now")
    assert (ran.status, ran.out, ran.engine.closed) == (2, "fail \n", 1)
    assert ran.err.endswith("mini-sglang: request r0 failed: out of memory\n")


def test_fault_of_ours_has_no_traceback_until_asked(cli):
    ran = cli("generate", "-m", "bug", "hi", "-q")
    assert (ran.status, ran.err.count("\n")) == (1, 1)
    assert "an unexpected KeyError: 'rope_theta'" in ran.err
    ran = cli("generate", "-m", "bug", "hi", "--log-level", "debug")
    assert ran.status == 1 and "Traceback" in ran.err


def test_logprobs_are_shown_beside_the_text(cli):
    ran = cli("generate", "one", "--raw", "--logprobs", "--top-logprobs", "1", "--prompt-logprobs", "-q")
    assert ran.out == "one \n"
    assert ran.err.splitlines() == [
        "prompt 'one' (0) -1.5000",
        "answer 'one' (0) -0.2500; most probable: 'one' (0) -0.2500",
    ]


def test_bytes_are_utf8_and_untouched_in_a_pipe_whatever_the_locale():
    done = piped(["main", "generate", "escape"], LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert (done.returncode, done.stdout) == (0, "a\x1b[2Jb\rü \n".encode())
    assert "Loading Qwen/Qwen2.5-0.5B-Instruct …\n".encode() == done.stderr


def test_terminal_shows_no_control_characters(on_terminal):
    terminal = on_terminal("main", "generate", "escape")
    assert terminal.expect_end() == 0
    assert "a\ufffd[2Jb\ufffdü" in terminal.shown
    assert "\x1b[2m2 tokens, " in terminal.shown, "figures in dim text"


def test_no_prompt_on_a_terminal(on_terminal):
    terminal = on_terminal("main", "generate")
    assert terminal.expect_end() == 2
    assert (
        terminal.shown
        == 'mini-sglang: No prompt was given: mini-sglang generate "…", or text through a pipe.\r\n'
    )


@pytest.mark.parametrize(("message", "shown"), [("count 500", "w3 "), ("hang", "(hanging)")])
def test_ctrl_c_stops_with_130(message, shown, on_terminal):
    terminal = on_terminal("main", "generate", "--stats", message)
    terminal.expect(shown)
    terminal.type("\x03")
    assert terminal.expect_end() == 130
    assert "Traceback" not in terminal.shown
    assert "stopped" in terminal.shown


def test_ctrl_c_while_loading(on_terminal):
    terminal = on_terminal("main", "generate", "-m", "slow", "hi")
    terminal.expect("Loading")
    terminal.type("\x03")
    assert terminal.expect_end() == 130
    assert "Traceback" not in terminal.shown


def test_ctrl_c_keeps_the_text_and_says_nothing_more():
    process = subprocess.Popen(
        [sys.executable, *DRIVER, "main", "generate", "count 500"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=ENV,
    )  # fmt: skip
    assert process.stdout is not None
    start = process.stdout.read(6)
    process.send_signal(signal.SIGINT)
    rest, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert start == b"w0 w1 " and rest.endswith(b"\n") and b"w499" not in rest
    assert err.count(b"\n") == 1, "the notice of loading alone"


def test_broken_pipe_ends_quietly():
    read, write = os.pipe()
    process = subprocess.Popen(
        [sys.executable, *DRIVER, "main", "generate", "count 500"],
        stdin=subprocess.DEVNULL, stdout=write, stderr=subprocess.PIPE, env=ENV,
    )  # fmt: skip
    os.close(write)
    assert os.read(read, 2) == b"w0"
    os.close(read)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert err == "Loading Qwen/Qwen2.5-0.5B-Instruct …\n".encode()


@pytest.mark.parametrize("words", [["generate", "--help"], ["settings"]])
def test_broken_pipe_under_help(words):
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, *DRIVER, "main", *words], stdout=write, stderr=subprocess.PIPE, env=ENV
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, b"")


def test_full_disk_is_a_sentence(tmp_path):
    full = Path("/dev/full")
    target = full if full.exists() else tmp_path / "out"
    with target.open("w") as out:
        done = subprocess.run(
            [sys.executable, *DRIVER, "main", "generate", "-q", "one"],
            stdout=out,
            stderr=subprocess.PIPE,
            env=ENV,
        )
    if target is full:
        assert done.returncode == 2
        assert done.stderr.startswith(b"mini-sglang: Standard output cannot be written to: ")
        assert done.stderr.count(b"\n") == 1


def test_closed_streams_are_survived():
    script = f'exec "{sys.executable}" {" ".join(DRIVER)} main generate one <&- >&- 2>&-'
    assert subprocess.run(["/bin/sh", "-c", script], env=ENV).returncode == 0


def test_demo_answers_once_or_converses(cli):
    assert cli("hi", door="demo").out == "hi \n"
    assert cli(door="demo", stdin=b"piped\n").out == "piped \n"
    ran = cli(door="demo")
    assert ran.status == 0 and "good cup of tea" in ran.out
    ran = cli("--multi-turn", "first", "--max-new-tokens", "9", door="demo", stdin=b"second\n")
    assert (ran.status, ran.out) == (0, "first \nsecond \n")
    assert [params.max_new_tokens for _, params in ran.engine.calls] == [9, 9]
    ran = cli("--multi-turn", "--raw", door="demo")
    assert (ran.status, ran.engine) == (2, None)
    ran = cli("--multi-turn", "--logprobs", door="demo")
    assert (ran.status, ran.engine) == (2, None)


def test_smoke_test_passes_only_on_two_equal_runs(cli):
    ran = cli("--max-new-tokens", "32", "Hello", door="smoke")
    assert (ran.status, ran.out) == (0, "Hello \n")
    assert ran.err.endswith("smoke test passed: the answer's 1 token(s) came again the same\n")
    assert len(ran.engine.calls) == 2 and ran.engine.calls[0] == ran.engine.calls[1]
    assert cli(door="smoke").out == "Hello \n"
    ran = cli("fickle", door="smoke")
    assert ran.status == 2 and "differs from token 1 on" in ran.err
    ran = cli("silent", door="smoke")
    assert ran.status == 2 and "no token came" in ran.err
    assert cli("-m", "missing", door="smoke").status == 2


@pytest.mark.parametrize("door", ["cli_demo.py", "smoke_test.py"])
def test_doors_at_the_root(door):
    done = subprocess.run([sys.executable, ROOT / door, "--help"], capture_output=True, text=True, env=ENV)
    assert done.returncode == 0 and done.stdout.startswith(f"usage: python {door}")


def test_logs_go_to_stderr_once(capsys):
    logs.configure("info")
    logs.configure("info")
    logging.getLogger("mini_sglang.engine").info("prefill request=%s", "r0")
    logging.getLogger("mini_sglang.engine").debug("not this")
    captured = capsys.readouterr()
    assert captured.out == ""
    time, level, rest = captured.err.split(" ", 2)
    assert (len(time), level, rest) == (8, "INFO", "prefill request=r0\n")
    logs.configure("error")
    logging.getLogger("mini_sglang.engine").info("nor this")
    assert capsys.readouterr().err == ""
