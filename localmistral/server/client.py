"""A chat in another process: finds a server of this user that runs here, and asks it.

    chat = find_server("small-4")
    if chat is not None:
        for item in chat.stream([{"role": "user", "content": "Hello"}]): ...

Loads no engine and speaks HTTP with the standard library, so that it starts at once. The items,
the result and the errors are those of a chat in this process.
"""

import contextlib
import http.client
import json
import queue
import secrets
import socket
import threading
from collections.abc import Iterator, Mapping
from typing import Any, Self

from localmistral.answer import ChatResult
from localmistral.engine.specs import Spec
from localmistral.errors import BadRequestError, EngineError, UsageError
from localmistral.server.runtime_file import ServerRecord, forget, read_servers
from localmistral.server.wire import (
    CHALLENGE_HEADER,
    PROOF_PATH,
    STREAM_PATH,
    Item,
    decode_error,
    decode_item,
    encode_spec,
    prove,
)

PROOF_TIMEOUT_S = 3.0
"""A server that is alive answers within milliseconds; a busy machine may take its time."""
_POLL_S = 0.2
"""A waiting reader wakes this often, so that Ctrl-C is noticed on Windows too."""


def find_server(wanted: str | None) -> "RemoteChat | None":
    """The server that serves `wanted`; None where none does.

    With `wanted` None any model will do, but two servers of different models raise UsageError.
    """
    records = [r for r in read_servers() if wanted is None or r.serves(wanted)]
    answering = [record for record in records if _answers(record)]
    models = list(dict.fromkeys(record.names[0] for record in answering))
    if len(models) > 1 and wanted is None:
        raise UsageError(
            f"No model is named, and {len(models)} are being served here: {', '.join(models[:5])}.",
            f'Name one: localmistral run -m {models[0]} "PROMPT"',
        )
    return RemoteChat(answering[0]) if answering else None


def _answers(record: ServerRecord) -> bool:
    """Whether this very server is there and ready; the file of one that isn't there is removed."""
    challenge = secrets.token_hex(16)
    link = http.client.HTTPConnection(record.host, record.port, timeout=PROOF_TIMEOUT_S)
    with contextlib.closing(link):
        try:
            link.request("GET", PROOF_PATH, headers={CHALLENGE_HEADER: challenge})
            response = link.getresponse()
            body = response.read(4096)
        except TimeoutError:
            return False
        except (OSError, http.client.HTTPException):
            forget(record)
            return False
    if response.status >= 500:  # it is about to end, or its engine has
        return False
    if response.status == 200 and prove(record.token, challenge).encode() in body:
        return True
    forget(record)
    return False


class RemoteChat:
    """The chat of a server, with what a command that asks once needs of a Chat."""

    def __init__(self, record: ServerRecord) -> None:
        self._record = record
        self.name = record.name
        self.title = record.title
        self.context = record.context
        self.has_effort_switch = record.has_effort_switch

    def stream(
        self, messages: object, *, output: Spec | None = None, **arguments: Any
    ) -> "RemoteStream":
        """As `Chat.stream`; `arguments` are tools, effort, max_tokens, sampling, thinking_budget.

        Errors: those of `Chat.stream`, and EngineError when the server has gone.
        """
        body = {"messages": messages, "output": encode_spec(output), **arguments}
        try:
            data = json.dumps(body).encode()
        except (RecursionError, ValueError) as error:
            raise BadRequestError("The request is nested too deeply.") from error
        link = http.client.HTTPConnection(self._record.host, self._record.port)
        stream = RemoteStream(link)
        with stream.closed_on_error():
            headers = {
                "Authorization": f"Bearer {self._record.token}",
                "Content-Type": "application/json",
            }
            link.request("POST", STREAM_PATH, data, headers)
            stream.open()
        return stream

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """There is nothing to close: the model is another process's."""


class RemoteStream:
    """An answer from a server. Iterate it once; leaving its `with` block early cancels it."""

    def __init__(self, link: http.client.HTTPConnection) -> None:
        self._link = link
        self._socket: socket.socket | None = None
        self._lines: queue.SimpleQueue[bytes | Exception] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self.result: ChatResult | None = None

    @contextlib.contextmanager
    def closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.close()
            raise _gone(error) from error
        except BaseException:
            self.close()
            raise

    def open(self) -> None:
        """Wait for the head of the response; raises what the server refuses with."""
        self._socket = self._link.sock  # http.client forgets it when the server won't keep it
        self._reader.start()
        first = self._take()
        if first:
            raise decode_error(_read_error(first))

    def _read(self) -> None:
        """Lines of the response, preceded by its body if it is an error and by nothing if not.

        On a thread of its own: a read can't be interrupted on Windows.
        """
        try:
            response = self._link.getresponse()
            self._lines.put(b"" if response.status == 200 else response.read() or b"{}")
            for line in response:
                self._lines.put(line)
            self._lines.put(EOFError())
        except Exception as error:  # noqa: BLE001  (raised where the lines are read)
            self._lines.put(error)

    def _take(self) -> bytes:
        while True:
            try:
                line = self._lines.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            if isinstance(line, Exception):
                raise _gone(line) from line
            return line

    def __iter__(self) -> Iterator[Item]:
        while self.result is None:
            line = self._take()
            if not line.startswith(b"data: "):
                continue
            data = json.loads(line[6:])
            if "error" in data:
                raise decode_error(data["error"])
            item = decode_item(data)
            if isinstance(item, ChatResult):
                self.result = item
            yield item

    def close(self) -> None:
        """Hang up, which cancels what still runs."""
        if self._socket is not None:
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader; closing would not
        self._link.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _gone(cause: Exception) -> EngineError:
    return EngineError(
        f"The server that was asked has gone before its answer ended ({type(cause).__name__}).",
        "Ask again, or load the model here: localmistral run --no-server",
    )


def _read_error(body: bytes) -> Mapping[str, Any]:
    try:
        error = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        error = None
    return error if isinstance(error, dict) else {"message": "The server refused the request."}
