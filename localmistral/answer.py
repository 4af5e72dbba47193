"""One answer of a model: token events to typed deltas, and at the end what it all came to.

Knows nothing of prompts, templates or rendering.
"""

import dataclasses
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Self, TypeAlias

from localmistral.chatformat.parser import (
    ContentDelta,
    Delta,
    OutputParser,
    ReasoningDelta,
    ToolCallDelta,
)

if TYPE_CHECKING:  # only for names: whoever reads another process's answer needs no engine
    from localmistral.engine import GenerationResult, Stream, TokenEvent, TokenProbability

_KEPT_MARKUP = frozenset({"<think>", "</think>", "<tool_call>", "</tool_call>"})
"""Control tokens that the parser reads; any other that a model emits is no part of its answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatResult:
    """The whole answer and what it took. Times in seconds, speeds in tokens per second.

    `time_to_first_token_s` counts from the request, waiting included; `decode_s` from the first
    token to the last, `reasoning_s` of it was thinking. `cached_tokens` of the prompt were not
    computed again.
    """

    content: str
    reasoning: str
    tool_calls: tuple[ToolCallDelta, ...]
    finish_reason: Literal["stop", "length", "tool_calls", "cancelled"]
    stop_text: str | None
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int
    reasoning_s: float
    time_to_first_token_s: float
    prefill_s: float
    decode_s: float
    seed: int

    @property
    def prefill_speed(self) -> float:
        """Prompt tokens computed per second."""
        return _divide(self.prompt_tokens - self.cached_tokens, self.prefill_s)

    @property
    def decode_speed(self) -> float:
        """Tokens per second after the first."""
        return _divide(self.completion_tokens - 1, self.decode_s)

    def to_message(self) -> dict[str, Any]:
        """The answer as a message for the next turn's history."""
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in self.tool_calls
            ]
        return message


def _divide(count: int, seconds: float) -> float:
    return max(0, count) / seconds if seconds > 0 else 0.0


ChatItem: TypeAlias = "Delta | TokenProbability | ChatResult"


class ChatStream:
    """Deltas as they come, then one ChatResult. One reader, with `for` or `async for`.

    `close` cancels from any thread; the reader then still gets a result with what there was.
    """

    def __init__(self, stream: "Stream", assembly: "Assembly", *, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self._stream = stream
        self._assembly = assembly
        self.result: ChatResult | None = None

    def __iter__(self) -> Iterator[ChatItem]:
        for event in self._stream:
            yield from self._assembly.read(event)
        yield from self._finish()

    async def __aiter__(self) -> AsyncIterator[ChatItem]:
        try:
            async for event in self._stream:
                for delta in self._assembly.read(event):
                    yield delta
            for item in self._finish():
                yield item
        finally:
            self.close()  # a task that is cancelled, or leaves early, wants no more of it

    def _finish(self) -> Iterator[ChatItem]:
        yield from self._assembly.finish()
        assert self._stream.result is not None
        self.result = self._assembly.build_result(self._stream.result)
        yield self.result

    def close(self) -> None:
        self._stream.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Assembly:
    """Token events to deltas, and the sum of the deltas."""

    def __init__(self, parser: OutputParser) -> None:
        self._parser = parser
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: dict[int, ToolCallDelta] = {}
        self._reasoning_tokens = 0
        self._reasoning_s = 0.0
        self._is_reasoning = False
        self._is_content = True
        self._last_s: float | None = None

    def read(self, event: "TokenEvent") -> "list[Delta | TokenProbability]":
        """What `event` adds; a token of the content also gives its probability, if it has one."""
        shown = event.text if not event.control or event.text in _KEPT_MARKUP else ""
        deltas = self._parser.feed(-1 if event.token is None else event.token, shown)
        self._note(deltas)
        if event.token is not None:
            self._count(time.monotonic())
        if event.probability is not None and not event.control and self._is_content:
            return [*deltas, event.probability]
        return [*deltas]

    def _count(self, now_s: float) -> None:
        """A token belongs to the thinking if the last delta did; so does the wait for it."""
        if self._is_reasoning:
            self._reasoning_tokens += 1
            self._reasoning_s += 0.0 if self._last_s is None else now_s - self._last_s
        self._last_s = now_s

    def finish(self) -> list[Delta]:
        deltas = self._parser.finish()
        self._note(deltas)
        return deltas

    def _note(self, deltas: Sequence[Delta]) -> None:
        for delta in deltas:
            self._is_reasoning = isinstance(delta, ReasoningDelta)
            self._is_content = isinstance(delta, ContentDelta)
            if isinstance(delta, ReasoningDelta):
                self._reasoning.append(delta.text)
            elif isinstance(delta, ContentDelta):
                self._content.append(delta.text)
            else:
                self._add_call(delta)

    def _add_call(self, delta: ToolCallDelta) -> None:
        known = self._calls.get(delta.index)
        if known is not None:
            arguments = known.arguments + delta.arguments
            delta = dataclasses.replace(known, arguments=arguments)
        self._calls[delta.index] = delta

    def build_result(self, result: "GenerationResult") -> ChatResult:
        calls = tuple(self._calls[index] for index in sorted(self._calls))
        stopped = result.finish_reason == "stop"
        return ChatResult(
            content="".join(self._content),
            reasoning="".join(self._reasoning),
            tool_calls=calls,
            finish_reason="tool_calls" if calls and stopped else result.finish_reason,
            stop_text=result.stop_text,
            prompt_tokens=result.prompt_tokens,
            cached_tokens=result.cached_tokens,
            completion_tokens=result.completion_tokens,
            reasoning_tokens=self._reasoning_tokens,
            reasoning_s=self._reasoning_s,
            time_to_first_token_s=result.queue_s + result.prefill_s,
            prefill_s=result.prefill_s,
            decode_s=result.decode_s,
            seed=result.seed,
        )
