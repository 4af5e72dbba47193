"""POST /v1/messages and /v1/messages/count_tokens, as Anthropic's clients expect them.

Knows nothing of OpenAI's forms.
"""

import base64
import hashlib
import json
import secrets
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.chatformat.parser import ContentDelta, ReasoningDelta, ToolCallDelta
from localmistral.server.answer_schemas import MESSAGE, MESSAGE_EVENT, TOKEN_COUNT
from localmistral.server.call_items import end_after_one_call
from localmistral.server.documentation import anthropic_responses_of
from localmistral.server.errors import describe
from localmistral.server.events import EventStream, JsonAnswer, await_answer, encode_event
from localmistral.server.guard import request_id_of
from localmistral.server.messages_blocks import named_as_sent
from localmistral.server.messages_request import CountRequest, MessagesRequest
from localmistral.server.observing import Observer, observed
from localmistral.server.parameters import named_output
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat

_STOP_REASONS = {
    "stop": "end_turn",
    "cancelled": "end_turn",
    "length": "max_tokens",
    "tool_calls": "tool_use",
}


def make_messages_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/messages", responses=anthropic_responses_of(MESSAGE, events=MESSAGE_EVENT))
    async def create_message(body: MessagesRequest, request: Request) -> Response:
        """An answer to a conversation, whole or streamed."""
        chat = serving.require_model(body.model)
        stream = await run_in_threadpool(_start, chat, body)
        items = observed(stream, observer)
        if body.tool_choice is not None and body.tool_choice.disable_parallel_tool_use:
            items = end_after_one_call(stream, items)
        writer = _Writer(model=name_model(chat)[0])
        if body.stream:
            events = _write_events(items, writer, stream.prompt_tokens)
            encode_error = _error_encoder(request_id_of(request.scope))
            ping = _encode({"type": "ping"})
            return EventStream(events, stream.close, encode_error, sign_of_life=ping)
        result = await await_answer(_finish(items), request.receive, stream.close)
        return JsonAnswer(writer.whole(result))

    @router.post("/v1/messages/count_tokens", responses=anthropic_responses_of(TOKEN_COUNT))
    async def count_tokens(body: CountRequest) -> dict[str, int]:
        """How many tokens the prompt of a conversation has."""
        chat = serving.require_model(body.model)
        return {"input_tokens": await run_in_threadpool(_count, chat, body)}

    return router


def _start(chat: Chat, body: MessagesRequest) -> ChatStream:
    turns = body.read_turns()
    with named_as_sent(turns), named_output("output_config.format"):
        return chat.stream([turn.message for turn in turns], **body.read_arguments())


def _count(chat: Chat, body: CountRequest) -> int:
    choice = body.tool_choice
    tools = None if choice is not None and choice.type == "none" else body.read_tools()
    turns = body.read_turns()
    with named_as_sent(turns):
        segments = chat.render(
            [turn.message for turn in turns],
            tools=tools,
            effort=body.read_effort(),
            continue_final_message=body.continues_answer,
        )
    return len(chat.encode(segments))


async def _finish(items: AsyncIterator[ChatItem]) -> ChatResult:
    last: ChatItem | None = None
    async for item in items:
        last = item
    assert isinstance(last, ChatResult)
    return last


async def _write_events(
    items: AsyncIterator[ChatItem], writer: "_Writer", prompt_tokens: int
) -> AsyncIterator[str]:
    yield _encode(writer.begin(prompt_tokens))
    async for item in items:
        for event in writer.write(item):
            yield _encode(event)


def _encode(event: dict[str, Any]) -> str:
    return encode_event(event, event["type"])


def _error_encoder(request_id: str) -> Callable[[Exception], str]:
    return lambda error: encode_event(describe(error).to_anthropic(request_id), "error")


