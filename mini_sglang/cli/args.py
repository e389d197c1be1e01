"""The arguments of the command line, made from the settings and sampling parameters themselves."""

from __future__ import annotations

import argparse
import difflib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any, NoReturn

from mini_sglang.cli import bench
from mini_sglang.config import default_text, setting_fields, value_type
from mini_sglang.errors import InvalidValueError, MiniSglangError, shorten
from mini_sglang.setting import FALSE, TRUE
from mini_sglang.types import SamplingParams

CHAT_DEFAULTS: Mapping[str, object] = {"max_new_tokens": 512}
# Logprobs are shown after an answer; between the turns of a conversation they would only be noise.
CHAT_PARAMS = tuple(f.name for f in fields(SamplingParams) if "logprobs" not in f.name)

_PROMPT_HELP = (
    "the prompt; without it, or as -, it is read from standard input. It is sent as one user message in the "
    "model's chat format where the model has one; see --raw"
)


class UsageError(MiniSglangError):
    """Arguments that do not fit the command."""


class Parser(argparse.ArgumentParser):
    """An ``ArgumentParser`` whose errors are one sentence and not sixty lines of usage.

    Args:
        fill: adds the arguments, once they are needed: a hundred of them for each command take a while.
        keywords: of ``ArgumentParser``.
    """

    def __init__(self, *, fill: Callable[[Parser], None] | None = None, **keywords: Any) -> None:
        keywords.setdefault("formatter_class", _HelpFormatter)
        super().__init__(allow_abbrev=False, **keywords)
        self.set_defaults(prog=self.prog)
        self._fill = fill

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; `{self.prog} --help` shows what is allowed.")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        fill, self._fill = self._fill, None
        if fill is not None:
            fill(self)
        return super().parse_known_args(args, namespace)

    def parse(self, argv: Sequence[str] | None) -> argparse.Namespace:
        """The parsed arguments.

        Raises:
            UsageError: an unknown option, a missing value or a word too many.
            SystemExit: after ``--help`` or ``--version``, with status 0.
        """
        options: argparse.Namespace
        options, extra = self.parse_known_args(argv)
        if extra:
            raise UsageError(_explain(extra[0], options.prog))
        return options


class _HelpFormatter(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32)


def command_parser() -> Parser:
    """The parser of ``mini-sglang``; ``command`` says which of its commands was given."""
    parser = Parser(
        prog="mini-sglang",
        usage="mini-sglang COMMAND [options]",
        description="Text generation with a local language model, streamed as it comes.",
        epilog="`mini-sglang COMMAND --help` lists a command's options.",
    )
    parser.add_argument("--version", action="version", version=f"mini-sglang {_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    commands.add_parser(
        "generate",
        prog="mini-sglang generate",
        help="answer one prompt",
        usage="mini-sglang generate [options] [PROMPT]",
        description="Answer one prompt: the text alone on standard output, all else on standard error.",
        fill=add_generate_options,
    )
    commands.add_parser(
        "chat",
        prog="mini-sglang chat",
        help="hold a conversation",
        usage="mini-sglang chat [options] [PROMPT]",
        description="Hold a conversation: each line of input is a turn, /help lists the commands in it. "
        "Ctrl-C stops an answer, Ctrl-D leaves.",
        fill=_add_chat_options,
    )
    commands.add_parser(
        "serve",
        prog="mini-sglang serve",
        help="serve the model over HTTP",
        usage="mini-sglang serve [options]",
        description="Serve the model over HTTP, to OpenAI clients (/v1/…) and natively (/generate), until "
        "Ctrl-C or SIGTERM. Only this machine can reach it unless --host says otherwise.",
        fill=_add_serve_options,
    )
    commands.add_parser(
        "bench",
        prog="mini-sglang bench",
        help="compare with other stacks, and measure",
        usage="mini-sglang bench VERB [options]",
        description=bench.description(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        fill=bench.add_options,
    )
    commands.add_parser(
        "settings",
        prog="mini-sglang settings",
        help="print the table of settings",
        usage="mini-sglang settings",
        description="Print every setting with its variable, flag, default and meaning, as Markdown.",
    )
    return parser


def add_generate_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help=_PROMPT_HELP)
    parser.add_argument(
        "--raw",
        action="store_true",
        help="give the prompt to the model as it is, without the chat format; also keeps the line end of "
        "a prompt from standard input",
    )
    _add_common_options(parser)
    _add_sampling(parser, tuple(f.name for f in fields(SamplingParams)), {})
    _add_settings(parser)


def _add_chat_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prompt", nargs="?", metavar="PROMPT", help="the first turn")
    _add_common_options(parser)
    _add_sampling(parser, CHAT_PARAMS, CHAT_DEFAULTS)
    _add_settings(parser)


def _add_serve_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no banner")
    _add_settings(parser)


def takes_settings(options: argparse.Namespace) -> bool:
    return hasattr(options, "log_level")


def chosen_settings(options: argparse.Namespace) -> dict[str, object]:
    """The settings given as flags, as texts, for ``Settings.resolve`` or ``Engine``."""
    given = {spec.name: getattr(options, spec.name) for spec in setting_fields()}
    return {name: value for name, value in given.items() if value is not None}


