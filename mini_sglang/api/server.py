"""The HTTP server as an ASGI app: ``create_app`` over a live service, ``Door`` for one yet to start."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.middleware.exceptions import ExceptionMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mini_sglang.api import adapters, native, openai, ops
from mini_sglang.api.connections import Connections
from mini_sglang.api.errors import RequestError
from mini_sglang.api.lifecycle import Ending
from mini_sglang.api.middleware import BodyReader, Envelope, ErrorTeller, Gate
from mini_sglang.api.openai.document import paths as openai_paths
from mini_sglang.api.openai.models import served_names
from mini_sglang.api.openapi import document
from mini_sglang.api.service import Service
from mini_sglang.api.starting import open_service
from mini_sglang.config import VERSION, Settings

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

logger = logging.getLogger(__name__)


def create_app(settings: Settings, service: Service, connections: Connections | None = None) -> Starlette:
    """The app over a service that runs.

    Raises:
        InvalidValueError: a setting of the server that cannot be used.
    """
    routes: list[Route] = [*native.routes(service), *openai.routes(service)]
    routes += adapters.routes(service, served_names(service))
    routes += ops.routes(service, document(VERSION, openai_paths()))
    route_of: dict[Callable[..., Any], str] = {route.endpoint: route.path for route in routes}
    middleware = [
        Middleware(
            Envelope,
            metrics=service.metrics,
            connections=connections or Connections(),
            route_of=route_of,
            write_timeout=settings.write_timeout,
        )
    ]
    origins = [origin.strip() for origin in (settings.cors_origins or "").split(",") if origin.strip()]
    if origins:
        middleware.append(
            Middleware(
                CORSMiddleware,
                allow_origins=origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["*"],
                expose_headers=["x-request-id", "retry-after"],
            )
        )
    middleware += [
        Middleware(ErrorTeller),
        Middleware(Gate, api_key=settings.api_key, allowed_hosts=settings.allowed_hosts),
        Middleware(BodyReader, max_bytes=settings.max_body_bytes, timeout=settings.read_timeout),
    ]
    app = _App(routes=routes, middleware=middleware, exception_handlers={HTTPException: _http_error})
    # A redirect would be built from the Host header.
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class _App(Starlette):
    """Starlette without its outermost layer, which would hide the server's ``send`` from ``Connections``."""

    def build_middleware_stack(self) -> ASGIApp:
        app: ASGIApp = ExceptionMiddleware(self.router, handlers=self.exception_handlers)
        for middleware, arguments, options in reversed(self.user_middleware):
            app = middleware(app, *arguments, **options)
        return app


class Door:
    """An ASGI app that loads the model when the server starts it, and serves once that is done.

    Args:
        settings: resolved from the environment at the start where not given.
        notify: called with a line for each stage of the start.
        started: called with the service once it takes requests.

    Attributes:
        failure: why the start failed, as a sentence.
    """

    def __init__(
        self,
        settings: Settings | None = None,
        *,
        notify: Callable[[str], None] | None = None,
        started: Callable[[Service], None] | None = None,
    ) -> None:
        self._settings = settings
        self._notify = notify or _silent
        self._started = started
        self._app: Starlette | None = None
        self.failure: str | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
        elif self._app is None:
            raise RuntimeError("the server was started without its lifespan events (--lifespan off)")
        else:
            await self._app(scope, receive, send)

    async def _live(self, receive: Receive, send: Send) -> None:
        await receive()
        service: Service | None = None
        ending: Ending | None = None
        try:
            settings = self._settings or _from_environment()
            service = await open_service(settings, self._notify)
            connections = Connections()
            self._app = create_app(settings, service, connections)
            ending = Ending(service, connections)
            ending.install()
            if self._started is not None:
                self._started(service)
        except Exception as error:
            logger.debug("the start failed", exc_info=True)
            if service is not None:
                await service.close()
            self.failure = str(error) or type(error).__name__
            await send({"type": "lifespan.startup.failed", "message": self.failure})
            return
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await ending.wait()
        await service.close()
        ending.restore()
        await send({"type": "lifespan.shutdown.complete"})


def _from_environment() -> Settings:
    from mini_sglang import logs

    settings = Settings.resolve(env=os.environ)
    logs.configure(settings.log_level)
    return settings


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's own refusals, which are those of its router, in our shape."""
    assert isinstance(error, HTTPException)
    path = request.scope["path"][:200]
    if error.status_code == 404:
        raise RequestError(404, "not_found", f"There is nothing at {path!r}.")
    if error.status_code == 405:
        allow = (error.headers or {}).get("Allow", "")
        message = f"{path} does not take {request.method[:20]}; it takes {allow}."
        raise RequestError(405, "method_not_allowed", message, allow=allow)
    raise RequestError(error.status_code, "http_error", str(error.detail)[:200])


def _silent(line: str) -> None:
    """The default ``notify``."""
