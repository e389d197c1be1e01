"""``mini-sglang bench``: verbs, what they print, and their exit statuses."""

from __future__ import annotations

import importlib
import io
import sys
import types

import pytest

from mini_sglang.bench.peers import cli as peers_cli
from mini_sglang.bench.peers import install_cli
from mini_sglang.bench.peers.registry import all_peers, environment
from mini_sglang.cli import bench, main


@pytest.fixture
def verb(monkeypatch):
    """A verb ``try`` whose ``main`` is the function given."""

    def add(function):
        module = types.ModuleType("tried_verb")
        module.main = function
        monkeypatch.setitem(sys.modules, "tried_verb", module)
        monkeypatch.setitem(bench.VERBS, "try", ("tried_verb", "for a test"))

    return add


def test_a_verb_gets_all_that_follows_it_and_gives_the_status(verb):
    given = []
    verb(lambda argv: given.append(list(argv)) or 3)
    words = ["--rate", "4", "--", "peers", "--help", "-q", "--json=x"]
    assert main(["bench", "try", *words]) == 3
    assert given == [words]


def test_a_refusal_is_one_sentence_and_status_2(capsys):
    assert main(["bench", "install", "no-such-peer"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("mini-sglang: There is no peer 'no-such-peer'") and err.count("\n") == 1
    assert main(["bench", "install", "ollama"]) == 2
    assert "only reached by its URL" in capsys.readouterr().err
    assert main(["bench", "nothing"]) == 2
    assert "peers" in capsys.readouterr().err


def test_help_of_the_command_and_of_a_verb(capsys):
    assert main(["bench", "--help"]) == 0
    out = capsys.readouterr().out
    assert all(does in out for _, does in bench.VERBS.values())
    assert main(["bench", "peers", "--help"]) == 0
    assert "usage: mini-sglang bench peers" in capsys.readouterr().out


def test_ctrl_c_and_a_reader_that_left(verb):
    def interrupted(argv):
        raise KeyboardInterrupt

    def unread(argv):
        raise BrokenPipeError

    verb(interrupted)
    assert main(["bench", "try"]) == 130
    verb(unread)
    assert main(["bench", "try"]) == 0


@pytest.mark.parametrize("name", ["peers", "install"])
def test_a_verb_names_a_module_with_a_main(name):
    assert callable(importlib.import_module(bench.VERBS[name][0]).main)


def test_the_table_has_each_peer_with_its_version_or_how_to_get_it(capsys, monkeypatch):
    monkeypatch.setattr(peers_cli, "version", lambda peer: {"sglang": "0.5.23", "ours": "1"}.get(peer.name))
    assert main(["bench", "peers"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert set(all_peers()) <= set(lines)
    assert lines["sglang"].endswith("0.5.23") and "local, server" in lines["sglang"]
    assert lines["openvino"].endswith("mini-sglang bench install openvino") and "GGUF" in lines["openvino"]
    assert "by URL" in lines["ollama"]


def test_install_says_what_it_did(capsys, tiny, make_wheel, monkeypatch):
    make_wheel("tiny", "1.2", {"tiny.py": ""})
    peer = tiny()
    monkeypatch.setattr(install_cli, "chosen_peers", lambda names: [peer])
    assert main(["bench", "install", "tiny"]) == 0
    first = capsys.readouterr()
    assert first.out == f"tiny 1.2 is installed in {environment(peer)}\n"
    assert "tiny: 1 of 1: pip install" in first.err and "\x1b" not in first.err
    assert main(["bench", "install", "tiny"]) == 0
    assert capsys.readouterr().out == f"tiny 1.2 was installed already in {environment(peer)}\n"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_on_a_terminal_pips_words_take_each_others_place(monkeypatch):
    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("COLUMNS", "40")
    progress = install_cli.Progress()
    with progress:
        progress.say("begun")
        progress.show("Collecting " + "x" * 100)
        progress.show("evil \x1b[2J\ttitle")
        progress.say("done")
    lines = [part for line in screen.getvalue().split("\n") for part in line.split(install_cli.CLEAR)]
    assert [line for line in lines if line in ("begun", "done")] == ["begun", "done"]
    assert all(len(line) < 40 and "\x1b" not in line for line in lines)
    assert any(line.endswith("evil  [2J title") for line in lines)
    assert screen.getvalue().endswith(install_cli.CLEAR)
