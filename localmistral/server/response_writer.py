"""One answer in the form of /v1/responses: output items, and the events that build them.

Knows nothing of HTTP, and keeps nothing.
"""

import secrets
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.answer import ChatItem, ChatResult
from localmistral.chatformat.parser import ContentDelta, ReasoningDelta, ToolCallDelta
from localmistral.engine import Engine, TokenProbability
from localmistral.server.response_items import seal
from localmistral.server.responses_request import LOGPROBS, SEALED_REASONING, ResponsesRequest
from localmistral.server.token_logprobs import TokenQueue, describe_token

Event = dict[str, Any]


def new_id(prefix: str) -> str:
    return f"{prefix}_{secrets.token_hex(16)}"


@dataclass(slots=True)
class ResponseWriter:
    """Feed it an answer's items; `body` is the response as far as it has come."""

    request: ResponsesRequest
    model: str
    engine: Engine
    id: str = field(default_factory=lambda: new_id("resp"))
    created_at: int = field(default_factory=lambda: int(time.time()))
    output: list[dict[str, Any]] = field(default_factory=list)
    _open: str | None = None
    _held: str = ""  # text whose token is still to come, where tokens are told
    _early: list[TokenProbability] = field(default_factory=list)
    _tokens: TokenQueue = field(init=False)

    def __post_init__(self) -> None:
        self._tokens = TokenQueue(self.engine, has_stops=bool(self.request.stop))

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
            "background": False,
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
            "text": {"format": form or {"type": "text"}, **_verbosity(asked)},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools or [],
            "top_logprobs": asked.top_logprobs or 0,
            "top_p": asked.top_p,
            "truncation": asked.truncation or "disabled",
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
        elif isinstance(item, ContentDelta) and self.request.includes(LOGPROBS):
            self._held += item.text
            self._tokens.add_text(item.text)
        elif isinstance(item, ContentDelta):
            yield from self._add_text("message", item.text)
        elif isinstance(item, TokenProbability):
            yield from self._let_out(self._tokens.add_token(item))
        elif isinstance(item, ToolCallDelta):
            yield from self._let_out([])
            yield from self._add_call(item)

    def _let_out(self, tokens: list[TokenProbability]) -> Iterator[Event]:
        """The text held, with `tokens`; both may be missing."""
        text, self._held = self._held, ""
        tokens = [*self._early, *tokens]
        if not text and self._open != "message":
            self._early = tokens  # of a message, if any text follows
            return
        self._early = []
        if text or tokens:
            described = [describe_token(self.engine, token) for token in tokens]
            yield from self._add_text("message", text, described)

    def end(self, result: ChatResult) -> Iterator[Event]:
        """The last events, with the whole response in the last of all."""
        is_cut = result.finish_reason == "length"
        yield from self._let_out(self._tokens.end(result.stop_text))
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
        shown = _copy(item)
        yield self._event(
            "response.output_item.added", output_index=len(self.output) - 1, item=shown
        )

    def _add_text(
        self, kind: str, text: str, tokens: Sequence[dict[str, Any]] = ()
    ) -> Iterator[Event]:
        """More of a message or of thinking; `tokens` describe what `text` is made of."""
        if self._open != kind:
            yield from self._start_text(kind)
        item = self.output[-1]
        part = item["content"][0]
        part["text"] += text
        more: dict[str, Any] = {}
        if kind == "message":
            more = {"logprobs": list(tokens)}
            part["logprobs"] += more["logprobs"]
        yield self._event(
            f"{_TEXT_EVENTS[kind]}.delta", **self._place, content_index=0, delta=text, **more
        )
        if item.get("summary"):
            item["summary"][0]["text"] += text
            yield self._summarise("text.delta", delta=text)

    def _start_text(self, kind: str) -> Iterator[Event]:
        yield from self._start(kind, _make_item(kind))
        part = _make_part(kind)
        self.output[-1]["content"].append(part)
        yield self._event(
            "response.content_part.added", **self._place, content_index=0, part=_copy(part)
        )
        asked = self.request.reasoning
        if kind == "reasoning" and asked is not None and asked.summary is not None:
            # the thinking itself, where clients look that were made for hidden thinking
            self.output[-1]["summary"].append(_make_summary(""))
            yield self._summarise("part.added", part=_make_summary(""))

    def _summarise(self, what: str, **fields: Any) -> Event:
        kind = f"response.reasoning_summary_{what}"
        return self._event(kind, **self._place, summary_index=0, **fields)

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
        if item["type"] == "reasoning" and self.request.includes(SEALED_REASONING):
            item["encrypted_content"] = seal(item["content"][0]["text"])
        self._open = None
        index = len(self.output) - 1
        yield self._event("response.output_item.done", output_index=index, item=dict(item))

    def _close_text(self, item: dict[str, Any]) -> Iterator[Event]:
        part, kind = item["content"][0], item["type"]
        text = part["text"]
        more = {"logprobs": part["logprobs"]} if kind == "message" else {}
        yield self._event(
            f"{_TEXT_EVENTS[kind]}.done", **self._place, content_index=0, text=text, **more
        )
        yield self._event(
            "response.content_part.done", **self._place, content_index=0, part=_copy(part)
        )
        if item.get("summary"):
            yield self._summarise("text.done", text=text)
            yield self._summarise("part.done", part=_make_summary(text))


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


def _make_summary(text: str) -> dict[str, Any]:
    return {"type": "summary_text", "text": text}


def _copy(part: dict[str, Any]) -> dict[str, Any]:
    """As it is now: its lists go on growing."""
    return {name: list(of) if isinstance(of, list) else of for name, of in part.items()}


def _verbosity(request: ResponsesRequest) -> dict[str, Any]:
    wanted = request.text.verbosity if request.text else None
    return {} if wanted is None else {"verbosity": wanted}


def _usage(result: ChatResult) -> dict[str, Any]:
    return {
        "input_tokens": result.prompt_tokens,
        "input_tokens_details": {"cached_tokens": result.cached_tokens},
        "output_tokens": result.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": result.reasoning_tokens},
        "total_tokens": result.prompt_tokens + result.completion_tokens,
    }
