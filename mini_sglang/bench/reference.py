"""The float32 reference: what transformers answers itself, and what it thinks of every peer's answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mini_sglang.bench.conversation import Conversation
from mini_sglang.bench.process import Process
from mini_sglang.bench.runs import Run
from mini_sglang.bench.sides import START_SECONDS

if TYPE_CHECKING:
    from mini_sglang.text.tokenizer import Tokenizer


class Reference:
    """Started for each of its two tasks, and not there while peers are measured.

    Args:
        model: the folder, or the GGUF, which transformers dequantises to float32.
        python: an interpreter that has transformers.
        seconds: how long one of its answers may take.
    """

    def __init__(self, model: Path, python: str, threads: int, seconds: float) -> None:
        self._model = model
        self._python = python
        self._threads = threads
        self._seconds = seconds
        self.versions: dict[str, str] = {}

    def answers(
        self, conversation: Conversation, tokenizer: Tokenizer, new: int, step: Callable[[str], None]
    ) -> list[list[int]]:
        """Its greedy answers to the turns of round 1, each turn after its own answers before.

        Raises:
            PeerError: it cannot be run.
        """
        process = self._start()
        answers: list[list[int]] = []
        try:
            for turn in range(len(conversation.turns)):
                step(f"float32 reference, turn {turn + 1}")
                prompt = conversation.with_answers(tokenizer, answers).prompt(tokenizer, 1, turn)
                reply = process.ask(self._seconds, do="answer", prompt=prompt, new=new)
                answers.append([int(token) for token in reply["answer"]])
        finally:
            process.close()
        return answers

    def judge(
        self,
        runs: Iterable[Run],
        prompt: Callable[[int, int], list[int]],
        step: Callable[[str], None],
        vocab_size: int | None = None,
    ) -> None:
        """Set ``choices`` of each run that has ids. The same answer to the same prompt is judged once.

        Args:
            prompt: the ids of a round's turn.
            vocab_size: ids from it on are no tokens; such a run is left as it is.

        Raises:
            PeerError: it cannot be run.
        """
        process = self._start()
        seen: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
        limit = math.inf if vocab_size is None else vocab_size
        try:
            for run in runs:
                step(f"float32 reference judges {run.peer}")
                if not run.ids or not all(0 <= token < limit for token in run.ids):
                    continue
                key = (run.round, run.turn, tuple(run.ids))
                if key not in seen:
                    ids = prompt(run.round, run.turn - 1)
                    seen[key] = process.ask(self._seconds, do="judge", prompt=ids, ids=run.ids)["answer"]
                run.choices = seen[key]
        finally:
            process.close()

    def _start(self) -> Process:
        options = {"model": str(self._model), "threads": self._threads}
        env = {"OMP_NUM_THREADS": str(self._threads)}
        process = Process("reference", self._python, options, env, START_SECONDS)
        self.versions = process.about["versions"]
        return process
