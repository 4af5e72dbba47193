"""The server's log on stderr: a line for every answered request and for every turn of its life.

Never a body, a key or a query. An ASGI layer around everything else, which also gives requests
their ids and counts responses by route and status.
"""

import json
import logging
import secrets
import sys
import time
from datetime import UTC, datetime
from typing import Any

from localmistral.server.guard import REQUEST_ID, App, Message, Receive, Scope, Send
from localmistral.server.observing import Observer

OTHER = "other"
"""The path that unknown ones are counted under: whoever asks must not fill the memory."""
REQUEST_ID_HEADERS = ("x-request-id", "request-id")
"""Where OpenAI's and Anthropic's clients look for it, for a person to find the line of the log."""
MAX_PATH = 200
"""Characters of a path that are logged; none of ours is as long."""


def write_line(form: str, event: str, **fields: Any) -> None:
    """One line in `form`: nothing for off, `time event key=value ...` for text, or JSON."""
    if form == "off":
        return
    now = datetime.now(UTC).isoformat(timespec="milliseconds")
    if form == "json":
        line = json.dumps({"time": now, "event": event, **fields})
    else:
        # as JSON, so that no value can break the line or send a terminal commands
        values = [f"{name}={json.dumps(value)}" for name, value in fields.items()]
        line = " ".join([now, event, *values])
    sys.stderr.write(line + "\n")
    sys.stderr.flush()


class LogHandler(logging.Handler):
    """Writes what the program logs as lines of the same form."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self._form = form

    def emit(self, record: logging.LogRecord) -> None:
        fields = {"level": record.levelname.lower(), "message": record.getMessage()}
        if record.exc_info:
            fields["traceback"] = logging.Formatter().formatException(record.exc_info)
        write_line(self._form, "log", **fields)


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
        begun, status, number = time.monotonic(), 0, f"req_{secrets.token_hex(12)}"
        scope.setdefault("state", {})[REQUEST_ID] = number
        id_headers = [(name.encode(), number.encode()) for name in REQUEST_ID_HEADERS]

        async def send_noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message.get("headers", ()), *id_headers]}
            await send(message)

        try:
            await self._app(scope, receive, send_noting)
        finally:
            self._note(scope, status, time.monotonic() - begun)

    def _note(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in self._paths else OTHER
        self._observer.responses.labels(path=path, status=str(status)).inc()
        client = scope.get("client")
        write_line(
            self._form,
            "request",
            id=scope["state"][REQUEST_ID],
            client=client[0] if client else "",
            method=scope["method"],
            path=scope["path"][:MAX_PATH],
            status=status,
            seconds=round(seconds, 4),
        )
