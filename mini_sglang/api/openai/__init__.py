"""The OpenAI API: chats, completions, responses, models."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from starlette.routing import Route

    from mini_sglang.api.service import Service


def routes(service: Service) -> list[Route]:
    """The routes of this API over one service."""
    from mini_sglang.api.openai.chat import Chat
    from mini_sglang.api.openai.completions import Completions
    from mini_sglang.api.openai.door import route
    from mini_sglang.api.openai.forms import CHAT, COMPLETION, RESPONSE
    from mini_sglang.api.openai.models import Models
    from mini_sglang.api.openai.responses import Responses
    from mini_sglang.api.openai.store import ResponseStore

    models = Models(service)
    responses = Responses(service, ResponseStore(service.settings.responses_store_size))
    chat, completions = Chat(service), Completions(service)
    return [
        route(service, "POST", "/v1/chat/completions", chat.create, CHAT, prompt_field="messages"),
        route(service, "POST", "/v1/completions", completions.create, COMPLETION),
        route(service, "POST", "/v1/responses", responses.create, RESPONSE, prompt_field="input"),
        route(service, "GET", "/v1/responses/{id}", responses.get),
        route(service, "DELETE", "/v1/responses/{id}", responses.delete),
        route(service, "GET", "/v1/models", models.list),
        route(service, "GET", "/v1/models/{name:path}", models.get),
        route(service, "POST", "/v1/embeddings", models.embeddings),
    ]
