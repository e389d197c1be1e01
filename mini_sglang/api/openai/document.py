"""The part of the OpenAPI document about the OpenAI API, from the forms that check the requests."""

from __future__ import annotations

from typing import Any

from mini_sglang.api.adapters import LOAD, UNLOAD
from mini_sglang.api.openai.forms import CHAT, COMPLETION, RESPONSE
from mini_sglang.api.schemas import Form

_ERROR = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type", "param", "code"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}


def paths() -> dict[str, Any]:
    return {
        "/v1/chat/completions": {"post": _post("Answer a chat", CHAT)},
        "/v1/completions": {"post": _post("Continue a text", COMPLETION)},
        "/v1/responses": {"post": _post("Answer, and keep the conversation", RESPONSE)},
        "/v1/responses/{id}": {
            "get": _plain("A response that was kept", "id", 404),
            "delete": _plain("Forget a response", "id", 404),
        },
        "/v1/models": {"get": _plain("The model")},
        "/v1/models/{name}": {"get": _plain("The model", "name", 404)},
        "/v1/load_lora_adapter": {"post": _post("Load a LoRA adapter", LOAD, 403)},
        "/v1/unload_lora_adapter": {"post": _post("Unload a LoRA adapter", UNLOAD, 403)},
        "/v1/embeddings": {"post": _embeddings()},
    }


def _post(summary: str, form: Form, *statuses: int) -> dict[str, Any]:
    events = {"text/event-stream": {"schema": {"type": "string"}}}
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": form.schema()}}},
        "responses": {
            "200": {"description": "done", "content": _json({"type": "object"}) | events},
            **_errors(*statuses, 400, 401, 404, 408, 413, 415, 429, 431, 500, 503, 504),
        },
    }


def _plain(summary: str, parameter: str | None = None, *statuses: int) -> dict[str, Any]:
    found: dict[str, Any] = {
        "summary": summary,
        "responses": {
            "200": {"description": "done", "content": _json({"type": "object"})},
            **_errors(400, 401, 431, *statuses),
        },
    }
    if parameter is not None:
        text = {"type": "string", "minLength": 1}
        found["parameters"] = [{"name": parameter, "in": "path", "required": True, "schema": text}]
    return found


def _embeddings() -> dict[str, Any]:
    body = {"required": True, "content": _json({"type": "object"})}
    return {
        "summary": "Refused: the server makes no embeddings",
        "requestBody": body,
        "responses": _errors(400, 401, 408, 413, 415, 431),
    }


def _errors(*statuses: int) -> dict[str, Any]:
    return {str(status): {"description": "refused", "content": _json(_ERROR)} for status in statuses}


def _json(schema: dict[str, Any]) -> dict[str, Any]:
    return {"application/json": {"schema": schema}}
