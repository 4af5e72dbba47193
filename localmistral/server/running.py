"""A server's life: bind, load, listen, drain, end.

HTTP runs on a thread of its own; the main thread loads, and then waits for a signal, so that
Ctrl-C works in every phase. Knows nothing of routes, and prints nothing but its log.
"""

import contextlib
import errno
import logging
import math
import os
import secrets
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import FrameType
from typing import Any

import uvicorn

from localmistral.errors import LocalMistralError
from localmistral.fit.plan import Plan
from localmistral.fit.plan_json import plan_to_json
from localmistral.server.access_log import LogHandler, write_line
from localmistral.server.app import create_app
from localmistral.server.protocol import HttpProtocol
from localmistral.server.runtime_file import ServerRecord, machine_name, published
from localmistral.server.serving import Serving, name_model
from localmistral.server.settings import MAX_PORT, ServerSettings
from localmistral.session import Chat

_POLL_S = 0.2
"""How often the main thread looks up from waiting: Windows delivers signals only then."""
_STARTING_POLL_S = 0.005
_GRACE_S = 5.0
"""For connections to close once their answers have ended or were cut."""
SWITCH_INTERVAL_S = 0.001
"""How long a thread may keep the interpreter from another that waits for it. The engine's asks for
it several times a token; with Python's 5 ms, four streams beside one busy thread gave 46 tokens/s
where 1 ms gave 51 and half of that 53 (SmolLM2 on two cores)."""
MAX_FILES = 10_240
"""Open files to ask the system for, each connection being one: the most that macOS grants. Its
usual 256, or Linux's 1,024, would be used up by clients that only keep their connections."""
EXIT_FORCED = 1
_PLAN_SUMMARY = (
    "quant", "kv_type", "gpu_layers", "tensor_split", "cpu_expert_layers", "devices", "predicted",
)  # fmt: skip


def bind(settings: ServerSettings) -> tuple[socket.socket, ServerSettings]:
    """A listening socket, and the settings with the port it really has (0 chooses one).

    Raises LocalMistralError when the address can't be had.
    """
    host = settings.host.strip("[]")
    try:
        family = _find_family(host)
        bound = socket.create_server(
            (host, settings.port),
            family=family,
            backlog=2048,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except (OSError, OverflowError, UnicodeError) as error:
        raise _explain(error, settings) from error
    return bound, replace(settings, port=bound.getsockname()[1])


def _find_family(host: str) -> socket.AddressFamily:
    """IPv4 where a name has both, since local names mean that to most clients."""
    if not host:
        return socket.AF_INET
    found = {entry[0] for entry in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)}
    return socket.AF_INET if socket.AF_INET in found else socket.AF_INET6


def _explain(error: Exception, settings: ServerSettings) -> LocalMistralError:
    where = f"{settings.host}:{settings.port}"
    other = settings.port + 1 if settings.port < MAX_PORT else settings.port - 1
    if isinstance(error, OSError) and error.errno == errno.EADDRINUSE:
        return LocalMistralError(
            f"Port {settings.port} of {settings.host} is in use by another program.",
            f"Take another one: localmistral serve --port {other}",
        )
    if isinstance(error, OSError) and error.errno == errno.EACCES:
        return LocalMistralError(
            f"Port {settings.port} needs rights this user doesn't have.",
            "Take one above 1023: localmistral serve --port 8080",
        )
    reason = getattr(error, "strerror", None) or str(error)
    return LocalMistralError(
        f"{where} can't be listened on: {reason}.",
        "Name an address of this machine: localmistral serve --host 127.0.0.1",
    )


class RunningServer:
    """uvicorn on a thread, serving `serving` on a socket that is bound already."""

    def __init__(self, serving: Serving, settings: ServerSettings, bound: socket.socket) -> None:
        self.serving = serving
        self.settings = settings
        config = uvicorn.Config(
            create_app(serving, settings),
            http=HttpProtocol,
            log_config=None,
            access_log=False,
            lifespan="off",
            ws="none",
            server_header=False,
            timeout_graceful_shutdown=math.ceil(settings.drain_s),
            timeout_keep_alive=30,
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [bound]}, name="localmistral-http"
        )
        self._thread.daemon = True

    def start(self) -> None:
        """Returns once requests are answered.

        By then the thread has imported all it needs: a Ctrl-C amid imports of the main thread can
        leave Python's import lock held, and a thread that imports after that waits for ever.
        """
        self._thread.start()
        while self._thread.is_alive() and not self._server.started:
            self._thread.join(_STARTING_POLL_S)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def stop(self) -> None:
        """Refuse what is new, let running answers end or cut them after `drain_s`; then return."""
        self.serving.is_draining = True
        self._server.should_exit = True
        deadline = time.monotonic() + math.ceil(self.settings.drain_s) + _GRACE_S
        while self._thread.is_alive() and time.monotonic() < deadline:
            self._thread.join(_POLL_S)


