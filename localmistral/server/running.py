"""A server's life: bind, load, listen, drain, end.

HTTP runs on a thread of its own; the main thread loads, and then waits for a signal, so that
Ctrl-C works in every phase. Knows nothing of routes, and prints nothing.
"""

import contextlib
import errno
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from localmistral.errors import LocalMistralError
from localmistral.server.app import create_app
from localmistral.server.serving import Serving
from localmistral.server.settings import ServerSettings
from localmistral.session import Chat

_POLL_S = 0.2
"""How often the main thread looks up from waiting: Windows delivers signals only then."""
_GRACE_S = 5.0
"""For connections to close once their answers have ended or were cut."""
EXIT_FORCED = 1


def bind(settings: ServerSettings) -> tuple[socket.socket, ServerSettings]:
    """A listening socket, and the settings with the port it really has (0 chooses one).

    Raises LocalMistralError when the address can't be had.
    """
    host = settings.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        bound = socket.create_server((host, settings.port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        raise _explain(error, settings) from error
    return bound, replace(settings, port=bound.getsockname()[1])


def _explain(error: OSError | OverflowError, settings: ServerSettings) -> LocalMistralError:
    where = f"{settings.host}:{settings.port}"
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return LocalMistralError(
            f"Port {settings.port} of {settings.host} is in use by another program.",
            f"Take another one: localmistral serve --port {settings.port + 1}",
        )
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return LocalMistralError(
            f"Port {settings.port} needs rights this user doesn't have.",
            "Take one above 1023: localmistral serve --port 8080",
        )
    reason = getattr(error, "strerror", None) or str(error)
    return LocalMistralError(f"{where} can't be listened on: {reason}.")


class RunningServer:
    """uvicorn on a thread, serving `serving` on a socket that is bound already."""

    def __init__(self, serving: Serving, settings: ServerSettings, bound: socket.socket) -> None:
        self.serving = serving
        self.settings = settings
        config = uvicorn.Config(
            create_app(serving, settings),
            log_config=None,
            access_log=False,
            lifespan="off",
            server_header=False,
            timeout_graceful_shutdown=int(settings.drain_s),
            timeout_keep_alive=30,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [bound]}, name="localmistral-http"
        )
        self._thread.daemon = True

    def start(self) -> None:
        self._thread.start()

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Refuse what is new, let running answers end or cut them after `drain_s`; then return."""
        self.serving.is_draining = True
        self._server.should_exit = True
        deadline = self.settings.drain_s + _GRACE_S
        while self._thread.is_alive() and deadline > 0:
            self._thread.join(_POLL_S)
            deadline -= _POLL_S


def serve(
    load: Callable[[Callable[[float], None]], Chat],
    settings: ServerSettings,
    *,
    on_ready: Callable[[Chat, ServerSettings], Any],
) -> int:
    """Bind, load with `load` (which gets a callback for 0.0-1.0), serve until a signal comes.

    Returns the exit code: 0 after SIGTERM, 130 after Ctrl-C. A second signal ends the process at
    once. Raises LocalMistralError when the port is taken or the load fails.
    """
    bound, settings = bind(settings)
    with contextlib.closing(bound), _Signals() as signals:
        serving = Serving()
        server = RunningServer(serving, settings, bound)
        server.start()
        try:
            with signals.raised():
                chat = load(lambda done: setattr(serving, "progress", done))
            with chat:
                serving.chat = chat
                on_ready(chat, settings)
                while server.is_running and not signals.stop.wait(_POLL_S):
                    continue
                server.stop()
        except KeyboardInterrupt:
            return signals.exit_code
        except LocalMistralError as error:
            serving.failure = error
            raise
        finally:
            server.stop()
    return signals.exit_code


class _Signals:
    """Turns the first SIGTERM or Ctrl-C into `stop`, and lets the second end the process."""

    def __init__(self) -> None:
        self.stop = threading.Event()
        self.exit_code = 0
        self._is_raised = False
        self._old: dict[int, Any] = {}

    def __enter__(self) -> "_Signals":
        for number in _numbers():
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """In this block a signal is a KeyboardInterrupt too: nobody looks at `stop` meanwhile."""
        self._is_raised = True
        try:
            yield
        finally:
            self._is_raised = False

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        if self.stop.is_set():
            os._exit(EXIT_FORCED)
        self.exit_code = 130 if number == signal.SIGINT else 0
        self.stop.set()
        if self._is_raised:
            raise KeyboardInterrupt


def _numbers() -> Iterator[int]:
    yield signal.SIGINT
    yield signal.SIGTERM
    if sys.platform == "win32":
        yield signal.SIGBREAK
