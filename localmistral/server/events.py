"""Answers on their way to a client: server-sent events, and noticing that nobody listens any more.

A client that goes away is told to the engine at once, in whatever state its request is: queued,
in prefill, or streaming. Knows nothing of what the events say.
"""

import asyncio
import contextlib
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from localmistral.errors import BusyError, LocalMistralError
from localmistral.server.errors import describe

logger = logging.getLogger("localmistral.server")
T = TypeVar("T")

DONE = "data: [DONE]\n\n"
PING_S = 15.0
"""Longest silence on a stream, while a prompt is computed: proxies (nginx) give up after a minute,
Node's clients after five."""
_COMMENT = ": still computing\n\n"
"""Readers of server-sent events pass over comments."""
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def encode_text(text: str) -> bytes:
    """UTF-8; half of a surrogate pair, which a request may hold and have echoed, becomes `?`."""
    return text.encode("utf-8", "replace")


class JsonAnswer(JSONResponse):
    """JSON that may echo any text of a request."""

    def render(self, content: Any) -> bytes:
        return encode_text(
            json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        )


def encode_event(data: Any, event: str | None = None) -> str:
    """One server-sent event; `event` names its type where the API has such names."""
    head = f"event: {event}\n" if event else ""
    body = _encode(data)
    return f"{head}data: {body}\n\n"


class EventStream(Response):
    """Sends `events`, closes the request behind them when the client goes or they end. Where none
    comes for long, `sign_of_life` goes out.

    An error after the first byte becomes an event of its own, made by `encode_error`, and the
    stream ends; `close` is called in every case, and may be called twice.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[str],
        close: Callable[[], None],
        encode_error: Callable[[Exception], str],
        *,
        sign_of_life: str = _COMMENT,
    ) -> None:
        super().__init__()
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._events = events
        self._close = close
        self._encode_error = encode_error
        self._sign_of_life = sign_of_life
        self._is_silent = True

    async def __call__(self, _scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_wait_until_gone(receive, self._close))
        pulse = asyncio.create_task(self._break_silence(send))
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for event in self._guarded():
                self._is_silent = False
                await _send_part(send, event, more=True)
            pulse.cancel()
            await _send_part(send, "", more=False)
        except OSError:  # the client has gone: what is left has no reader
            return
        except asyncio.CancelledError:  # the server ends and has waited long enough
            pulse.cancel()
            await _send_part(send, self._encode_error(make_cut()), more=False)
        finally:
            watcher.cancel()
            pulse.cancel()
            self._close()

    async def _break_silence(self, send: Send) -> None:
        while True:
            self._is_silent = True
            await asyncio.sleep(PING_S)
            if self._is_silent:
                await _send_part(send, self._sign_of_life, more=True)

    async def _guarded(self) -> AsyncIterator[str]:
        try:
            async for event in self._events:
                yield event
        except LocalMistralError as error:
            yield self._encode_error(error)
        except Exception as error:
            logger.exception("a stream met an unexpected error")
            yield self._encode_error(error)


async def _send_part(send: Send, text: str, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": encode_text(text), "more_body": more})


async def _wait_until_gone(receive: Receive, close: Callable[[], None]) -> None:
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            close()
            return


def make_cut() -> BusyError:
    """Why an answer ends before its time when the server does."""
    return BusyError("The server is shutting down.", "Send the request to another one.")


class ClientGoneError(Exception):
    """The client closed the connection before its answer was ready."""


async def await_answer(work: Awaitable[T], receive: Receive, close: Callable[[], None]) -> T:
    """The result of `work`, given up with ClientGoneError when the client goes."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.create_task(_wait_until_gone(receive, close))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    except asyncio.CancelledError as error:  # as in EventStream
        raise make_cut() from error
    finally:
        watcher.cancel()
        close()
        if not task.done():
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, LocalMistralError):
                await task


async def merge(streams: list[AsyncIterator[T]]) -> AsyncIterator[tuple[int, T]]:
    """Items of all streams as they come, each with its stream's number."""
    if len(streams) == 1:
        async for item in streams[0]:
            yield 0, item
        return
    queue: asyncio.Queue[tuple[int, T] | BaseException | None] = asyncio.Queue()

    async def read(number: int, stream: AsyncIterator[T]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((number, item))
            queue.put_nowait(None)
        except Exception as error:  # noqa: BLE001  (raised again where the items are read)
            queue.put_nowait(error)

    tasks = [asyncio.create_task(read(n, stream)) for n, stream in enumerate(streams)]
    left = len(tasks)
    try:
        while left:
            got = await queue.get()
            if isinstance(got, BaseException):
                raise got
            if got is None:
                left -= 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def encode_openai_error(error: Exception) -> str:
    """An error inside a stream, as OpenAI's clients read it."""
    return encode_event(describe(error).to_openai())
