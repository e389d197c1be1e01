"""The process of a rank that follows: ``python -m mini_sglang.backend.parallel.follower_main``.

``followers.Followers`` starts it. Commands come in by standard input, which ends when the parent does,
whatever it died of; what it has to say goes out by standard output, lines for people by standard error.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import queue
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mini_sglang import logs
from mini_sglang.backend.openmp import sleeping_openmp
from mini_sglang.backend.parallel.wire import (
    Alive,
    Codec,
    Command,
    Failed,
    Hello,
    Join,
    Message,
    Ready,
    read_frame,
)
from mini_sglang.config import Settings
from mini_sglang.errors import MiniSglangError

if TYPE_CHECKING:
    from mini_sglang.backend.model_backend import ModelBackend
    from mini_sglang.backend.parallel.group import Group

logger = logging.getLogger("mini_sglang.backend.parallel.follower")

_HEARTBEAT = 0.5


class Outbox:
    """Standard output, for messages of any thread."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "wb")
        # What others print goes to standard error.
        os.dup2(2, 1)
        self._codec = Codec()
        self._lock = threading.Lock()

    def say(self, message: Message) -> None:
        with self._lock:
            self._out.write(self._codec.frame(message))
            self._out.flush()

    def beat(self) -> None:
        """Say that the process is not stopped, for ever."""
        while True:
            time.sleep(_HEARTBEAT)
            self.say(Alive())


class Inbox:
    """Standard input, read by a thread of its own so that its end is noticed in the midst of a step."""

    def __init__(self) -> None:
        self._arrived: queue.SimpleQueue[bytes] = queue.SimpleQueue()
        self._codec = Codec()
        self._folder: Path | None = None
        self._thread = threading.Thread(target=self._listen, name="mini-sglang-leader", daemon=True)
        self._thread.start()

    def next(self) -> Command:
        """Wait for the next command."""
        command = self._codec.command(self._arrived.get())
        if isinstance(command, Join):
            self._folder = Path(command.folder)
        return command

    def _listen(self) -> None:
        while (body := read_frame(sys.stdin.buffer)) is not None:
            self._arrived.put(body)
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        os._exit(0)


class Follower:
    """A rank while its model is loaded; see ``rank.Member``."""

    group: Group

    def __init__(self, join: Join, outbox: Outbox) -> None:
        import torch

        from mini_sglang.backend.device import choose_device
        from mini_sglang.backend.parallel.group import TorchGroup

        settings = Settings.resolve(dict(join.settings), {})
        device = choose_device(settings.device)
        if device.type == "cuda":
            torch.cuda.set_device(join.rank)
            device = torch.device("cuda", join.rank)
        outbox.say(Hello())
        self.settings = settings
        self.group = TorchGroup(join.rank, join.size, Path(join.folder), device, settings.step_timeout)

    def backend(self, *parts: Any, **more: Any) -> ModelBackend:
        from mini_sglang.backend.parallel.backend import FollowingBackend

        return FollowingBackend(*parts, **more)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mini_sglang.backend.parallel.follower_main")
    parser.add_argument("--rank", metavar="N/SIZE", help="which only the list of processes shows")
    options = parser.parse_args(arguments)
    for name in (signal.SIGINT, signal.SIGTERM):
        # A service manager's SIGTERM reaches every process; the parent decides then.
        signal.signal(name, signal.SIG_IGN)
    outbox, inbox = Outbox(), Inbox()
    try:
        join = inbox.next()
        assert isinstance(join, Join)
        logs.configure(str(join.settings.get("log_level", "warning")), f"rank {join.rank}")
        _follow(join, outbox, inbox)
    except MiniSglangError as error:
        outbox.say(Failed(str(error)))
    except BaseException as error:
        logger.debug("the rank ends", exc_info=True)
        who = str(options.rank).replace("/", " of ")
        outbox.say(Failed(f"rank {who} failed: {error!r:.200}"))
    # The group's own threads may wait for ranks that are gone.
    os._exit(1)


def _follow(join: Join, outbox: Outbox, inbox: Inbox) -> None:
    with sleeping_openmp():
        from mini_sglang.backend.loader import load_backend
        from mini_sglang.backend.parallel.backend import FollowingBackend

    gc.disable()
    follower = Follower(join, outbox)
    backend = load_backend(Path(join.path), follower.settings, sharing=join.sharing, member=follower)
    assert isinstance(backend, FollowingBackend)
    gc.freeze()
    gc.enable()
    threading.Thread(target=outbox.beat, name="mini-sglang-heartbeat", daemon=True).start()
    outbox.say(Ready())
    while True:
        backend.obey(inbox.next())


if __name__ == "__main__":
    sys.exit(main())
