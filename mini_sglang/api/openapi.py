"""The OpenAPI document, from the same tables that check the requests."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mini_sglang.api.adapters import LOAD, UNLOAD
from mini_sglang.api.native import DETOKENIZE, GENERATE, TOKENIZE
from mini_sglang.api.schemas import Form

_OBJECT: Mapping[str, Any] = {"type": "object"}


def document(version: str, extra_paths: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """OpenAPI 3.1; ``extra_paths`` are those of another API."""
    paths = {
        "/generate": {"post": _post("Generate text", GENERATE, "application/x-ndjson", "text/event-stream")},
        "/tokenize": {"post": _post("Text to token ids", TOKENIZE)},
        "/detokenize": {"post": _post("Token ids to text", DETOKENIZE)},
        "/load_lora_adapter": {"post": _post("Load a LoRA adapter", LOAD, refused=403)},
        "/unload_lora_adapter": {"post": _post("Unload a LoRA adapter", UNLOAD, refused=403)},
        "/health": {"get": _get("Whether the server is alive, and each engine's state", key=False)},
        "/ready": {"get": _get("Whether a request would be served", key=False)},
        "/metrics": {"get": _get_metrics()},
        "/openapi.json": {"get": _get("This document")},
        **(extra_paths or {}),
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "mini-sglang", "version": version},
        "paths": paths,
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {
                "Error": {
                    "type": "object",
                    "required": ["error"],
                    "properties": {
                        "error": {
                            "type": "object",
                            "required": ["code", "message"],
                            "properties": {
                                "code": {"type": "string"},
                                "message": {"type": "string"},
                                "field": {"type": "string"},
                                "request_id": {"type": "string"},
                            },
                        }
                    },
                }
            },
        },
        "security": [{"key": []}, {}],
    }


def _post(summary: str, form: Form, *streamed: str, refused: int = 400) -> dict[str, Any]:
    return {
        "summary": summary,
        "requestBody": {"required": True, "content": {"application/json": {"schema": form.schema()}}},
        "responses": {
            "200": {
                "description": "done",
                "content": {
                    "application/json": {"schema": dict(_OBJECT)},
                    **{kind: {"schema": {"type": "string"}} for kind in streamed},
                },
            },
            **errors(400, refused, 401, 408, 413, 415, 429, 431, 500, 503, 504),
        },
    }


def _get(summary: str, *, key: bool = True) -> dict[str, Any]:
    answer = {"description": "done", "content": {"application/json": {"schema": dict(_OBJECT)}}}
    found = {
        "summary": summary,
        "responses": {"200": answer, "503": answer, **errors(*((400, 401, 431) if key else (400, 431)))},
    }
    return found if key else found | {"security": []}


def _get_metrics() -> dict[str, Any]:
    found = _get("Counters, gauges and histograms")
    found["responses"]["200"]["content"]["text/plain"] = {"schema": {"type": "string"}}
    form = {"type": "string", "enum": ["json", "prometheus"]}
    found["parameters"] = [{"name": "format", "in": "query", "required": False, "schema": form}]
    return found


def errors(*statuses: int) -> dict[str, Any]:
    """Responses of those statuses, in the native API's shape."""
    schema = {"$ref": "#/components/schemas/Error"}
    return {
        str(status): {"description": "refused", "content": {"application/json": {"schema": schema}}}
        for status in statuses
    }
