"""What ``cli_demo.py`` and ``smoke_test.py`` at the repository root do."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import replace

from mini_sglang.cli import app, args, chat, generate
from mini_sglang.cli.answer import Answer, say_logprobs, stream_answer
from mini_sglang.cli.face import EngineFace, EngineFactory
from mini_sglang.cli.terminal import Terminal
from mini_sglang.errors import MiniSglangError
from mini_sglang.types import Prompt, SamplingParams

DEMO_PROMPT = "Tell me in three sentences what makes a good cup of tea."
SMOKE_PROMPT = "Hello"


def demo(argv: Sequence[str] | None = None, engine_factory: EngineFactory | None = None) -> int:
    """One streamed answer, or with ``--multi-turn`` a conversation; returns the exit status."""
    parser = args.Parser(
        prog="cli_demo.py",
        usage="python cli_demo.py [--multi-turn] [options] [PROMPT]",
        description="Stream an answer in the terminal.",
    )
    parser.add_argument("--multi-turn", action="store_true", help="keep the conversation: mini-sglang chat")
    args.add_generate_options(parser)

    def choose(options: Namespace) -> app.Command:
        if options.multi_turn:
            return chat.run
        return _demo_once

    return app.run(parser, argv, engine_factory, choose)


def smoke_test(argv: Sequence[str] | None = None, engine_factory: EngineFactory | None = None) -> int:
    """Prefill and decode end to end, twice; 0 only if both runs gave the same tokens, and some text."""
    parser = args.Parser(
        prog="smoke_test.py",
        usage="python smoke_test.py [options] [PROMPT]",
        description="Answer a prompt twice and check that tokens and text came and were the same.",
    )
    args.add_generate_options(parser)
    return app.run(parser, argv, engine_factory, lambda options: _smoke)


def _demo_once(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    if options.prompt is None:
        piped = "" if terminal.input_is_terminal else generate.piped_text(options, terminal)
        options.prompt = piped or DEMO_PROMPT
        if not piped:
            terminal.notice(f"> {DEMO_PROMPT}")
    return generate.run(options, terminal, open_engine)


def _smoke(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    params = args.chosen_params(options, {})
    if params.seed is None:
        # Without one, two sampled answers are allowed to differ.
        params = replace(params, seed=0)
    options.prompt = SMOKE_PROMPT if options.prompt is None else options.prompt
    text = generate.prompt_text(options, terminal)
    with closing(open_engine()) as engine:
        prompt = generate.wrap_prompt(engine, text, options)
        first = stream_answer(engine, prompt, params, terminal)
        if first.interrupted:
            return 130
        again = _token_ids(engine, prompt, params)
        say_logprobs(engine, first, terminal)
        terminal.figures(first.figures(), options.stats)
    _check(first, again)
    terminal.say(f"smoke test passed: the answer's {len(first.token_ids)} token(s) came again the same")
    return 0


def _token_ids(engine: EngineFace, prompt: Prompt, params: SamplingParams) -> list[int]:
    return [token_id for delta in engine.stream(prompt, params) for token_id in delta.token_ids]


def _check(first: Answer, again: list[int]) -> None:
    if not first.token_ids:
        raise MiniSglangError("The smoke test failed: no token came.")
    if not first.text:
        raise MiniSglangError(f"The smoke test failed: {len(first.token_ids)} tokens came, but no text.")
    if first.token_ids != again:
        same = next((i for i, (a, b) in enumerate(zip(first.token_ids, again, strict=False)) if a != b), None)
        where = min(len(first.token_ids), len(again)) if same is None else same
        raise MiniSglangError(
            f"The smoke test failed: a second run of the same prompt differs from token {where + 1} on."
        )
