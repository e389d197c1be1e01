"""Which model there is: ``/v1/models``, and the check of the name that a request gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mini_sglang.api.errors import RequestError
from mini_sglang.api.openai.calls import Format
from mini_sglang.api.openai.reasoning import CLOSE_TAG, OPEN_TAG
from mini_sglang.api.openai.tools import call_formats
from mini_sglang.errors import InvalidValueError, ModelLoadError, shorten

if TYPE_CHECKING:
    from mini_sglang.api.openai.door import Call
    from mini_sglang.api.service import Service
    from mini_sglang.text.tokenizer import Tokenizer

EMBEDDINGS_REASON = (
    "This server generates text and makes no embeddings: a decoder's hidden states are no good measure of "
    "likeness without training for it. Use an embedding model's own server."
)


@dataclass(frozen=True, slots=True)
class Traits:
    """What a model's chat template and vocabulary tell of it.

    Attributes:
        thinks: whether it may write ``<think>…</think>``.
        formats: how it writes tool calls.
        takes_tools: whether its template shows the model any tools.
        takes_developer: whether its template knows that role.
        variables: of ``enable_thinking``, ``thinking`` and ``reasoning_effort``, those its template reads.
    """

    thinks: bool
    formats: tuple[Format, ...]
    takes_tools: bool
    takes_developer: bool
    variables: frozenset[str]

    def template_kwargs(self, values: Mapping[str, Any], effort: str | None) -> dict[str, Any]:
        """Variables for the template: the request's own, and its reasoning effort in the model's terms.

        Raises:
            InvalidValueError: an effort for a model that has none.
        """
        kwargs = dict(values.get("chat_template_kwargs", {}))
        if effort is None:
            return kwargs
        switch = sorted(self.variables & {"enable_thinking", "thinking"})
        if "reasoning_effort" in self.variables:
            kwargs.setdefault("reasoning_effort", effort)
        elif effort == "none" and switch:
            kwargs.setdefault(switch[0], False)
        elif not switch:
            raise InvalidValueError(
                "reasoning_effort", effort, "left out: this model's chat template has no such setting"
            )
        else:
            raise InvalidValueError("reasoning_effort", effort, "none, or left out, for this model")
        return kwargs


def traits_of(tokenizer: Tokenizer) -> Traits:
    template = tokenizer.chat_template
    source = "" if template is None else "\n".join(template.sources.values())
    one_token = len(tokenizer.encode(OPEN_TAG, add_special=False)) == 1
    return Traits(
        thinks=one_token or OPEN_TAG in source or CLOSE_TAG in source,
        formats=call_formats(source),
        takes_tools="tools" in source,
        takes_developer="developer" in source,
        variables=frozenset(
            name for name in ("enable_thinking", "thinking", "reasoning_effort") if name in source
        ),
    )


def served_names(service: Service) -> tuple[str, ...]:
    """What the model may be called: the served name, the name it was started with, and its last part."""
    started = service.settings.model
    names = [service.model_name, started, started.rstrip("/").rpartition("/")[2]]
    return tuple(dict.fromkeys(name for name in names if name))


def check_model(service: Service, name: str | None) -> None:
    """Raises RequestError (404) for a model that is not served here; no name is the one that is."""
    if name is not None and name not in served_names(service):
        raise RequestError(
            404,
            "model_not_found",
            f"The model {shorten(name)} is not served here; {service.model_name!r} is.",
            field="model",
        )


def check_chat(service: Service) -> None:
    """Raises ModelLoadError where the model knows no chat."""
    if service.tokenizer.chat_template is None:
        raise ModelLoadError("The model has no chat template; use /v1/completions with a text.")


class Models:
    """The handlers of ``/v1/models`` and of ``/v1/embeddings``, which is refused."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, call: Call) -> dict[str, Any]:
        return {"object": "list", "data": [self._model()]}

    async def get(self, call: Call) -> dict[str, Any]:
        check_model(self._service, call.path["name"])
        return self._model()

    async def embeddings(self, call: Call) -> dict[str, Any]:
        raise RequestError(400, "unsupported_endpoint", EMBEDDINGS_REASON)

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": int(self._service.started_at),
            "owned_by": "mini-sglang",
            "max_model_len": self._service.info.max_sequence_tokens,
        }
