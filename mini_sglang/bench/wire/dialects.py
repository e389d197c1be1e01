"""The dialects: for each the body of a request and the parser of its stream.

Tokens are counted from ids or by the server's own count, never from the pieces that a stream comes in.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import msgspec

from mini_sglang.bench.wire.base import Ask, Dialect, Event, Reader, WireError, error_text
from mini_sglang.bench.wire.frames import Lines, ServerSentEvents

_decode: Callable[[bytes], Any] = msgspec.json.decode


def dialect(name: str) -> Dialect:
    """The dialect of this name.

    Raises:
        WireError: there is none.
    """
    try:
        return DIALECTS[name]
    except KeyError:
        raise WireError(f"There is no dialect {name!r}; there are {', '.join(DIALECTS)}.") from None


def _prompt(ask: Ask, *takes: str) -> Any:
    for form in takes:
        if (value := getattr(ask, form)) is not None:
            return list(value) if form != "text" else value
    raise WireError(f"The prompt must be given as {' or '.join(takes)}.")


def _given(**fields: Any) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


# mini-sglang's own /generate: a JSON object a line, {"text_delta", "token_ids"} and last {"event": "done"}.


def _ours_body(ask: Ask) -> dict[str, Any]:
    prompt = (
        {"messages": list(ask.messages)}
        if ask.messages is not None
        else {"prompt": _prompt(ask, "ids", "text")}
    )
    return {
        **prompt,
        "stream": True,
        "return_token_ids": True,
        "max_new_tokens": ask.new_tokens,
        "temperature": ask.temperature,
        "ignore_eos": ask.ignore_eos,
        **_given(seed=ask.seed, priority=ask.priority),
        **ask.extra,
    }


def _ours_event(payload: bytes) -> Event:
    line = _decode(payload)
    kind = line.get("event")
    if kind == "error":
        return Event(error=str(line["message"]), last=True)
    if kind == "done":
        return Event(
            output_tokens=line["completion_tokens"],
            prompt_tokens=line["prompt_tokens"],
            cached_tokens=line["cached_tokens"],
            finish=line["finish_reason"],
            last=True,
        )
    return Event(ids=line.get("token_ids"), text=line["text_delta"])


# OpenAI's completions and chat, and what vLLM and transformers make of them.


def _openai_body(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": _prompt(ask, "ids", "text"),
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_tokens": ask.new_tokens,
        "temperature": ask.temperature,
        **({"ignore_eos": True} if ask.ignore_eos else {}),
        **_given(model=ask.model, seed=ask.seed, priority=ask.priority),
        **ask.extra,
    }


def _chat_body(ask: Ask) -> dict[str, Any]:
    body = _openai_body(replace(ask, ids=None, text="", extra={}))
    del body["prompt"]
    messages = ask.messages
    if messages is None:
        messages = [{"role": "user", "content": _prompt(ask, "text")}]
    return {"messages": list(messages), **body, **ask.extra}


def _vllm_body(ask: Ask) -> dict[str, Any]:
    return {**_openai_body(ask), "return_token_ids": True, **ask.extra}


def _transformers_body(ask: Ask) -> dict[str, Any]:
    # It has no ignore_eos: an end-of-text id that no token has keeps it going.
    config: dict[str, Any] = {"max_new_tokens": ask.new_tokens, "do_sample": ask.temperature > 0}
    if ask.ignore_eos:
        config |= {"eos_token_id": [-1], "pad_token_id": 0}
    return {
        "prompt": _prompt(ask, "text"),
        "stream": True,
        "max_tokens": ask.new_tokens,
        "generation_config": json.dumps(config),
        # do_sample says greedy; a temperature of 0 beside it only makes it warn.
        **_given(model=ask.model, seed=ask.seed, temperature=ask.temperature or None),
        **ask.extra,
    }


def _openai_event(payload: bytes) -> Event | None:
    if payload == b"[DONE]":
        return Event(last=True)
    chunk = _decode(payload)
    if (error := error_text(chunk)) is not None:
        return Event(error=error, last=True)
    event = Event()
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        if delta is None:
            event.text = choice.get("text") or ""
        else:
            # Tokens of a reasoning or a tool call are tokens too.
            event.text = "".join(filter(None, (delta.get("reasoning_content"), delta.get("content"))))
            event.text = event.text or ("…" if delta.get("tool_calls") else "")
        ids = choice.get("token_ids")
        event.ids = None if ids is None else list(ids)
        event.finish = choice.get("finish_reason")
    usage = chunk.get("usage")
    if usage:
        event.prompt_tokens = usage.get("prompt_tokens")
        event.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        if event.finish is None and chunk.get("choices"):
            event.made = usage.get("completion_tokens")
        else:
            event.output_tokens = usage.get("completion_tokens")
    return event


# sglang's own /generate: server-sent events with all of the answer's ids so far, or only the new ones.


def _sglang_body(ask: Ask) -> dict[str, Any]:
    prompt = {"input_ids": list(ask.ids)} if ask.ids is not None else {"text": _prompt(ask, "text")}
    return {
        **prompt,
        "stream": True,
        "sampling_params": {
            "max_new_tokens": ask.new_tokens,
            "temperature": ask.temperature,
            "ignore_eos": ask.ignore_eos,
            **_given(sampling_seed=ask.seed),
        },
        **_given(priority=ask.priority),
        **ask.extra,
    }


class _Sglang:
    def __init__(self) -> None:
        self._ids = 0
        self._text = ""

    def __call__(self, payload: bytes) -> Event | None:
        if payload == b"[DONE]":
            return Event(last=True)
        message = _decode(payload)
        if (error := error_text(message)) is not None:
            return Event(error=error, last=True)
        meta = message["meta_info"]
        made = meta["completion_tokens"]
        text, ids = message.get("text") or "", message.get("output_ids")
        # Some versions and settings send all of the answer again with each message, some only what is new.
        if ids is None or len(ids) == made:
            text, self._text = text.removeprefix(self._text), text
            ids = None if ids is None else list(ids[self._ids :])
        if ids is not None:
            self._ids += len(ids)
            if self._ids != made:
                return Event(error=f"{self._ids} ids came where its count says {made}", last=True)
        event = Event(ids=ids, text=text, made=made)
        if (finish := meta.get("finish_reason")) is not None:
            event.finish = finish.get("type") if isinstance(finish, dict) else str(finish)
            if event.finish == "abort":
                event.error = str(finish.get("message") or "aborted")
            event.output_tokens, event.prompt_tokens = made, meta.get("prompt_tokens")
            event.cached_tokens = meta.get("cached_tokens")
        return event


# llama-server's /completion: server-sent events with the ids of each, the counts in the one that says stop.


def _llama_body(ask: Ask) -> dict[str, Any]:
    return {
        "prompt": _prompt(ask, "ids", "text"),
        "stream": True,
        "n_predict": ask.new_tokens,
        "temperature": ask.temperature,
        "ignore_eos": ask.ignore_eos,
        "return_tokens": True,
        "cache_prompt": True,
        **_given(seed=ask.seed),
        **ask.extra,
    }


def _llama_event(payload: bytes) -> Event | None:
    if payload == b"[DONE]":
        return None
    message = _decode(payload)
    if (error := error_text(message)) is not None or "content" not in message:
        return Event(error=error or error_text({"error": message}), last=True)
    # The last message of some versions repeats nothing, of others all ids.
    event = Event(text=message["content"])
    if not message.get("stop"):
        event.ids = message.get("tokens")
        return event
    event.output_tokens = message.get("tokens_predicted")
    event.prompt_tokens = message.get("tokens_evaluated")
    event.cached_tokens = (message.get("timings") or {}).get("cache_n")
    event.finish = message.get("stop_type") or "stop"
    event.last = True
    return event


# Ollama's /api/generate: a JSON object a line, the counts in the one that says done.


def _ollama_body(ask: Ask) -> dict[str, Any]:
    options = {"num_predict": ask.new_tokens, "temperature": ask.temperature, **_given(seed=ask.seed)}
    return {
        "prompt": _prompt(ask, "text"),
        "raw": True,
        "stream": True,
        "options": options,
        **_given(model=ask.model),
        **ask.extra,
    }


def _ollama_event(payload: bytes) -> Event:
    line = _decode(payload)
    if (error := error_text(line)) is not None:
        return Event(error=error, last=True)
    event = Event(text=(line.get("thinking") or "") + (line.get("response") or ""))
    if line["done"]:
        event.finish = line.get("done_reason") or "stop"
        event.output_tokens, event.prompt_tokens = line.get("eval_count"), line.get("prompt_eval_count")
        event.last = True
    return event


_ONLY_USAGE = (
    "this API names no token ids: tokens are the server's own count, "
    "and gaps are those between pieces of text"
)
_NO_IGNORE = "; it cannot be told to ignore end-of-text"


def _sse(parse: Callable[[], Callable[[bytes], Event | None]]) -> Callable[[], Reader]:
    return lambda: Reader(ServerSentEvents(), parse())


def _lines(parse: Callable[[bytes], Event | None]) -> Callable[[], Reader]:
    return lambda: Reader(Lines(), parse)


DIALECTS: dict[str, Dialect] = {
    one.name: one
    for one in (
        Dialect("ours", "/generate", ("ids", "text", "messages"), True, _ours_body, _lines(_ours_event)),
        Dialect(
            "openai",
            "/v1/completions",
            ("ids", "text"),
            False,
            _openai_body,
            _sse(lambda: _openai_event),
            _ONLY_USAGE,
        ),
        Dialect(
            "openai-chat",
            "/v1/chat/completions",
            ("messages", "text"),
            False,
            _chat_body,
            _sse(lambda: _openai_event),
            _ONLY_USAGE,
        ),
        Dialect("vllm", "/v1/completions", ("ids", "text"), True, _vllm_body, _sse(lambda: _openai_event)),
        Dialect(
            "transformers",
            "/v1/completions",
            ("text",),
            False,
            _transformers_body,
            _sse(lambda: _openai_event),
            _ONLY_USAGE,
        ),
        Dialect("sglang", "/generate", ("ids", "text"), True, _sglang_body, _sse(_Sglang)),
        Dialect(
            "llama-server", "/completion", ("ids", "text"), True, _llama_body, _sse(lambda: _llama_event)
        ),
        Dialect(
            "ollama",
            "/api/generate",
            ("text",),
            False,
            _ollama_body,
            _lines(_ollama_event),
            _ONLY_USAGE + _NO_IGNORE,
        ),
    )
}
"""By name."""
