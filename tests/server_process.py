"""`localmistral serve` as a process of its own for tests, and `localmistral run` beside it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

COMMAND = (sys.executable, "-m", "localmistral")
TIMEOUT_S = 120
"""Generous: several suites may share a few cores."""


def make_environ(home: Path) -> dict[str, str]:
    """An environment in which servers are looked for, and kept, under `home` only."""
    kept = {k: v for k, v in os.environ.items() if k != "LOCALMISTRAL_NO_SERVER"}
    places = {name: str(home) for name in ("XDG_STATE_HOME", "LOCALAPPDATA")}
    return {**kept, **places}


def run(home: Path, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """`localmistral run` to its end."""
    command = [*COMMAND, "run", *map(str, arguments)]
    given: dict[str, Any] = {} if "input" in options else {"stdin": subprocess.DEVNULL}
    return subprocess.run(
        command, capture_output=True, encoding="utf-8", timeout=TIMEOUT_S,
        env=make_environ(home), **given, **options,
    )  # fmt: skip


@dataclass(slots=True, kw_only=True)
class ServerProcess:
    """A server that was started; `url` is empty until it has said where it listens."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def said(self) -> str:
        return self.log.read_text(encoding="utf-8")

    def events(self) -> list[dict[str, Any]]:
        """The lines of the log so far, every one of which has to be JSON."""
        whole = self.said().rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first line of the log of that kind."""
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            found = [line for line in self.events() if line["event"] == event]
            if found:
                return found[0]
            if self.process.poll() is not None:
                break
            time.sleep(0.005)
        raise AssertionError(f"no {event!r} in the log: {self.said()}")

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(TIMEOUT_S)


@contextlib.contextmanager
def launch(
    home: Path, *arguments: str | Path, log: str = "json", is_ready: bool = True
) -> Iterator[ServerProcess]:
    """A server on a free port while the block lasts; in it, it listens and, unless told
    otherwise, is ready."""
    home.mkdir(parents=True, exist_ok=True)
    path = home / f"server-{time.monotonic_ns()}.log"
    command = [*COMMAND, "serve", "--port", "0", "--log", log, *map(str, arguments)]
    with path.open("wb") as file:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=make_environ(home)
        )
    server = ServerProcess(process=process, log=path)
    try:
        if log == "json":
            server.url = server.wait_for("listening")["url"]
            if is_ready:
                server.wait_for("ready")
        yield server
    finally:
        process.kill()
        process.wait()


def connect(server: ServerProcess, **options: Any) -> httpx2.Client:
    return httpx2.Client(base_url=server.url, timeout=TIMEOUT_S, **options)


def count_answers(http: httpx2.Client) -> int:
    """How many answers the server has given to `run`."""
    key = 'localmistral_http_responses_total{path="/local/stream",status="200"} '
    lines = http.get("/metrics").text.splitlines()
    return int(float(next((ln[len(key) :] for ln in lines if ln.startswith(key)), "0")))
