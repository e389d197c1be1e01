"""Runs the answers that one request asks for, several of them side by side."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mini_sglang.api.openai.params import for_choice, with_room
from mini_sglang.errors import EngineError
from mini_sglang.types import Delta, FinishReason, SamplingParams, TokenLogprob, Usage

if TYPE_CHECKING:
    from mini_sglang.api.served import ServedStream
    from mini_sglang.api.service import Service
    from mini_sglang.engine.flights import Ticket
    from mini_sglang.types import Adapter


@dataclass(frozen=True, slots=True)
class Plan:
    """What a request asks for: ``n`` answers to each prompt.

    Attributes:
        encode: gives the prompts as token ids; awaited once a place for the answers is taken.
        prompts: how many prompts it gives.
        adapter: that all of them run with.
        capped: whether the client named the most tokens to make; else it is what the context leaves.
    """

    encode: Callable[[], Awaitable[Sequence[Sequence[int]]]]
    prompts: int
    params: SamplingParams
    n: int
    capped: bool
    request_id: str
    namespace: str
    adapter: Adapter | None = None


@dataclass(frozen=True, slots=True)
class Job:
    """One answer to make.

    ``leader`` is the index of the job with the same prompt that goes first: once its first token is there
    the prompt is in the prefix cache, so that this one need not compute it again.
    """

    ids: Sequence[int]
    params: SamplingParams
    leader: int | None = None


@dataclass(frozen=True, slots=True)
class Step:
    """A delta of the answer ``index``; ``logprobs`` leave out the token that ended it, which is no text."""

    index: int
    job: Job
    delta: Delta
    logprobs: tuple[TokenLogprob, ...]
    stream: ServedStream

    @property
    def finished(self) -> bool:
        return self.delta.finish_reason is not None


async def run(service: Service, plan: Plan) -> AsyncGenerator[Step, None]:
    """Every delta of every answer as it comes, in order within an answer; those of one prompt together.

    Nothing is done before the first is asked for. Closing it aborts what runs.

    Raises:
        OverloadedError, UnavailableError: there is no place for it.
        MiniSglangError: an answer cannot be made or failed, which ends all of them.
    """
    with service.reserve(plan.prompts * plan.n) as ticket:
        jobs = _make_jobs(service, plan, await plan.encode())
        steps = (
            _run_one(service, 0, jobs[0], ticket, plan)
            if len(jobs) == 1
            else _run_all(service, jobs, ticket, plan)
        )
        async with aclosing(steps):
            async for step in steps:
                yield step


def _make_jobs(service: Service, plan: Plan, prompts: Sequence[Sequence[int]]) -> list[Job]:
    settings = service.settings
    margin = settings.max_context_margin if settings.aggressive_max_new_tokens else 0
    jobs: list[Job] = []
    for ids in prompts:
        room = service.info.max_sequence_tokens - len(ids) - margin
        params = plan.params if plan.capped else with_room(plan.params, room)
        first = len(jobs)
        jobs += [Job(ids, for_choice(params, k), None if k == 0 else first) for k in range(plan.n)]
    return jobs


async def _run_all(
    service: Service, jobs: Sequence[Job], ticket: Ticket, plan: Plan
) -> AsyncGenerator[Step, None]:
    # Of one place: while nobody takes them the streams gather what comes, and nothing piles up here.
    queue: asyncio.Queue[Step | Exception | None] = asyncio.Queue(1)
    begun = [asyncio.Event() for _ in jobs]

    async def follow(index: int) -> None:
        job = jobs[index]
        try:
            if job.leader is not None:
                await begun[job.leader].wait()
            async with aclosing(_run_one(service, index, job, ticket, plan)) as steps:
                async for step in steps:
                    begun[index].set()
                    await queue.put(step)
            await queue.put(None)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.create_task(follow(index)) for index in range(len(jobs))]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if item is None:
                left -= 1
            elif isinstance(item, Exception):
                raise item
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _run_one(
    service: Service, index: int, job: Job, ticket: Ticket, plan: Plan
) -> AsyncGenerator[Step, None]:
    stream = await service.open(
        job.ids,
        job.params,
        request_id=plan.request_id,
        namespace=plan.namespace,
        ticket=ticket,
        adapter=plan.adapter,
    )
    try:
        async for delta in stream:
            if delta.finish_reason in (FinishReason.ABORT, FinishReason.ERROR):
                raise EngineError("The request was ended by the server.")
            logprobs = delta.logprobs
            ended_by_token = delta.finish_reason is not None and isinstance(stream.matched_stop, int)
            if ended_by_token and len(logprobs) == len(delta.token_ids):
                logprobs = logprobs[:-1]
            yield Step(index, job, delta, logprobs, stream)
    finally:
        await stream.aclose()


class UsageSum:
    """The usage of a request: its answers together, each prompt once."""

    def __init__(self) -> None:
        self.usage = Usage(0, 0, 0)

    def add(self, step: Step) -> None:
        usage, total = step.delta.usage, self.usage
        if usage is None:
            return
        made = total.completion_tokens + usage.completion_tokens
        if step.job.leader is not None:
            self.usage = Usage(total.prompt_tokens, made, total.cached_tokens)
            return
        self.usage = Usage(
            total.prompt_tokens + usage.prompt_tokens, made, total.cached_tokens + usage.cached_tokens
        )


def usage_json(usage: Usage, reasoning_tokens: int | None = None) -> dict[str, Any]:
    result: dict[str, Any] = {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }
    if reasoning_tokens is not None:
        result["completion_tokens_details"] = {"reasoning_tokens": reasoning_tokens}
    return result


def capped_json(usage: Usage | None) -> dict[str, Any]:
    """What an answer says besides where it was given fewer tokens than were asked for, at its end."""
    return {} if usage is None or usage.capped_by is None else {"max_tokens_capped": usage.capped_by}
