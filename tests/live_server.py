"""A real server on loopback for tests: uvicorn on a thread, with a real model behind it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import httpx2

from localmistral.engine import EngineSettings
from localmistral.server.running import RunningServer, bind
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings
from localmistral.session import Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveServer:
    """Where it listens and what it serves."""

    url: str
    chat: Chat
    serving: Serving
    http: httpx2.Client

    @property
    def base(self) -> str:
        """What OpenAI's clients take as base_url."""
        return f"{self.url}/v1"


@contextlib.contextmanager
def serve_live(serving: Serving, settings: ServerSettings | None = None) -> Iterator[httpx2.Client]:
    """A server for `serving` while the block lasts; a client that talks to it."""
    bound, settings = bind(settings or ServerSettings(port=0, drain_s=1))
    with contextlib.closing(bound):
        server = RunningServer(serving, settings, bound)
        server.start()
        try:
            with httpx2.Client(base_url=settings.url, timeout=120) as http:
                yield http
        finally:
            server.stop()


@contextlib.contextmanager
def serve_model(
    name: str, engine: EngineSettings, settings: ServerSettings | None = None
) -> Iterator[LiveServer]:
    """A server for the model `name` while the block lasts."""
    with Chat.load(name, engine) as chat:
        serving = Serving(chat=chat)
        with serve_live(serving, settings) as http:
            url = str(http.base_url).rstrip("/")
            yield LiveServer(url=url, chat=chat, serving=serving, http=http)
