"""/v1/responses: OpenAI's newer interface, with items, events and remembered conversations.

Knows nothing of how items and events look.
"""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.errors import BadRequestError, ContextOverflowError, LocalMistralError
from localmistral.server.answer_schemas import (
    DELETED,
    INPUT_ITEMS,
    INPUT_TOKENS,
    RESPONSE,
    RESPONSE_EVENT,
)
from localmistral.server.call_items import end_after_one_call
from localmistral.server.documentation import responses_of
from localmistral.server.errors import describe, describe_status
from localmistral.server.events import EventStream, JsonAnswer, await_answer, encode_event
from localmistral.server.observing import Observer, observed
from localmistral.server.parameters import named_output
from localmistral.server.response_history import History, gather
from localmistral.server.response_store import ResponseStore, StoredResponse
from localmistral.server.response_writer import ResponseWriter
from localmistral.server.responses_request import ResponsesRequest
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat

MAX_LISTED = 100
_TOOL_FUNCTION = re.compile(r"^(tools\[\d+\])\.function\b")
_PART_TYPES = {"assistant": "output_text"}


def make_responses_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()
    store = ResponseStore()

    @router.post("/v1/responses", responses=responses_of(RESPONSE, events=RESPONSE_EVENT))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """A response to items, whole or streamed."""
        chat = serving.require_model(body.model)
        body.check()
        history = await run_in_threadpool(gather, store, body)
        stream = await run_in_threadpool(_start, chat, body, history)
        items = observed(stream, observer)
        if body.parallel_tool_calls is False:
            items = end_after_one_call(stream, items)
        writer = ResponseWriter(body, name_model(chat)[0], chat.engine)
        if body.stream:
            events = _write_events(items, writer, store, history)
            return EventStream(events, stream.close, lambda error: _encode_error(writer, error))
        work = _finish(items, writer, store, history)
        return JsonAnswer(await await_answer(work, request.receive, stream.close))

    @router.post("/v1/responses/input_tokens", responses=responses_of(INPUT_TOKENS))
    async def count_input_tokens(body: ResponsesRequest) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        chat = serving.require_model(body.model)
        history = await run_in_threadpool(gather, store, body)
        count = await run_in_threadpool(_count, chat, body, history)
        return {"object": "response.input_tokens", "input_tokens": count}

    _add_stored_routes(router, store)
    return router


def _add_stored_routes(router: APIRouter, store: ResponseStore) -> None:
    @router.get("/v1/responses/{name}", responses=responses_of(RESPONSE))
    def show_response(name: str) -> Response:
        """A response that was stored."""
        found = store.find(name)
        return _unknown(name) if found is None else JsonAnswer(found.body)

    @router.get("/v1/responses/{name}/input_items", responses=responses_of(INPUT_ITEMS))
    def list_input_items(
        name: str,
        limit: Annotated[int, Query(ge=1, le=MAX_LISTED)] = 20,
        order: Literal["asc", "desc"] = "desc",
        after: str | None = None,
    ) -> Response:
        """The items that a stored response answers, those of earlier responses among them."""
        found = store.find(name)
        if found is None:
            return _unknown(name)
        items = [_list_item(item) for item in found.items]
        return JsonAnswer(_page(items if order == "asc" else items[::-1], limit, after))

    @router.delete("/v1/responses/{name}", responses=responses_of(DELETED))
    def delete_response(name: str) -> Response:
        """Forget a stored response."""
        if not store.remove(name):
            return _unknown(name)
        return JsonAnswer({"id": name, "object": "response", "deleted": True})


def _unknown(name: str) -> Response:
    failure = describe_status(404, f"There is no response {name[:80]!r} here.")
    return JsonAnswer(failure.to_openai(), status_code=404)


def _list_item(item: dict[str, Any]) -> dict[str, Any]:
    """An item as clients expect it listed: the text of a message as its only part."""
    if item["type"] != "message" or not isinstance(item.get("content"), str):
        return item
    kind = _PART_TYPES.get(str(item.get("role")), "input_text")
    return {**item, "content": [{"type": kind, "text": item["content"]}]}


