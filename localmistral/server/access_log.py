"""A line for every answered request, on stderr; never a body, a key or a query.

An ASGI layer around everything else. Also counts responses by route and status.
"""

import json
import sys
import time
from datetime import UTC, datetime

from localmistral.server.guard import App, Message, Receive, Scope, Send
from localmistral.server.observing import Observer

OTHER = "other"
"""The path that unknown ones are counted under: whoever asks must not fill the memory."""


class AccessLog:
    """Wraps `app`; `form` is off, text or json."""

    def __init__(self, app: App, observer: Observer, form: str, paths: frozenset[str]) -> None:
        self._app = app
        self._observer = observer
        self._form = form
        self._paths = paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        begun, status = time.monotonic(), 0

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else OTHER
        self._observer.responses.labels(path=path, status=str(status)).inc()
        if self._form == "off":
            return
        client = scope.get("client")
        line = {
            "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "client": client[0] if client else "",
            "method": scope["method"],
            "path": scope["path"],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if self._form == "json":
            sys.stderr.write(json.dumps(line) + "\n")
        else:
            shown = {**line, "path": json.dumps(line["path"])[1:-1]}
            sys.stderr.write(
                "{time} {client} {method} {path} {status} {seconds}s\n".format(**shown)
            )
        sys.stderr.flush()