def serve(
    load: Callable[[Callable[[float], None]], Chat],
    settings: ServerSettings,
    *,
    on_ready: Callable[[Chat, ServerSettings], Any],
    on_stop: Callable[[int, ServerSettings], Any],
) -> int:
    """Bind, load with `load` (which gets a callback for 0.0-1.0), serve until a signal comes.

    `on_stop` gets the number of answers that are waited for. Returns the exit code: 0 after
    SIGTERM, 130 after Ctrl-C. A second signal ends the process at once. Raises LocalMistralError
    when the port is taken, the load fails or HTTP ends by itself.
    """
    bound, settings = bind(replace(settings, local_token=secrets.token_urlsafe(32)))
    _route_logs(settings.log)
    _raise_file_limit()
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    with contextlib.closing(bound), _Signals() as signals:
        serving = Serving()
        server = RunningServer(serving, settings, bound)
        server.start()
        write_line(settings.log, "listening", url=settings.url, pid=os.getpid())
        try:
            with signals.raised():
                chat = load(lambda done: setattr(serving, "progress", done))
            with chat:
                _serve_until_told(chat, server, signals, on_ready)
                on_stop(_count_answers(chat), settings)
                server.stop()
        except KeyboardInterrupt:  # while loading
            return signals.exit_code
        except LocalMistralError as error:
            serving.failure = error
            write_line(settings.log, "failed", message=error.message)
            raise
        finally:
            server.stop()
            write_line(settings.log, "stopped")
    return signals.exit_code


def _serve_until_told(
    chat: Chat,
    server: RunningServer,
    signals: "_Signals",
    on_ready: Callable[[Chat, ServerSettings], Any],
) -> None:
    """Take requests, and be found by `run`, until a signal comes."""
    serving, settings = server.serving, server.settings
    with published(_describe(chat, settings)):
        serving.plan = None if chat.plan is None else _summarize(chat.plan)
        serving.chat = chat
        loaded = chat.engine.settings
        model = name_model(chat)[0]
        sizes = {"context": loaded.context, "parallel": loaded.parallel}
        write_line(settings.log, "ready", url=settings.url, model=model, **sizes)
        on_ready(chat, settings)
        while not signals.stop.wait(_POLL_S):
            if not server.is_running:
                raise LocalMistralError("The HTTP part of the server has ended by itself.")
    write_line(settings.log, "stopping", answers=_count_answers(chat))


def _count_answers(chat: Chat) -> int:
    """Answers under way or waiting; none where the engine has died."""
    if not chat.engine.is_alive:
        return 0
    now = chat.engine.metrics()
    return now.running + now.waiting


def _describe(chat: Chat, settings: ServerSettings) -> ServerRecord:
    return ServerRecord(
        pid=os.getpid(),
        machine=machine_name(),
        host=settings.local_host,
        port=settings.port,
        token=settings.local_token,
        names=name_model(chat),
        path=str(chat.shape.files[0].absolute()),
        name=chat.name,
        title=chat.title,
        context=chat.engine.settings.context,
        has_effort_switch=chat.has_effort_switch,
        started=time.time(),
    )


def _summarize(plan: Plan) -> dict[str, Any]:
    """What /v1/models tells of the plan; no paths."""
    whole = plan_to_json(plan)
    return {name: whole[name] for name in _PLAN_SUMMARY}


def _route_logs(form: str) -> None:
    """Our own complaints in the log's form; uvicorn's say nothing that they don't, and asyncio
    warns of every client that goes while it is written to."""
    logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)
    logging.getLogger("asyncio").setLevel(logging.ERROR)
    if form != "off":
        logger = logging.getLogger("localmistral.server")
        logger.addHandler(LogHandler(form))
        logger.propagate = False


def _raise_file_limit() -> None:
    if sys.platform == "win32":  # which has no such limit
        return
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = MAX_FILES if hard == resource.RLIM_INFINITY else min(hard, MAX_FILES)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        with contextlib.suppress(OSError, ValueError):  # a system may refuse what it allows
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


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
            if self.stop.is_set():  # it came a moment earlier
                raise KeyboardInterrupt
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
