"""What the people who run the server ask it: ``/health``, ``/ready``, ``/metrics``, ``/openapi.json``."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mini_sglang.api.errors import RequestError
from mini_sglang.api.metrics import PROMETHEUS_TYPE, as_json, as_prometheus
from mini_sglang.api.service import Service
from mini_sglang.errors import UnavailableError

_ALIVE = ("starting", "ready")


def routes(service: Service, document: Mapping[str, Any]) -> list[Route]:
    """The routes; ``document`` is the OpenAPI one."""

    async def health(request: Request) -> Response:
        """200 while an engine is alive or being started, 503 when none is."""
        stats = service.pool.stats()
        alive = any(engine.state in _ALIVE for engine in stats.engines)
        body = {
            "status": "ok" if alive else "down",
            "state": "draining" if service.draining else stats.state,
            "model": service.model_name,
            "uptime_seconds": round(time.time() - service.started_at, 3),
            "engines": [
                {"engine": engine.index, "state": engine.state, "restarts": engine.restarts}
                for engine in stats.engines
            ],
        }
        return _json(body, 200 if alive else 503)

    async def ready(request: Request) -> Response:
        """200 where a request sent now would be served: an engine is ready, and made a token at its start."""
        return _json({"ready": service.ready}, 200 if service.ready else 503)

    async def metrics(request: Request) -> Response:
        pool = service.pool.stats()
        implementation = _implementation(service)
        if _wants_json(request):
            info = service.info
            extra = {
                "model": service.model_name,
                "implementation": implementation,
                "uptime_seconds": round(time.time() - service.started_at, 3),
            }
            extra |= {"kv_tokens": info.kv_tokens, "context_length": info.context_length}
            return _json(as_json(service.metrics, pool, extra))
        text = as_prometheus(service.metrics, pool, service.model_name, implementation)
        return Response(text, headers={"content-type": PROMETHEUS_TYPE})

    async def openapi(request: Request) -> Response:
        return _json(document)

    return [
        Route("/health", health, methods=["GET"]),
        Route("/ready", ready, methods=["GET"]),
        Route("/metrics", metrics, methods=["GET"]),
        Route("/openapi.json", openapi, methods=["GET"]),
    ]


def _implementation(service: Service) -> str:
    """How the model is run; empty while it is still loading."""
    try:
        return str(service.info.description.get("implementation", ""))
    except UnavailableError:
        return ""


def _wants_json(request: Request) -> bool:
    chosen = request.query_params.get("format")
    if chosen is None:
        return "application/json" in request.headers.get("accept", "")
    if chosen not in ("json", "prometheus"):
        message = f"format is {chosen[:100]!r}; it must be json or prometheus."
        raise RequestError(400, "invalid_value", message, field="format")
    return chosen == "json"


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")