@dataclass(slots=True, kw_only=True)
class _Writer:
    """One answer in Anthropic's form: whole, or as events, with the block that is open."""

    model: str
    id: str = field(default_factory=lambda: f"msg_{secrets.token_hex(12)}")
    _index: int = -1
    _open: str | None = None
    _thought: str = ""

    def whole(self, result: ChatResult) -> dict[str, Any]:
        content: list[dict[str, Any]] = []
        if result.reasoning:
            block = {"type": "thinking", "thinking": result.reasoning}
            content.append({**block, "signature": _sign(result.reasoning)})
        if result.content:
            content.append({"type": "text", "text": result.content})
        for call in result.tool_calls:
            arguments = _read_arguments(call.arguments)
            content.append(
                {"type": "tool_use", "id": call.id, "name": call.name, "input": arguments}
            )
        return {**self._message(content), **_ending(result), "usage": _usage(result)}

    def _message(self, content: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self.model,
            "content": content,
            "stop_reason": None,
            "stop_sequence": None,
        }

    def begin(self, prompt_tokens: int) -> dict[str, Any]:
        """The first event; how much of the prompt was cached is known at the end only."""
        usage = {**_count_usage(prompt_tokens, 0), "output_tokens": 0}
        return {"type": "message_start", "message": {**self._message([]), "usage": usage}}

    def write(self, item: ChatItem) -> Iterator[dict[str, Any]]:
        """The events that `item` makes."""
        if isinstance(item, ReasoningDelta):
            yield from self._enter(
                "thinking", {"type": "thinking", "thinking": "", "signature": ""}
            )
            self._thought += item.text
            yield self._delta({"type": "thinking_delta", "thinking": item.text})
        elif isinstance(item, ContentDelta):
            yield from self._enter("text", {"type": "text", "text": ""})
            yield self._delta({"type": "text_delta", "text": item.text})
        elif isinstance(item, ToolCallDelta):
            start = {"type": "tool_use", "id": item.id, "name": item.name, "input": {}}
            yield from self._enter(f"call {item.index}", start)
            if item.arguments:
                yield self._delta({"type": "input_json_delta", "partial_json": item.arguments})
        elif isinstance(item, ChatResult):
            yield from self._leave()
            ending = _ending(item)
            yield {"type": "message_delta", "delta": ending, "usage": _usage(item)}
            yield {"type": "message_stop"}

    def _enter(self, name: str, block: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Open a block, unless it is the one that is open."""
        if self._open == name:
            return
        yield from self._leave()
        self._index += 1
        self._open = name
        yield {"type": "content_block_start", "index": self._index, "content_block": block}

    def _leave(self) -> Iterator[dict[str, Any]]:
        if self._open is None:
            return
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": _sign(self._thought)})
            self._thought = ""
        self._open = None
        yield {"type": "content_block_stop", "index": self._index}

    def _delta(self, delta: dict[str, Any]) -> dict[str, Any]:
        return {"type": "content_block_delta", "index": self._index, "delta": delta}


def _read_arguments(text: str) -> dict[str, Any]:
    """A call's arguments; none where the answer was cut off within them."""
    try:
        arguments = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return {}
    return arguments if isinstance(arguments, dict) else {}


def _ending(result: ChatResult) -> dict[str, Any]:
    reason = _STOP_REASONS[result.finish_reason]
    if result.stop_text is not None and reason == "end_turn":
        reason = "stop_sequence"
    return {"stop_reason": reason, "stop_sequence": result.stop_text}


def _usage(result: ChatResult) -> dict[str, int]:
    """Anthropic counts what came from the cache apart from the rest of the prompt."""
    return {
        **_count_usage(result.prompt_tokens, result.cached_tokens),
        "output_tokens": result.completion_tokens,
    }


def _count_usage(prompt_tokens: int, cached_tokens: int) -> dict[str, int]:
    return {
        "input_tokens": prompt_tokens - cached_tokens,
        "cache_read_input_tokens": cached_tokens,
        "cache_creation_input_tokens": 0,
    }


def _sign(thought: str) -> str:
    """Nobody here checks it when the block comes back, but clients drop blocks that have none."""
    digest = hashlib.sha256(thought.encode("utf-8", "replace")).digest()
    return base64.b64encode(digest).decode()
