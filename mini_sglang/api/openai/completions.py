"""``POST /v1/completions``, the older API: text in, text out."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any

from mini_sglang.api.openai.answer import new_id
from mini_sglang.api.openai.choices import Plan, Step, UsageSum, capped_json, run, usage_json
from mini_sglang.api.openai.door import DONE, Call, Events, error_frame, sse
from mini_sglang.api.openai.forms import number_of
from mini_sglang.api.openai.logprobs import TextLogprobs
from mini_sglang.api.openai.models import check_model, shown_name
from mini_sglang.api.openai.params import sampling_params
from mini_sglang.errors import InvalidValueError
from mini_sglang.types import FinishReason, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.api.service import Service

_DEFAULT_MAX_TOKENS = 16


class Completions:
    """The handler of completions."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def create(self, call: Call) -> dict[str, Any] | Events:
        """Continue one or several prompts, whole or as a stream of chunks.

        Raises:
            RequestError, InvalidValueError, ContextLengthError: a body that cannot be answered.
            OverloadedError, UnavailableError: there is no place for it.
        """
        service, values = self._service, call.values
        adapter = check_model(service, values)
        prompts = _prompts(values["prompt"])
        n = number_of(values, "n", 1)
        limit = service.settings.max_prompts_per_request
        if n * len(prompts) > limit:
            raise InvalidValueError(
                "n", n, f"such that prompts times n are at most {limit} (MAX_PROMPTS_PER_REQUEST)"
            )
        answer = _Answer(service, values, shown_name(service, adapter))

        async def encode() -> list[list[int]]:
            return [await service.encode(prompt) for prompt in prompts]

        plan = Plan(
            encode=encode,
            prompts=len(prompts),
            params=answer.params,
            n=n,
            capped=True,
            request_id=call.request_id,
            namespace=service.namespace(values.get("cache_salt"), call.tenant),
            adapter=adapter,
        )
        if not values.get("stream"):
            return await answer.whole(run(service, plan))
        include_usage = bool(values.get("stream_options", {}).get("include_usage"))
        return Events(answer.chunks(run(service, plan), include_usage), error_frame)


def _prompts(prompt: Any) -> list[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    return list(prompt)


class _Choice:
    """One of the answers while it is made."""

    def __init__(self, index: int, logprobs: TextLogprobs | None) -> None:
        self.index = index
        self.shaper = logprobs
        self.begun = False
        self.text = ""
        self.logprobs: list[TokenLogprob | int] = []
        self.finish: FinishReason | None = None
        self.capped: dict[str, Any] = {}


class _Answer:
    """The answers to one request, in the shapes of the API."""

    def __init__(self, service: Service, values: Mapping[str, Any], model: str) -> None:
        self._service = service
        self._top: int | None = values.get("logprobs")
        self._echo = values.get("echo", False)
        wanted = number_of(values, "max_tokens", _DEFAULT_MAX_TOKENS)
        if not wanted and not self._echo:
            raise InvalidValueError("max_tokens", 0, "at least 1 unless echo is true")
        # The engine makes at least one token; where none is wanted it is not given.
        self._drops = wanted == 0
        self.params = sampling_params(
            values,
            max_tokens=max(1, wanted),
            logprobs=self._top is not None,
            top_logprobs=self._top or 0,
            prompt_logprobs=self._echo and self._top is not None,
        )
        self._choices: dict[int, _Choice] = {}
        self._usage = UsageSum()
        self._head = {
            "id": new_id("cmpl-"),
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    async def whole(self, steps: AsyncGenerator[Step, None]) -> dict[str, Any]:
        async with aclosing(steps):
            async for step in steps:
                choice, text = self._take(step)
                choice.text += text
        choices = [choice for _, choice in sorted(self._choices.items())]
        return {
            **self._head,
            "choices": [self._shown(choice, choice.text, last=True) for choice in choices],
            "usage": self._usage_json(),
        }

    async def chunks(
        self, steps: AsyncGenerator[Step, None], include_usage: bool
    ) -> AsyncGenerator[bytes, None]:
        tail: dict[str, Any] = {"usage": None} if include_usage else {}
        async with aclosing(steps):
            async for step in steps:
                choice, text = self._take(step)
                if text or step.finished:
                    shown = self._shown(choice, text, last=step.finished)
                    yield sse({**self._head, "choices": [shown], **tail})
        if include_usage:
            yield sse({**self._head, "choices": [], "usage": self._usage_json()})
        yield DONE

    def _take(self, step: Step) -> tuple[_Choice, str]:
        """What a delta adds to its answer."""
        self._usage.add(step)
        text = ""
        choice = self._choices.get(step.index)
        if choice is None:
            shaper = None if self._top is None else TextLogprobs(self._service.tokenizer, self._top)
            choice = self._choices[step.index] = _Choice(step.index, shaper)
            if self._echo:
                text = self._service.tokenizer.decode(step.job.ids)
                if shaper is not None:
                    choice.logprobs += [step.job.ids[0], *step.stream.prompt_logprobs]
        choice.finish = step.delta.finish_reason
        choice.capped = capped_json(step.delta.usage)
        if not self._drops:
            text += step.delta.text
            choice.logprobs += step.logprobs
        return choice, text

    def _shown(self, choice: _Choice, text: str, *, last: bool) -> dict[str, Any]:
        logprobs = None
        if choice.shaper is not None:
            logprobs = choice.shaper.shape(choice.logprobs)
            choice.logprobs = []
        return {
            "index": choice.index,
            "text": text,
            "logprobs": logprobs,
            "finish_reason": str(choice.finish) if last else None,
            **choice.capped,
        }

    def _usage_json(self) -> dict[str, Any]:
        usage = self._usage.usage
        return usage_json(Usage(usage.prompt_tokens, 0, usage.cached_tokens) if self._drops else usage)
