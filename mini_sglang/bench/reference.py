"""The float32 reference: what transformers answers itself, and what it thinks of every peer's answer."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from mini_sglang.bench.conversation import Conversation
from mini_sglang.bench.process import PeerError, Process
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
                reply = process.ask(self._seconds, ids=[prompt], new=new, cold=True)
                answers.append([int(token) for token in reply["ids"][0]])
        finally:
            process.close()
        return answers

    def judge(
        self,
        runs: Iterable[Run],
        prompt: Callable[[int, int], list[int]],
        step: Callable[[str], None],
    ) -> dict[str, str]:
        """Set ``choices`` of each run that has ids. The same answer to the same prompt is judged once.

        Args:
            prompt: the ids of a round's turn.

        Returns:
            of each peer with an answer that could not be judged (ids that are no tokens), why.

        Raises:
            PeerError: it cannot be run.
        """
        process = self._start()
        seen: dict[tuple[int, int, tuple[int, ...]], list[int]] = {}
        unjudged: dict[str, str] = {}
        try:
            for run in runs:
                step(f"float32 reference judges {run.peer}")
                key = (run.round, run.turn, tuple(run.ids))
                try:
                    if run.ids and key not in seen:
                        ids = prompt(run.round, run.turn - 1)
                        seen[key] = process.ask(self._seconds, do="choose", prompt=ids, ids=run.ids)["answer"]
                except PeerError as error:
                    unjudged.setdefault(run.peer, str(error))
                run.choices = seen.get(key)
        finally:
            process.close()
        return unjudged

    def _start(self) -> Process:
        options = {"model": str(self._model), "threads": self._threads, "dtype": "fp32"}
        env = {"OMP_NUM_THREADS": str(self._threads)}
        process = Process("transformers", self._python, options, env, START_SECONDS)
        self.versions = process.about["versions"]
        return process