def _page(items: list[dict[str, Any]], limit: int, after: str | None) -> dict[str, Any]:
    """At most `limit` items, behind the one called `after`. Errors: BadRequestError."""
    ids = [item["id"] for item in items]
    if after is not None and after not in ids:
        raise BadRequestError(f"after is {after[:80]!r}, which is no item here.", param="after")
    first = 0 if after is None else ids.index(after) + 1
    data = items[first : first + limit]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0]["id"] if data else None,
        "last_id": data[-1]["id"] if data else None,
        "has_more": first + limit < len(items),
    }


def _start(chat: Chat, body: ResponsesRequest, history: History) -> ChatStream:
    try:
        return _stream(chat, body, history)
    except ContextOverflowError:
        if body.truncation != "auto":
            raise
    return _stream(chat, body, _shorten(chat, body, history))


def _stream(chat: Chat, body: ResponsesRequest, history: History) -> ChatStream:
    conversation = history.read()
    try:
        with named_output("text.format"):
            return chat.stream(conversation.messages, **body.read_arguments())
    except BadRequestError as error:
        raise _name_tool(conversation.locate(error)) from error


def _name_tool(error: BadRequestError) -> BadRequestError:
    """The same error, where it is about a tool, with the place that the tool has here."""
    place = _TOOL_FUNCTION.sub(r"\1", error.param)
    message = error.message.replace(error.param, place, 1) if error.param else error.message
    return type(error)(message, error.hint, param=place)


def _shorten(chat: Chat, body: ResponsesRequest, history: History) -> History:
    """Without its oldest turns: as long as leaves room for the answer."""
    context = chat.engine.settings.context
    wanted = body.max_output_tokens or context // 8
    most = context - 1 - min(wanted, context // 2)
    return history.shorten(lambda shorter: _count(chat, body, shorter) <= most)


def _count(chat: Chat, body: ResponsesRequest, history: History) -> int:
    wanted = body.read_arguments()
    tools = None if wanted["tool_choice"] == "none" else wanted["tools"]
    conversation = history.read()
    try:
        prompt = chat.render(conversation.messages, tools=tools, effort=wanted["effort"])
    except BadRequestError as error:
        raise _name_tool(conversation.locate(error)) from error
    return len(chat.encode(prompt))


async def _finish(
    items: AsyncIterator[ChatItem],
    writer: ResponseWriter,
    store: ResponseStore,
    history: History,
) -> dict[str, Any]:
    body: dict[str, Any] = {}
    async for item in items:
        if isinstance(item, ChatResult):
            for _ in writer.end(item):
                continue
            body = writer.finish(item)
        else:
            for _ in writer.write(item):
                continue
    _remember(store, writer, body, history)
    return body


async def _write_events(
    items: AsyncIterator[ChatItem],
    writer: ResponseWriter,
    store: ResponseStore,
    history: History,
) -> AsyncIterator[str]:
    for event in writer.begin():
        yield _encode(event)
    async for item in items:
        if isinstance(item, ChatResult):
            ending = list(writer.end(item))
            # before its client can know of it: the next request may come at once
            _remember(store, writer, writer.finish(item), history)
            for event in ending:
                yield _encode(event)
        else:
            for event in writer.write(item):
                yield _encode(event)


def _remember(
    store: ResponseStore,
    writer: ResponseWriter,
    body: dict[str, Any],
    history: History,
) -> None:
    if writer.request.store is not False:
        store.put(writer.id, StoredResponse(body=body, items=history.items))


def _encode(event: dict[str, Any]) -> str:
    return encode_event(event, event["type"])


def _encode_error(writer: ResponseWriter, error: Exception) -> str:
    failure = describe(error)
    code = failure.code or ("server_error" if isinstance(error, LocalMistralError) else "error")
    return _encode(writer.fail(failure.message, code))
