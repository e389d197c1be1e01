"""``mini-sglang serve``: the HTTP server."""

from __future__ import annotations

import gc
import json
import logging
import socket
from argparse import Namespace
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from mini_sglang.cli import args
from mini_sglang.cli.face import EngineFace
from mini_sglang.cli.terminal import Terminal
from mini_sglang.config import Settings
from mini_sglang.errors import InvalidValueError, MiniSglangError

if TYPE_CHECKING:
    from mini_sglang.api.service import Service

_BACKLOG = 2048
_SEND_BUFFER = 256 << 10


def run(options: Namespace, terminal: Terminal, open_engine: Callable[[], EngineFace]) -> int:
    """Serve until told to end; returns the exit status.

    Raises:
        MiniSglangError: a bad setting, a port that is taken, a model that cannot be had.
    """
    import uvicorn

    from mini_sglang.api.protocol import PatientProtocol
    from mini_sglang.api.server import Door

    settings = Settings.resolve(args.chosen_settings(options))
    # Before any model is loaded: a port that is taken should not be found out a minute later.
    listener = _listen(settings)

    # Of a start that fails this command tells itself, in one sentence.
    uvicorn_log = logging.getLogger("uvicorn.error")
    uvicorn_log.setLevel(logging.CRITICAL)

    def started(service: Service) -> None:
        # What is there by now stays: no use looking for garbage in it while requests wait.
        gc.freeze()
        gc.enable()
        uvicorn_log.setLevel(logging.WARNING)
        terminal.notice(banner(service, listener))

    door = Door(settings, notify=terminal.notice, started=started)
    config = uvicorn.Config(
        door,
        log_config=None,
        access_log=False,
        # h11's, which bounds the size of headers.
        http=cast("Any", partial(PatientProtocol, head_timeout=settings.read_timeout)),
        ws="none",
        lifespan="on",
        server_header=False,
        backlog=_BACKLOG,
        timeout_keep_alive=30,
    )
    server = uvicorn.Server(config)
    gc.disable()
    try:
        server.run(sockets=[listener])
    except SystemExit:
        if door.failure is None:
            raise
        raise MiniSglangError(door.failure) from None
    finally:
        gc.enable()
        listener.close()
    return 0


def banner(service: Service, listener: socket.socket) -> str:
    """What is served, where, and a line to try."""
    told = dict(service.info.description)
    host, port = listener.getsockname()[:2]
    shown_host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)
    url = f"http://{shown_host}:{port}"
    key = ' -H "Authorization: Bearer $API_KEY"' if service.settings.api_key else ""
    chat = service.tokenizer.chat_template is not None
    prompt = {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Once upon a time"}
    body = json.dumps({**prompt, "stream": True, "max_new_tokens": 64})
    engines = len(service.pool.stats().engines)
    skipped = ("model", "source", "device", "dtype")
    rest = "  ".join(f"{name} {value}" for name, value in told.items() if name not in skipped)
    return "\n".join(
        [
            f"  model    {service.model_name} ({told.get('source', 'local')})",
            f"  device   {told.get('device', '?')}  dtype {told.get('dtype', '?')}  {rest}".rstrip(),
            f"  engines  {engines}, each in a {service.settings.engine_isolation} of its own, "
            f"{service.settings.scheduler_mode}; {service.info.kv_tokens} KV tokens each, "
            f"context {service.info.context_length}",
            f"  serving  {url}  (Ctrl-C ends it)",
            f"  try      curl -N {url}/generate -H 'Content-Type: application/json'{key} -d '{body}'",
        ]
    )


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # The protocol is named because asyncio turns Nagle's algorithm off only where it is: without that a token
    # waits for the client's delayed acknowledgement of the last one, up to 40 ms.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # As much as a reader may be behind before its stream waits; the system's own limit is megabytes.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        listener.bind((settings.host, settings.port))
    except OSError as error:
        listener.close()
        where = f"{settings.host} port {settings.port}"
        raise MiniSglangError(f"The server cannot listen at {where}: {error.strerror or error}.") from None
    except OverflowError:
        listener.close()
        raise InvalidValueError("PORT", settings.port, "a free port") from None
    listener.setblocking(False)
    return listener
