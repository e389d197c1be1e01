"""From arguments to an exit status: 0 fine, 2 bad input or no model, 130 Ctrl-C, 1 a fault of ours."""

from __future__ import annotations

import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence

from mini_sglang import logs
from mini_sglang.cli import args, bench, chat, generate, serve
from mini_sglang.cli.face import EngineFace, EngineFactory, load_engine
from mini_sglang.cli.terminal import OutputClosedError, Terminal, point_at_nothing
from mini_sglang.config import Settings, settings_table
from mini_sglang.errors import MiniSglangError

OpenEngine = Callable[[], EngineFace]
Command = Callable[[Namespace, Terminal, OpenEngine], int]


def main(argv: Sequence[str] | None = None, engine_factory: EngineFactory | None = None) -> int:
    """Run the ``mini-sglang`` command.

    Args:
        argv: the arguments after the command's name; the process's own by default.
        engine_factory: makes the engine; ``mini_sglang.Engine`` by default.

    Returns:
        the exit status.
    """
    return run(args.command_parser(), argv, engine_factory, lambda options: _COMMANDS[options.command])


def run(
    parser: args.Parser,
    argv: Sequence[str] | None,
    engine_factory: EngineFactory | None,
    choose: Callable[[Namespace], Command],
) -> int:
    """Parse, run the command that ``choose`` picks, and turn whatever comes out into an exit status."""
    terminal = Terminal()
    debug = False
    try:
        try:
            options = parser.parse(argv)
        except SystemExit as done:
            terminal.write("")
            return int(done.code or 0)
        except BrokenPipeError:
            # A long help is written through the buffer by argparse itself.
            point_at_nothing(sys.stdout)
            return 0
        terminal.quiet = getattr(options, "quiet", False)
        # The table of settings is there to be read most of all when one of them is wrong.
        chosen = args.chosen_settings(options) if args.takes_settings(options) else {}
        if args.takes_settings(options):
            level = Settings.resolve(chosen).log_level
            debug = level == "debug"
            logs.configure(level)

        def open_engine() -> EngineFace:
            notify = None if terminal.quiet else terminal.notice
            return (engine_factory or load_engine)(notify=notify, **chosen)

        return choose(options)(options, terminal, open_engine)
    except OutputClosedError:
        return 0
    except KeyboardInterrupt:
        return 130
    except MiniSglangError as error:
        _explain(terminal, error, str(error), debug)
        return 2
    except Exception as error:
        what = f"an unexpected {type(error).__name__}: {error} (--log-level debug shows where)"
        _explain(terminal, error, what, debug)
        return 1


def _explain(terminal: Terminal, error: Exception, text: str, debug: bool) -> None:
    if debug:
        terminal.say("".join(traceback.format_exception(error)).rstrip())
    terminal.error(text)


def _print_settings(options: Namespace, terminal: Terminal, open_engine: OpenEngine) -> int:
    terminal.write(settings_table())
    return 0


_COMMANDS: dict[str, Command] = {
    "generate": generate.run,
    "chat": chat.run,
    "serve": serve.run,
    "bench": bench.run,
    "settings": _print_settings,
}
