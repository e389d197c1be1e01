"""LoRA adapters over HTTP: which one a request names, loading and unloading."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from mini_sglang.api.errors import RequestError
from mini_sglang.api.schemas import Field, Form, Text
from mini_sglang.backend.lora.files import MAX_NAME_CHARS, check_name
from mini_sglang.errors import InvalidValueError, shorten
from mini_sglang.types import Adapter

if TYPE_CHECKING:
    from mini_sglang.api.service import Service

logger = logging.getLogger(__name__)

MAX_PATH_CHARS = 1024
_NAME = Text(MAX_NAME_CHARS, 1)
LORA_FIELDS: Mapping[str, Field] = {
    "lora": Field(_NAME, "the name of a loaded LoRA adapter to run with", nullable=True),
    "lora_path": Field(_NAME, "sglang's name of lora", nullable=True),
}
LOAD = Form(
    {
        "lora_name": Field(_NAME, "what requests will call the adapter", required=True),
        "lora_path": Field(
            Text(MAX_PATH_CHARS, 1), "its folder, as PEFT saves it, within LORA_ROOT", required=True
        ),
    }
)
UNLOAD = Form({"lora_name": Field(_NAME, "the adapter's name", required=True)})


def chosen_adapter(service: Service, values: Mapping[str, Any]) -> Adapter | None:
    """The adapter that a request's ``lora`` or ``lora_path`` names; None where it names none.

    Raises:
        InvalidValueError: it is not loaded, or the two fields differ.
    """
    name = values.get("lora", values.get("lora_path"))
    if name is None:
        return None
    if values.get("lora_path", name) != name:
        raise InvalidValueError("lora_path", values["lora_path"], f"left out, or {name!r} as lora is")
    adapter = service.pool.adapters.find(name)
    if adapter is None:
        known = ", ".join(one.name for one in service.pool.adapters.all()) or "there is none"
        raise InvalidValueError("lora", name, f"the name of a loaded adapter ({known})")
    return adapter


def routes(service: Service, model_names: Sequence[str]) -> list[Route]:
    """The routes, at the paths of sglang and of vLLM.

    Args:
        model_names: names of the model itself, which no adapter may take.
    """

    async def load(request: Request) -> Response:
        _check_allowed(service)
        values = await service.read(LOAD, await request.body())
        name, root = values["lora_name"], service.settings.lora_root
        assert root is not None
        check_name(name)
        if name in model_names:
            raise InvalidValueError("lora_name", name, "a name other than the model's own")
        from mini_sglang.backend.lora.source import adapter_in

        adapter = await asyncio.to_thread(adapter_in, root, name, values["lora_path"])
        await asyncio.to_thread(service.pool.adapters.load, adapter)
        logger.info("loaded adapter=%s over HTTP", name)
        return _answer(service, f"The adapter {name} is loaded.")

    async def unload(request: Request) -> Response:
        _check_allowed(service)
        values = await service.read(UNLOAD, await request.body())
        name = values["lora_name"]
        running = service.pool.adapters.unload(name)
        logger.info("unloaded adapter=%s over HTTP", name)
        rest = f"; {running} of its requests go on to their end" if running else ""
        return _answer(service, f"The adapter {name} is unloaded{rest}.")

    return [
        Route(path, endpoint, methods=["POST"])
        for path, endpoint in (
            ("/load_lora_adapter", load),
            ("/unload_lora_adapter", unload),
            ("/v1/load_lora_adapter", load),
            ("/v1/unload_lora_adapter", unload),
        )
    ]


def _check_allowed(service: Service) -> None:
    if service.settings.lora_root is None:
        message = "Adapters are loaded and unloaded over HTTP only where LORA_ROOT names their folder."
        raise RequestError(403, "not_enabled", message)


def _answer(service: Service, message: str) -> Response:
    names = [adapter.name for adapter in service.pool.adapters.all()]
    body = {"success": True, "message": message, "loaded_adapters": names}
    return Response(msgspec.json.encode(body), media_type="application/json")


def unknown_model(service: Service, name: str) -> RequestError:
    """404 for a name that is neither the model's nor an adapter's."""
    served = [service.model_name, *(adapter.name for adapter in service.pool.adapters.all())]
    verb = "is" if len(served) == 1 else "are"
    shown = ", ".join(map(repr, served))
    message = f"The model {shorten(name)} is not served here; {shown} {verb}."
    return RequestError(404, "model_not_found", message, field="model")
