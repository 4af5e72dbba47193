"""HTTP on one connection: uvicorn's, with errors that are JSON and clients that must not dawdle.

What is no HTTP never reaches the application, so it is answered here. Knows nothing of routes.
"""

import asyncio
import contextlib
import json
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from localmistral.server.errors import describe_status

HEAD_TIMEOUT_S = 30.0
"""From the first byte of a request (or the connection) to the end of its head: nginx allows 60, a
client on the same machine or network needs milliseconds. Whoever opens connections and sends
nothing, or a byte a second, would hold a file each for ever."""
BODY_TIMEOUT_S = 60.0
"""Between two pieces of a body, as in nginx: an upload over a bad line may stall for a while."""


class HttpProtocol(H11Protocol):
    """One connection; h11 also where a faster parser is installed, so that all servers refuse the
    same requests."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._wait(HEAD_TIMEOUT_S)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        state = self.conn.their_state
        if state is h11.SEND_BODY:
            self._wait(BODY_TIMEOUT_S)
        elif state is not h11.IDLE:
            self._stop_waiting()
        elif self._timer is None:  # not anew: many small pieces must not last for ever
            self._wait(HEAD_TIMEOUT_S)

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """The server ends: a request that has not come in whole counts as a new one."""
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(503, "The server is shutting down. Send the request to another one.")
        else:
            super().shutdown()

    def send_400_response(self, msg: str) -> None:  # noqa: ARG002  (uvicorn's words say nothing)
        """Called while h11's error is handled, which knows the reason and the status."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        self._refuse(status, f"This is no valid HTTP request: {error}.")

    def _wait(self, seconds: float) -> None:
        self._stop_waiting()
        self._timer = self.loop.call_later(seconds, self._give_up)

    def _stop_waiting(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _give_up(self) -> None:
        if self.conn.their_state is h11.SEND_BODY:
            self._refuse(408, f"Nothing more of the body came for {BODY_TIMEOUT_S:g} s.")
        else:
            self.transport.close()  # there is no request that could be answered

    def _refuse(self, status: int, message: str) -> None:
        """An error object, unless an answer has begun already; then the connection ends."""
        failure = describe_status(status, message)
        body = json.dumps(failure.to_openai()).encode()
        headers = {
            "content-type": "application/json",
            "content-length": str(len(body)),
            "connection": "close",
            **failure.headers,
        }
        response = h11.Response(status_code=status, headers=list(headers.items()))
        with contextlib.suppress(h11.LocalProtocolError):
            for event in (response, h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()
