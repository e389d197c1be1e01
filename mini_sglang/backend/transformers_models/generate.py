"""The backend that has transformers' own ``generate`` answer: each answer in a thread, one token per step."""

from __future__ import annotations

import importlib
import inspect
import threading
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from mini_sglang.backend.compiling import Compiler
from mini_sglang.backend.memory import give_back, is_out_of_memory, says_out_of_memory
from mini_sglang.backend.sampling import Sampler
from mini_sglang.backend.step import OUT_OF_MEMORY, SampleSpec, SequenceResult, SequenceStep
from mini_sglang.backend.transformers_models.decoder import TransformersConfig
from mini_sglang.backend.transformers_models.runner import said
from mini_sglang.backend.transformers_models.steps import OwnCacheBackend, check_steps
from mini_sglang.errors import InvalidValueError

_JOIN_SECONDS = 10.0


class GenerateBackend(OwnCacheBackend):
    """Implements ``Backend``: a sequence's one page names the call of ``generate`` that answers it.

    ``generate`` runs the model, keeps its cache and goes on; our ``Sampler`` chooses, as one of its logits
    processors, so that every sampling parameter means what it means elsewhere. Between two tokens a call
    waits, so that only one runs at a time; what is left of an answer that ended early waits until its page
    is taken or the backend is gone.

    Not thread-safe: one thread calls ``run``.

    Args:
        model: of transformers, in eval mode; its generation config is replaced.
        num_pages: how many sequences may be there at once.
        fixed_shape: have ``generate`` make a cache of a fixed shape.
        compiler: what its decodes are compiled with; ``None`` leaves them.
        about: what ``describe`` adds.
    """

    chunks_prompts = False

    def __init__(
        self,
        model: Any,
        config: TransformersConfig,
        num_pages: int,
        fixed_shape: bool,
        compiler: Compiler | None,
        about: Mapping[str, str | int],
    ) -> None:
        self._model = model
        super().__init__(config, num_pages, config.context_length, about)
        self._answers: dict[int, _Answer] = {}
        # At the interpreter's end too, which must not find a thread within torch.
        weakref.finalize(self, _end_all, self._answers)
        model.generation_config = _generation_config(config.context_length, fixed_shape, compiler)

    def describe(self) -> dict[str, str | int]:
        """What is loaded, for logs and ``stats``; sizes in bytes."""
        return {
            **super().describe(),
            "prefix_reuse": "off: transformers' generate",
            "chunked_prefill": "off: transformers' generate",
            "batched_decode": "one by one: transformers' generate",
        }

    @says_out_of_memory(past_lost=True)
    def run(self, steps: Sequence[SequenceStep]) -> list[SequenceResult]:
        """See ``Backend.run``.

        Raises:
            InvalidValueError: a step that breaks the contract of ``SequenceStep``, or no step of
                ``generate``; nothing has run.
        """
        check_steps(steps, self, self._reached)
        for step in steps:
            if step.sample is None or (step.start and len(step.token_ids) > 1):
                raise InvalidValueError("token_ids", len(step.token_ids), "a whole prompt or one new token")
        return [self._step(step) for step in steps]

    def _step(self, step: SequenceStep) -> SequenceResult:
        page = step.pages[0]
        assert step.sample is not None
        if not step.start:
            if (old := self._answers.pop(page, None)) is not None:
                old.end()
            self._answers[page] = _Answer(self._model, self._sampler, step.token_ids)
        answer = self._answers[page]
        result = answer.next_token(step.sample, len(step.token_ids))
        if result.error is not None:
            del self._answers[page]
            answer.end()
            if result.error_kind is not None:
                give_back(self._model.device)
            return result
        if step.prompt_targets and not step.start:
            result.prompt_logprobs = self._sampler.prompt_logprobs(
                self._prompt_logits(step.token_ids)[: len(step.prompt_targets)],
                step.prompt_targets,
                step.prompt_top,
            )
        return result

    @torch.inference_mode()
    def _prompt_logits(self, ids: Sequence[int]) -> Tensor:
        """``[T, vocab_size]``, by a forward of its own: ``generate`` has those of the last token only."""
        logits: Tensor = self._model(input_ids=torch.tensor([ids]).to(self._model.device)).logits
        return logits[0].float()

    def _reached(self, step: SequenceStep) -> int | None:
        answer = self._answers.get(step.pages[0])
        return None if answer is None else answer.length


