"""A peer whose figures are known: it says which ids, when, and what goes wrong.

Options: start (seconds to load), first and gap (seconds it sleeps before its first id and each other one),
token (what it answers), more (ids beyond those asked for), claim (seconds it says it took), times (what it
says of each id), log (a file that gets a line per request: name, new ids, cold, its own CPU time, the
prompt), spin (a thread that never sleeps), child (a process that it starts), and do, from request ``at`` on:
``die``, ``hang``, ``refuse``, ``junk`` or ``leave`` (a child that keeps the pipe open, and die).
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from worker_protocol import Answer, Ids, Stream, serve


class Fake:
    def __init__(self, options: dict[str, Any]) -> None:
        self.options = options
        self.asked = 0
        if options.get("print"):
            print("a library that greets", flush=True)
        if options.get("load") == "fail":
            raise ValueError("no such weights")
        time.sleep(options.get("start", 0.0))
        if options.get("child"):
            subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        if options.get("spin"):
            threading.Thread(target=self._spin, daemon=True).start()
        self.about = {"versions": {"fake": options.get("version", "1")}, "notes": options.get("notes", [])}

    def run(self, ids: Ids, new: int, cold: bool) -> Answer:
        options = self.options
        if log := options.get("log"):
            with Path(log).open("a") as file:
                file.write(
                    f"{options['name']} {new} {cold} {time.process_time()} {' '.join(map(str, ids[0]))}\n"
                )
        self.asked += 1
        if options.get("do") and self.asked >= options.get("at", 1):
            self._misbehave(options["do"])
        stream = Stream(1)
        for index in range(new + options.get("more", 0)):
            time.sleep(options.get("gap", 0.0) if index else options.get("first", 0.0))
            stream.add(0, [options.get("token", 7)])
        answer = stream.answer()
        answer.seconds = options.get("claim", answer.seconds)
        if "times" in options:
            answer.times = options["times"]
        return answer

    def _misbehave(self, how: str) -> None:
        if how == "die":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(3)
        if how == "leave":
            if os.fork() == 0:
                time.sleep(600)
            os._exit(3)
        if how == "hang":
            time.sleep(600)
        if how == "refuse":
            raise RuntimeError("not this prompt")
        if how == "junk":
            print("junk", flush=True)

    def _spin(self) -> None:
        while True:
            self.asked += 0


if __name__ == "__main__":
    serve(Fake)
