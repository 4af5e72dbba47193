"""One answer in the form of /v1/responses: output items, and the events that build them.

Knows nothing of HTTP, and keeps nothing.
"""

import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from localmistral.answer import ChatItem, ChatResult
from localmistral.chatformat.parser import ContentDelta, ReasoningDelta, ToolCallDelta
from localmistral.server.responses_request import ResponsesRequest

Event = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(slots=True)
class ResponseWriter:
    """Feed it an answer's items; `body` is the response as far as it has come."""

    request: ResponsesRequest
    model: str
    id: str = field(default_factory=lambda: new_id("resp"))
    created_at: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    _open: str | None = None
    _sequence: int = 0

    def body(self, status: str, **more: Any) -> dict[str, Any]:
        """The response object."""
        asked = self.request
        reasoning = asked.reasoning.model_dump() if asked.reasoning else None
        form = (
            asked.text.format.model_dump(by_alias=True)
            if asked.text and asked.text.format
            else None
        )
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created_at,
            "status": status,
            "error": None,
            "incomplete_details": None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": self.model,
            "output": self.output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": asked.previous_response_id,
            "reasoning": reasoning or {"effort": None, "summary": None},
            "store": asked.store is not False,
            "temperature": asked.temperature,
            "text": {"format": form or {"type": "text"}},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": None,
            **more,
        }

    def begin(self) -> Iterator[Event]:
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self.body("in_progress"))

    def write(self, item: ChatItem) -> Iterator[Event]:
        """The events that `item` makes; its end is `end`'s."""
        if isinstance(item, ReasoningDelta):
            yield from self._add_text("reasoning", item.text)
        elif isinstance(item, ContentDelta):
            yield from self._add_text("message", item.text)
        elif isinstance(item, ToolCallDelta):
            yield from self._add_call(item)

    def end(self, result: ChatResult) -> Iterator[Event]:
        """The last events, with the whole response in the last of all."""
        is_cut = result.finish_reason == "length"
        yield from self._close("incomplete" if is_cut else "completed")
        body = self.finish(result)
        yield self._event(f"response.{body['status']}", response=body)

    def finish(self, result: ChatResult) -> dict[str, Any]:
        """The response once its answer has ended."""
        is_cut = result.finish_reason == "length"
        details = {"reason": "max_output_tokens"} if is_cut else None
        status = "incomplete" if is_cut else "completed"
        return self.body(status, incomplete_details=details, usage=_usage(result))

    def fail(self, message: str, code: str) -> Event:
        """The event of an error after the first byte."""
        body = self.body("failed", error={"code": code, "message": message})
        return self._event("response.failed", response=body)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._sequence, **fields}
        self._sequence += 1
        return event

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.output[-1]["id"], "output_index": len(self.output) - 1}

    def _start(self, name: str, item: dict[str, Any]) -> Iterator[Event]:
        yield from self._close("completed")
        self._open = name
        self.output.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        yield self._event(
            "response.output_item.added", output_index=len(self.output) - 1, item=shown
        )

    def _add_text(self, kind: str, text: str) -> Iterator[Event]:
        if self._open != kind:
            yield from self._start(kind, _make_item(kind))
            part = _make_part(kind)
            self.output[-1]["content"].append(part)
            yield self._event(
                "response.content_part.added", **self._place, content_index=0, part=dict(part)
            )
        self.output[-1]["content"][0]["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(
            f"{_TEXT_EVENTS[kind]}.delta", **self._place, content_index=0, delta=text, **more
        )

    def _add_call(self, delta: ToolCallDelta) -> Iterator[Event]:
        name = f"call {delta.index}"
        if self._open != name:
            item = {
                "id": new_id("fc"),
                "type": "function_call",
                "status": "in_progress",
                "call_id": delta.id,
                "name": delta.name,
                "arguments": "",
            }
            yield from self._start(name, item)
        if delta.arguments:
            self.output[-1]["arguments"] += delta.arguments
            yield self._event(
                "response.function_call_arguments.delta", **self._place, delta=delta.arguments
            )

    def _close(self, status: str) -> Iterator[Event]:
        """The events that end the item under way."""
        if self._open is None:
            return
        item = self.output[-1]
        item["status"] = status
        if item["type"] == "function_call":
            yield self._event(
                "response.function_call_arguments.done",
                **self._place,
                name=item["name"],
                arguments=item["arguments"],
            )
        else:
            yield from self._close_text(item)
        self._open = None
        index = len(self.output) - 1
        yield self._event("response.output_item.done", output_index=index, item=dict(item))

    def _close_text(self, item: dict[str, Any]) -> Iterator[Event]:
        part, kind = item["content"][0], item["type"]
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        yield self._event(
            f"{_TEXT_EVENTS[kind]}.done", **self._place, content_index=0, text=part["text"], **more
        )
        yield self._event(
            "response.content_part.done", **self._place, content_index=0, part=dict(part)
        )


_TEXT_EVENTS = {"message": "response.output_text", "reasoning": "response.reasoning_text"}


def _make_item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        start = {"id": new_id("rs"), "type": "reasoning", "summary": []}
    else:
        start = {"id": new_id("msg"), "type": "message", "role": "assistant"}
    return {**start, "status": "in_progress", "content": []}


def _make_part(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": ""}
    return {"type": "output_text", "text": "", "annotations": [], "logprobs": []}


def _usage(result: ChatResult) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.cached_tokens},
        "output_tokens": result.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
