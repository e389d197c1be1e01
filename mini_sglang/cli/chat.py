"""``mini-sglang chat``: a conversation in the terminal or through a pipe."""

from __future__ import annotations

import os
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from mini_sglang.cli import args
from mini_sglang.cli.answer import say_pairs
from mini_sglang.cli.conversation import Conversation, show
from mini_sglang.cli.face import EngineFace, has_chat_template
from mini_sglang.cli.terminal import LeaveNow, Terminal
from mini_sglang.errors import ContextLengthError, InvalidValueError, MiniSglangError

PROMPT = "> "

_HELP = {
    "/help": "show this list",
    "/reset": "forget the conversation; the system message stays",
    "/system TEXT": "set the system message; without TEXT, take it away",
    "/set NAME VALUE": "set a sampling parameter; `default` as VALUE takes it back; /set alone lists them",
    "/stats": "figures of the conversation and the engine",
    "/save FILE": "write the conversation to a new file, as JSON",
    "/exit": "leave (also Ctrl-D)",
}


def run(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    """Hold the conversation until its input ends.

    Returns:
        the exit status: 0, or through a pipe 2 when a turn or command failed and 130 after Ctrl-C.

    Raises:
        MiniSglangError: a bad parameter, or a model that cannot be had or has no chat format.
    """
    params = args.chosen_params(options, args.CHAT_DEFAULTS)
    # The doors share the flags of generate, of which a conversation cannot honour these.
    if getattr(options, "raw", False):
        raise args.UsageError("--raw has no place in a conversation.")
    if params.logprobs or params.prompt_logprobs:
        raise args.UsageError("logprobs are not shown in a conversation; generate shows them.")
    if options.system is not None:
        args.check_text("system message", options.system)
    if options.prompt is not None:
        args.check_text("prompt", options.prompt)
    with closing(open_engine()) as engine:
        if not has_chat_template(engine):
            raise MiniSglangError("This model has no chat template, so it can only generate, not chat.")
        conversation = Conversation(engine, params, options.system)
        return Chat(conversation, terminal, options.stats).run(options.prompt)


class Chat:
    """The loop over the lines of input: a turn or a command each."""

    def __init__(self, conversation: Conversation, terminal: Terminal, stats: bool = False) -> None:
        self._conversation = conversation
        self._terminal = terminal
        self._stats = stats
        self._failed = False
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/reset": self._reset,
            "/system": self._system,
            "/set": self._set,
            "/stats": self._show_stats,
            "/save": self._save,
        }

    def run(self, first: str | None = None) -> int:
        """Work through the input; ``first`` is a turn to begin with. Returns the exit status."""
        if self._terminal.input_is_terminal:
            self._greet()
        if first:
            self._turn(first)
        while True:
            try:
                line = self._terminal.read_line(PROMPT)
                if line is None:
                    if self._terminal.input_is_terminal:
                        self._terminal.notice("")
                    return self._status()
                if line.strip() and not self._handle(line):
                    return self._status()
            except LeaveNow:
                raise
            except KeyboardInterrupt:
                if not self._terminal.input_is_terminal:
                    raise
                self._terminal.notice("\n(Ctrl-D or /exit leaves)")
            except MiniSglangError as error:
                self._fail(error)

    def _status(self) -> int:
        return 2 if self._failed and not self._terminal.input_is_terminal else 0

    def _greet(self) -> None:
        about = self._conversation.engine.description
        model = about.get("model", "the model")
        device = f" on {about['device']}" if "device" in about else ""
        self._terminal.notice(f"Talking to {model}{device}. /help lists the commands, Ctrl-D leaves.")

    def _handle(self, line: str) -> bool:
        """Act on one line; returns whether the conversation goes on.

        Raises:
            MiniSglangError: a command that is unknown or was given a bad value.
        """
        if not line.startswith("/"):
            self._turn(line)
            return True
        command, _, rest = line.partition(" ")
        command, rest = command.strip(), rest.strip()
        if command in ("/exit", "/quit"):
            return False
        if command not in self._commands:
            known = ", ".join(self._commands)
            raise InvalidValueError(
                "command", command, f"one of {known}, /exit; a message may start with / after a space"
            )
        self._commands[command](rest)
        return True

    def _turn(self, text: str) -> None:
        try:
            answer = self._conversation.ask(text, self._terminal)
        except ContextLengthError as error:
            self._fail(error)
            self._terminal.say(
                "The conversation no longer fits the model's context; /reset starts a new one."
                if self._conversation.num_turns
                else "This message alone does not fit the model's context; a shorter one may."
            )
        except MiniSglangError as error:
            self._fail(error)
        else:
            self._terminal.figures(answer.figures(), self._stats)
            if answer.interrupted and not self._terminal.input_is_terminal:
                raise KeyboardInterrupt

    def _fail(self, error: MiniSglangError) -> None:
        self._failed = True
        self._terminal.error(error)

    def _help(self, rest: str) -> None:
        say_pairs(_HELP, self._terminal)

    def _reset(self, rest: str) -> None:
        self._conversation.reset()
        self._terminal.notice("A new conversation.")

    def _system(self, rest: str) -> None:
        before, self._conversation.system = self._conversation.system, rest or None
        if rest:
            self._terminal.notice("The system message is set.")
        else:
            self._terminal.notice(f"The system message is gone; it was: {before or 'empty'}")

    def _set(self, rest: str) -> None:
        if not rest:
            say_pairs(self._conversation.shown_params(), self._terminal)
            return
        name, _, value = rest.partition(" ")
        if not value.strip():
            shown = self._conversation.shown_params()
            name = args.param_field(name).name
            self._terminal.say(f"{name} is {shown[name]}")
            return
        shown_value = show(self._conversation.set_param(name, value.strip()))
        self._terminal.notice(f"{args.param_field(name).name} is {shown_value}")

    def _show_stats(self, rest: str) -> None:
        say_pairs(self._conversation.stats(), self._terminal)

    def _save(self, rest: str) -> None:
        if not rest:
            raise MiniSglangError("/save needs the name of a file.")
        path = Path(os.path.expanduser(rest))  # noqa: PTH111 - unlike Path's, it leaves an unknown ~user
        self._conversation.save(path)
        self._terminal.notice(f"Written to {path}.")
