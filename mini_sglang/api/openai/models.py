"""Which model there is: ``/v1/models``, and the check of the name that a request gives."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mini_sglang.api.adapters import chosen_adapter, unknown_model
from mini_sglang.api.errors import RequestError
from mini_sglang.api.openai.calls import Format
from mini_sglang.api.openai.reasoning import CLOSE_TAG, OPEN_TAG
from mini_sglang.api.openai.tools import call_formats
from mini_sglang.errors import InvalidValueError, ModelLoadError

if TYPE_CHECKING:
    from mini_sglang.api.openai.door import Call
    from mini_sglang.api.service import Service
    from mini_sglang.config import Settings
    from mini_sglang.text.tokenizer import Tokenizer
    from mini_sglang.types import Adapter

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
    return names_of(service.model_name, service.settings)


def names_of(model_name: str, settings: Settings) -> tuple[str, ...]:
    """``served_names`` of a model yet to be served."""
    started = settings.model
    names = [model_name, started, started.rstrip("/").rpartition("/")[2]]
    return tuple(dict.fromkeys(name for name in names if name))


def check_model(service: Service, values: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a request names, as its ``model`` or beside it; None where the model is meant itself.

    Raises:
        RequestError: 404, a ``model`` that is not served here; no name is the one that is.
        InvalidValueError: an adapter that is not loaded, or two of them.
    """
    beside, name = chosen_adapter(service, values), values.get("model")
    if name is None or name in served_names(service):
        return beside
    adapter = service.pool.adapters.find(name)
    if adapter is None:
        raise unknown_model(service, name)
    if beside not in (None, adapter):
        raise InvalidValueError("model", name, "the model's own name where lora names another adapter")
    return adapter


def shown_name(service: Service, adapter: Adapter | None) -> str:
    """What an answer says that it was made by."""
    return service.model_name if adapter is None else adapter.name


def check_chat(service: Service) -> None:
    """Raises ModelLoadError where the model knows no chat."""
    if service.tokenizer.chat_template is None:
        raise ModelLoadError("The model has no chat template; use /v1/completions with a text.")


class Models:
    """The handlers of ``/v1/models`` and of ``/v1/embeddings``, which is refused."""

    def __init__(self, service: Service) -> None:
        self._service = service

    async def list(self, call: Call) -> dict[str, Any]:
        adapters = self._service.pool.adapters.all()
        return {"object": "list", "data": [self._model(), *map(self._adapter, adapters)]}

    async def get(self, call: Call) -> dict[str, Any]:
        adapter = check_model(self._service, {"model": call.path["name"]})
        return self._model() if adapter is None else self._adapter(adapter)

    async def embeddings(self, call: Call) -> dict[str, Any]:
        raise RequestError(400, "unsupported_endpoint", EMBEDDINGS_REASON)

    def _adapter(self, adapter: Adapter) -> dict[str, Any]:
        return self._model() | {"id": adapter.name, "parent": self._service.model_name}

    def _model(self) -> dict[str, Any]:
        return {
            "id": self._service.model_name,
            "object": "model",
            "created": int(self._service.started_at),
            "owned_by": "mini-sglang",
            "max_model_len": self._service.info.max_sequence_tokens,
        }