class _Answer:
    """One call of ``generate``, which waits between any two tokens.

    Attributes:
        length: tokens that the model has read.
    """

    def __init__(self, model: Any, sampler: Sampler, prompt: Sequence[int]) -> None:
        self.length = 0
        self._model = model
        self._sampler = sampler
        self._prompt = list(prompt)
        self._spec: SampleSpec | None = None
        self._result = SequenceResult(error="generate ended by itself.")
        self._ended = False
        self._may_go = threading.Semaphore(0)
        self._has_stopped = threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name="mini-sglang-generate", daemon=True)
        self._thread.start()

    def next_token(self, spec: SampleSpec, num_tokens: int) -> SequenceResult:
        """Have the call go on to its next token, reading ``num_tokens`` for it."""
        self._spec, self._result = spec, SequenceResult(error="generate ended by itself.")
        self._may_go.release()
        self._has_stopped.acquire()
        self.length += num_tokens
        return self._result

    def end(self) -> None:
        """Let the thread run out, without a further token."""
        self._ended = True
        self._may_go.release()

    def join(self) -> None:
        """Wait for the thread, which takes a forward at most."""
        self._thread.join(_JOIN_SECONDS)

    def _run(self) -> None:
        self._may_go.acquire()
        try:
            if not self._ended:
                self._generate()
        except Exception as error:
            kind = OUT_OF_MEMORY if is_out_of_memory(error) else None
            self._result = SequenceResult(error=f"generate failed: {said(error)}.", error_kind=kind)
        finally:
            self._has_stopped.release()

    @torch.inference_mode()
    def _generate(self) -> None:
        transformers = importlib.import_module("transformers")
        ids = torch.tensor([self._prompt]).to(self._model.device)
        given = {}
        if "attention_mask" in inspect.signature(self._model.forward).parameters:
            given["attention_mask"] = torch.ones_like(ids)
        self._model.generate(
            ids,
            logits_processor=transformers.LogitsProcessorList([self._choose]),
            stopping_criteria=transformers.StoppingCriteriaList([self._wait]),
            **given,
        )

    def _choose(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """A logits processor that leaves one token."""
        assert self._spec is not None
        (self._result,) = self._sampler.sample(scores.float(), [self._spec])
        chosen = torch.full_like(scores, float("-inf"))
        chosen[0, self._result.token_id or 0] = 0.0
        return chosen

    def _wait(self, input_ids: Tensor, scores: Any, **_: Any) -> Tensor:
        """A stopping criterion that gives the token away and stays until the next one is wanted."""
        self._has_stopped.release()
        self._may_go.acquire()
        return torch.full((len(input_ids),), self._ended, dtype=torch.bool, device=input_ids.device)


def _end_all(answers: dict[int, _Answer]) -> None:
    for answer in answers.values():
        answer.end()
    for answer in answers.values():
        answer.join()


def _generation_config(context_length: int, fixed_shape: bool, compiler: Compiler | None) -> Any:
    """One in which no token ends an answer and nothing but us touches the logits."""
    transformers = importlib.import_module("transformers")
    given: dict[str, Any] = {"cache_implementation": "static"} if fixed_shape else {}
    if compiler is not None:
        config = transformers.CompileConfig(dynamic=True, mode=compiler.mode)
        config._compile_all_devices = True
        given["compile_config"] = config
    return transformers.GenerationConfig(
        max_length=context_length,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        disable_compile=compiler is None,
        **given,
    )
