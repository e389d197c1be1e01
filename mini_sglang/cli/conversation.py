"""The state of one conversation: messages, sampling parameters, and the engine that answers."""

from __future__ import annotations

import json
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from mini_sglang.cli.answer import Answer, stream_answer
from mini_sglang.cli.args import CHAT_DEFAULTS, CHAT_PARAMS, param_field, parse_param
from mini_sglang.cli.face import EngineFace
from mini_sglang.cli.terminal import Terminal
from mini_sglang.errors import MiniSglangError
from mini_sglang.types import SamplingParams


class Conversation:
    """Messages back and forth with one engine.

    The whole history is sent again each turn; the engine's prefix cache holds what it has seen of it, so
    that only what is new is computed.
    """

    def __init__(self, engine: EngineFace, params: SamplingParams, system: str | None = None) -> None:
        self.engine = engine
        self.params = params
        self.system = system
        self._turns: list[dict[str, str]] = []

    @property
    def messages(self) -> list[dict[str, str]]:
        """The conversation so far, the system message first."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self._turns

    @property
    def num_turns(self) -> int:
        return len(self._turns) // 2

    def ask(self, text: str, terminal: Terminal) -> Answer:
        """Send a user message and stream the answer to standard output.

        A stopped answer stays in the history as far as it came. A turn that failed, or was stopped before
        any text came, leaves no trace.

        Raises:
            ContextLengthError: the conversation no longer fits the model.
            MiniSglangError: the engine refuses or fails otherwise.
        """
        question = {"role": "user", "content": text}
        answer = stream_answer(self.engine, [*self.messages, question], self.params, terminal)
        if answer.text or not answer.interrupted:
            self._turns += [question, {"role": "assistant", "content": answer.text}]
        return answer

    def reset(self) -> None:
        """Forget the turns; the system message and the sampling parameters stay."""
        self._turns.clear()

    def set_param(self, name: str, text: str) -> object:
        """Change one sampling parameter for the answers to come; ``default`` takes it back.

        Returns:
            the new value.

        Raises:
            InvalidValueError: an unknown name or a value that is not allowed; nothing has changed.
        """
        spec = param_field(name)
        if text == "default":
            value: Any = CHAT_DEFAULTS.get(spec.name, getattr(SamplingParams(), spec.name))
        else:
            value = parse_param(spec, _texts(text) if spec.name in ("stop", "stop_token_ids") else text)
        self.params = replace(self.params, **{spec.name: value})
        return getattr(self.params, spec.name)

    def shown_params(self) -> dict[str, object]:
        """The sampling parameters by name, each with its value as ``set_param`` would take it."""
        values = {f.name: getattr(self.params, f.name) for f in fields(SamplingParams)}
        return {name: show(values[name]) for name in CHAT_PARAMS}

    def stats(self) -> dict[str, object]:
        """The engine's figures, and how long the conversation is."""
        shown: dict[str, object] = {"turns": self.num_turns}
        if self._turns:
            shown["conversation_tokens"] = self.engine.count_tokens(self.messages)
        return shown | dict(self.engine.stats())

    def save(self, path: Path) -> None:
        """Write the messages as a JSON list to a new file.

        Raises:
            MiniSglangError: the file exists, or cannot be written.
        """
        text = json.dumps(self.messages, ensure_ascii=False, indent=2) + "\n"
        try:
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except FileExistsError:
            raise MiniSglangError(f"{path} exists already and is left as it is; give another name.") from None
        except (OSError, ValueError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise MiniSglangError(f"{path} cannot be written: {reason}.") from None


def show(value: object) -> str:
    """A sampling parameter's value on one line."""
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, (str, int, float)):
        return str(value)
    return json.dumps(value if isinstance(value, tuple) else dict(value), ensure_ascii=False)  # type: ignore[call-overload]


def _texts(text: str) -> list[str]:
    """One text, or several as a JSON list; numbers in it stand for their own text."""
    if text.startswith(("[", '"')):
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            return [text]
        items = value if isinstance(value, list) else [value]
        return [item if isinstance(item, str) else json.dumps(item) for item in items]
    return [text]
