"""``mini-sglang generate``: one prompt, one answer."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable
from contextlib import closing

from mini_sglang.cli import args
from mini_sglang.cli.answer import say_logprobs, stream_answer
from mini_sglang.cli.face import EngineFace, as_messages, has_chat_template
from mini_sglang.cli.terminal import Terminal
from mini_sglang.errors import InvalidValueError, MiniSglangError
from mini_sglang.types import Prompt


def run(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    """Answer the prompt of ``options``; returns the exit status.

    Raises:
        MiniSglangError: a bad prompt or parameter, or a model that cannot be had.
    """
    params = args.chosen_params(options, {})
    text = prompt_text(options, terminal)
    with closing(open_engine()) as engine:
        answer = stream_answer(engine, wrap_prompt(engine, text, options), params, terminal)
        say_logprobs(engine, answer, terminal)
        terminal.figures(answer.figures(), options.stats)
    return 130 if answer.interrupted else 0


def prompt_text(options: Namespace, terminal: Terminal) -> str:
    """The prompt that was given as an argument or through a pipe, checked before any model is loaded.

    Raises:
        MiniSglangError: there is none, it is empty, not UTF-8, or over 64 MiB.
    """
    if options.system is not None:
        args.check_text("system message", options.system)
        if options.raw:
            raise args.UsageError("--system has no place in a prompt that is given with --raw.")
    text: str | None = options.prompt
    if text is None and terminal.input_is_terminal:
        raise MiniSglangError(f'No prompt was given: {options.prog} "…", or text through a pipe.')
    if text is None or text == "-":
        text = piped_text(options, terminal)
    if not text:
        raise InvalidValueError("prompt", text, "a text that is not empty")
    return args.check_text("prompt", text)


def piped_text(options: Namespace, terminal: Terminal) -> str:
    """Standard input as a prompt; without ``--raw``, less the line end that nobody meant to ask about."""
    text = terminal.read_all()
    return text if options.raw else text.removesuffix("\n").removesuffix("\r")


def wrap_prompt(engine: EngineFace, text: str, options: Namespace) -> Prompt:
    """``text`` as a chat message where the model has a chat format, unless ``--raw`` was given.

    Raises:
        MiniSglangError: a system message for a model that has no chat format.
    """
    if options.raw:
        return text
    if has_chat_template(engine):
        return as_messages(text, options.system)
    if options.system is not None:
        raise MiniSglangError("This model has no chat template, so it cannot take --system.")
    return text
