"""One request's answer on its way from the engine's thread to whoever reads it.

Holds back what must not be shown yet: halves of a character, beginnings of a stop string.
Knows nothing of llama.cpp.
"""

import asyncio
import codecs
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Self

from localmistral.engine.sampling import TokenProbability
from localmistral.errors import LocalMistralError

FinishReason = Literal["stop", "length", "cancelled"]
_POLL_S = 0.2
"""A waiting reader wakes this often, so that Ctrl-C is noticed on Windows too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenEvent:
    """Text that became final, with the token that made it so.

    `text` may be empty (held back) and may come with `token` None (it was held back and no more
    tokens follow). `control` marks a control token: `text` spells it out.
    """

    token: int | None
    text: str
    control: bool = False
    probability: TokenProbability | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationResult:
    """How a request ended. Times in seconds: waiting, from start to first token, and after it."""

    finish_reason: FinishReason
    stop_text: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    queue_s: float
    prefill_s: float
    decode_s: float
    seed: int


class TextAssembler:
    """Bytes of tokens in, final text out; ends at the first stop string, which is not shown."""

    def __init__(self, stops: tuple[str, ...] = ()) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = stops
        self._held = ""
        self.stop_text: str | None = None

    def push(self, data: bytes, *, seek: bool = True) -> str:
        """Text that is final now. Once `stop_text` is set, nothing more may be pushed.

        Without `seek` no stop string is looked for.
        """
        text = self._decoder.decode(data)
        if not (self._stops and seek):
            text, self._held = self._held + text, ""
            return text
        self._held += text
        first = self._find_stop()
        if first is not None:
            text, self._held = self._held[:first], ""
            return text
        final = len(self._held) - self._measure_beginning()
        text, self._held = self._held[:final], self._held[final:]
        return text

    def flush(self) -> str:
        """What was held back for a stop string that didn't come; half a character is dropped."""
        self._decoder.reset()
        text, self._held = self._held, ""
        return text

    def _find_stop(self) -> int | None:
        """The place of the stop string that was complete first, however the text was cut."""
        starts = [(self._held.find(stop), stop) for stop in self._stops]
        ends = sorted((start + len(stop), start, stop) for start, stop in starts if start >= 0)
        if not ends:
            return None
        _, first, self.stop_text = ends[0]
        return first

    def _measure_beginning(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = min(max(map(len, self._stops)) - 1, len(self._held))
        for size in range(longest, 0, -1):
            end = self._held[-size:]
            if any(stop.startswith(end) for stop in self._stops):
                return size
        return 0


_Item = TokenEvent | GenerationResult | LocalMistralError


class Channel:
    """What the engine writes into; apart from Stream, so that dropping a Stream is noticed."""

    def __init__(self) -> None:
        self.items: queue.SimpleQueue[_Item] = queue.SimpleQueue()
        self.finished = threading.Event()
        self.wake: Callable[[], None] | None = None
        self.last: GenerationResult | LocalMistralError | None = None

    def put(self, item: _Item) -> None:
        if not isinstance(item, TokenEvent):
            self.last = item
            self.finished.set()
        self.items.put(item)
        wake = self.wake
        if wake is not None:
            wake()


class Stream:
    """Iterate for TokenEvents, then read `result`; `close` cancels, from any thread.

    A stream has one reader, with `for` or with `async for`. An error of the engine is raised
    from the iteration. Leaving a `with` block, or dropping the stream, cancels what still runs.
    """

    def __init__(self, channel: Channel, cancel: Callable[[], None]) -> None:
        self._channel = channel
        self._cancel = cancel
        self._result: GenerationResult | None = None

    @property
    def result(self) -> GenerationResult | None:
        """Set once the iteration has ended without an error."""
        return self._result

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the engine is done with this request; whether it is."""
        return self._channel.finished.wait(timeout_s)

    def __iter__(self) -> Iterator[TokenEvent]:
        while self._result is None:
            try:
                item = self._channel.items.get(timeout=_POLL_S)
            except queue.Empty:
                if self._channel.last is None or not self._channel.items.empty():
                    continue
                item = self._channel.last  # Ctrl-C came between taking it and returning it
            if isinstance(item, TokenEvent):
                yield item
            else:
                self._end(item)

    async def __aiter__(self) -> AsyncIterator[TokenEvent]:
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        self._channel.wake = lambda: _call_in_loop(loop, ready.set)
        try:
            while self._result is None:
                try:
                    item = self._channel.items.get_nowait()
                except queue.Empty:
                    await ready.wait()
                    ready.clear()
                    continue
                if isinstance(item, TokenEvent):
                    yield item
                else:
                    self._end(item)
        finally:
            self._channel.wake = None
            self.close()  # a task that is cancelled, or leaves early, wants no more of it

    def _end(self, item: GenerationResult | LocalMistralError) -> None:
        if isinstance(item, LocalMistralError):
            self._channel.items.put(item)  # a second iteration meets the same error
            raise item
        self._result = item

    def close(self) -> None:
        """Cancel the request if it still runs; returns at once."""
        if not self._channel.finished.is_set():
            self._cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def _call_in_loop(loop: asyncio.AbstractEventLoop, call: Callable[[], object]) -> None:
    """Run `call` in the loop's thread, unless the loop has gone: then nobody reads any more."""
    if not loop.is_closed():
        try:
            loop.call_soon_threadsafe(call)
        except RuntimeError:  # closed between the question and the call
            return
