"""/v1/responses: OpenAI's newer interface, with items, events and remembered conversations.

Knows nothing of how items and events look.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.errors import BadRequestError, LocalMistralError
from localmistral.server.answer_schemas import DELETED, INPUT_TOKENS, RESPONSE, RESPONSE_EVENT
from localmistral.server.call_items import end_after_one_call
from localmistral.server.documentation import responses_of
from localmistral.server.errors import describe, describe_status
from localmistral.server.events import EventStream, JsonAnswer, await_answer, encode_event
from localmistral.server.observing import Observer, observed
from localmistral.server.response_store import ResponseStore, StoredResponse
from localmistral.server.response_writer import ResponseWriter
from localmistral.server.responses_request import ResponsesRequest, read_items
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat


def make_responses_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()
    store = ResponseStore()

    @router.post("/v1/responses", responses=responses_of(RESPONSE, events=RESPONSE_EVENT))
    async def create_response(body: ResponsesRequest, request: Request) -> Response:
        """A response to items, whole or streamed."""
        chat = serving.require_model(body.model)
        body.check()
        history = [*_recall(store, body.previous_response_id), *body.read_input()]
        stream = await run_in_threadpool(_start, chat, body, history)
        items = observed(stream, observer)
        if body.parallel_tool_calls is False:
            items = end_after_one_call(stream, items)
        writer = ResponseWriter(body, name_model(chat)[0])
        if body.stream:
            events = _write_events(items, writer, store, history)
            return EventStream(events, stream.close, lambda error: _encode_error(writer, error))
        work = _finish(items, writer, store, history)
        return JsonAnswer(await await_answer(work, request.receive, stream.close))

    @router.post("/v1/responses/input_tokens", responses=responses_of(INPUT_TOKENS))
    async def count_input_tokens(body: ResponsesRequest) -> dict[str, Any]:
        """How many tokens the prompt of a response has."""
        chat = serving.require_model(body.model)
        history = [*_recall(store, body.previous_response_id), *body.read_input()]
        count = await run_in_threadpool(_count, chat, body, history)
        return {"object": "response.input_tokens", "input_tokens": count}

    @router.get("/v1/responses/{name}", responses=responses_of(RESPONSE))
    def show_response(name: str) -> Response:
        """A response that was stored."""
        found = store.find(name)
        return _unknown(name) if found is None else JsonAnswer(found.body)

    @router.delete("/v1/responses/{name}", responses=responses_of(DELETED))
    def delete_response(name: str) -> Response:
        """Forget a stored response."""
        if not store.remove(name):
            return _unknown(name)
        return JsonAnswer({"id": name, "object": "response", "deleted": True})

    return router


def _unknown(name: str) -> Response:
    failure = describe_status(404, f"There is no response {name[:80]!r} here.")
    return JsonAnswer(failure.to_openai(), status_code=404)


def _recall(store: ResponseStore, name: str | None) -> tuple[dict[str, Any], ...]:
    """The conversation up to an earlier response. Errors: BadRequestError if it's forgotten."""
    if name is None:
        return ()
    found = store.find(name)
    if found is None:
        raise BadRequestError(
            f"previous_response_id {name[:80]!r} is not known here (any more).",
            "Send the whole conversation as input.",
            param="previous_response_id",
        )
    return found.messages


def _start(chat: Chat, body: ResponsesRequest, history: list[dict[str, Any]]) -> ChatStream:
    arguments = body.read_arguments()
    try:
        return chat.stream(_instruct(body, history), **arguments)
    except BadRequestError as error:
        if error.param.startswith("messages"):  # which this client never wrote
            raise type(error)(error.message, error.hint, param="input") from error
        raise


def _count(chat: Chat, body: ResponsesRequest, history: list[dict[str, Any]]) -> int:
    wanted = body.read_arguments()
    tools = None if wanted["tool_choice"] == "none" else wanted["tools"]
    messages = _instruct(body, history)
    return len(chat.encode(chat.render(messages, tools=tools, effort=wanted["effort"])))


def _instruct(body: ResponsesRequest, history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Instructions hold for one response, so they are no part of what is remembered."""
    system = [{"role": "system", "content": body.instructions}] if body.instructions else []
    return [*system, *history]


async def _finish(
    items: AsyncIterator[ChatItem],
    writer: ResponseWriter,
    store: ResponseStore,
    history: list[dict[str, Any]],
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
    history: list[dict[str, Any]],
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
    history: list[dict[str, Any]],
) -> None:
    if writer.request.store is not False:
        messages = (*history, *read_items(writer.output))
        store.put(writer.id, StoredResponse(body=body, messages=messages))


def _encode(event: dict[str, Any]) -> str:
    return encode_event(event, event["type"])


def _encode_error(writer: ResponseWriter, error: Exception) -> str:
    failure = describe(error)
    code = failure.code or ("server_error" if isinstance(error, LocalMistralError) else "error")
    return _encode(writer.fail(failure.message, code))