def chosen_params(options: argparse.Namespace, defaults: Mapping[str, object]) -> SamplingParams:
    """The sampling parameters given as flags, over ``defaults``, over those of ``SamplingParams``.

    Raises:
        InvalidValueError: a value that is not allowed.
    """
    values: dict[str, Any] = dict(defaults)
    for spec in fields(SamplingParams):
        given = getattr(options, spec.name, None)
        if given is not None:
            values[spec.name] = parse_param(spec, given)
    return SamplingParams(**values)


def parse_param(spec: Field[Any], given: str | bool | Sequence[str]) -> object:
    """A sampling parameter's value from text; what cannot be parsed is left for SamplingParams to refuse."""
    if not isinstance(given, str):
        if isinstance(given, bool):
            return given
        return tuple(_convert(int, item) if spec.name == "stop_token_ids" else item for item in given)
    if spec.default is None and spec.metadata["metavar"]:
        return given
    if spec.name == "logit_bias":
        return _convert(json.loads, given)
    if isinstance(spec.default, bool):
        text = given.lower()
        return text in TRUE if text in TRUE | FALSE else given
    return _convert(float if isinstance(spec.default, float) else int, given)


def param_field(name: str, allowed: Sequence[str] = CHAT_PARAMS) -> Field[Any]:
    """The sampling parameter of that name, as a person may write it (``max-new-tokens``).

    Raises:
        InvalidValueError: there is none.
    """
    plain = name.lstrip("-").replace("-", "_")
    for spec in fields(SamplingParams):
        if spec.name == plain and plain in allowed:
            return spec
    raise InvalidValueError("parameter", name, "one of " + ", ".join(allowed))


def check_text(name: str, text: str) -> str:
    """``text``, if it can be written as UTF-8: an argument's foreign bytes arrive as lone surrogates.

    Raises:
        MiniSglangError: it cannot.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MiniSglangError(f"The {name} is not UTF-8 text at character {error.start + 1}.") from None
    return text


def _convert(convert: Callable[[str], object], text: str) -> object:
    try:
        return convert(text)
    except (ValueError, RecursionError):
        return text


def _add_common_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--system", metavar="TEXT", help="a system message to put before the conversation")
    parser.add_argument("--quiet", "-q", action="store_true", help="no progress and no figures")
    parser.add_argument(
        "--stats",
        action="store_true",
        help="figures of each answer, even where nobody watches standard error",
    )


def _add_sampling(
    parser: argparse.ArgumentParser, names: Sequence[str], defaults: Mapping[str, object]
) -> None:
    group = parser.add_argument_group("Sampling")
    for spec in fields(SamplingParams):
        if spec.name not in names:
            continue
        keywords: dict[str, Any] = {"dest": spec.name, "default": None}
        default = defaults.get(spec.name, spec.default)
        help_text = _escape(spec.metadata["help"])
        if isinstance(spec.default, bool):
            keywords["action"] = "store_true"
        else:
            keywords["metavar"] = spec.metadata["metavar"] or ("X" if isinstance(default, float) else "N")
            if isinstance(default, tuple):
                keywords["action"] = "append"
                help_text += "; may be given several times"
            elif default is not None and default is not MISSING:
                help_text += f" (default {default})"
        group.add_argument(_flag(spec.name), help=help_text, **keywords)


def _add_settings(parser: argparse.ArgumentParser) -> None:
    groups: dict[str, argparse._ArgumentGroup] = {}
    for spec in setting_fields():
        meta = spec.metadata
        if meta["section"] not in groups:
            groups[meta["section"]] = parser.add_argument_group(meta["section"])
        keywords: dict[str, Any] = {"dest": spec.name, "default": None}
        kind = value_type(spec)
        if kind is bool:
            keywords |= {"nargs": "?", "const": "1", "metavar": "0|1"}
        elif meta["choices"]:
            keywords["metavar"] = "|".join(meta["choices"])
        else:
            keywords["metavar"] = {int: "N", float: "X"}.get(kind, spec.name.split("_")[-1].upper())
        default = default_text(spec).replace("`", "")
        help_text = f"{meta['help']} [{', '.join(meta['env'])}; default {default}]"
        names = ["-m", _flag(spec.name)] if spec.name == "model" else [_flag(spec.name)]
        groups[meta["section"]].add_argument(*names, help=_escape(help_text), **keywords)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _escape(text: str) -> str:
    # argparse formats help texts with %.
    return text.replace("%", "%%")


def _explain(word: str, prog: str) -> str:
    if not word.startswith("-"):
        return f"{shorten(word)} is one word too many; a prompt of several words needs quotes."
    name = word.split("=")[0]
    known = [_flag(f.name) for f in (*setting_fields(), *fields(SamplingParams))]
    close = difflib.get_close_matches(name, [*known, "--raw", "--system", "--quiet", "--stats"], n=1)
    hint = f"did you mean {close[0]}?" if close else f"`{prog} --help` lists the options."
    return f"{shorten(name)} is not an option here; {hint}"


def _version() -> str:
    from mini_sglang import __version__

    return __version__
