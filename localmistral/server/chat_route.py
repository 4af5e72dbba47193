"""POST /v1/chat/completions.

Starts one stream an answer, and writes what comes out of them in OpenAI's form.
"""

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.answer import ChatItem, ChatResult, ChatStream
from localmistral.chatformat.parser import ContentDelta
from localmistral.engine import TokenProbability
from localmistral.server.answer_schemas import CHAT, CHAT_CHUNK
from localmistral.server.call_items import end_after_one_call, join_calls
from localmistral.server.chat_request import ChatRequest
from localmistral.server.chat_response import ChatAnswer
from localmistral.server.documentation import responses_of
from localmistral.server.events import (
    DONE,
    EventStream,
    JsonAnswer,
    await_answer,
    encode_event,
    encode_openai_error,
    merge,
)
from localmistral.server.observing import Observer, observed
from localmistral.server.parameters import named_output
from localmistral.server.serving import Serving, name_model
from localmistral.server.token_logprobs import TokenQueue
from localmistral.session import Chat

_MISTRAL_CLIENT = "mistral-client"


def make_chat_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=responses_of(CHAT, events=CHAT_CHUNK))
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """An answer to a conversation, whole or streamed."""
        chat = serving.require_model(body.model)
        answer = ChatAnswer(
            model=name_model(chat)[0],
            format=body.read_format(),
            engine=chat.engine,
            has_logprobs=bool(body.logprobs),
        )
        streams = await run_in_threadpool(start_streams, chat, body)
        items = [observed(stream, observer) for stream in streams]
        if body.parallel_tool_calls is False:
            pairs = zip(streams, items, strict=True)
            items = [end_after_one_call(stream, of) for stream, of in pairs]
        if body.read_format() == "mistral" or _is_mistral_client(request):
            items = [join_calls(of) for of in items]

        def close() -> None:
            for stream in streams:
                stream.close()

        if body.stream:
            has_usage = bool(body.stream_options and body.stream_options.include_usage)
            writers = [
                _ChunkWriter(answer, index, has_stops=bool(body.stop))
                for index in range(len(items))
            ]
            events = _write_events(items, writers, has_usage=has_usage)
            return EventStream(events, close, encode_openai_error)
        collected = await await_answer(_collect(items), request.receive, close)
        return JsonAnswer(answer.whole([c[0] for c in collected], [c[1] for c in collected]))

    return router


def _is_mistral_client(request: Request) -> bool:
    """Mistral's own client can't read a call in pieces; others mind neither."""
    return request.headers.get("user-agent", "").startswith(_MISTRAL_CLIENT)


def start_streams(chat: Chat, body: ChatRequest) -> list[ChatStream]:
    """One stream an answer; none is left running if a later one can't be started."""
    field, output = body.read_output()
    arguments = {**body.read_arguments(), "output": output}
    count = body.count_choices()
    with contextlib.ExitStack() as started, named_output(field):
        streams = [
            started.enter_context(chat.stream(body.messages, sampling=sampling, **arguments))
            for sampling in body.vary_sampling(count)
        ]
        started.pop_all()
    return streams


async def _collect(
    items: list[AsyncIterator[ChatItem]],
) -> list[tuple[ChatResult, list[TokenProbability]]]:
    tokens: list[list[TokenProbability]] = [[] for _ in items]
    results: dict[int, ChatResult] = {}
    async for index, item in merge(items):
        if isinstance(item, TokenProbability):
            tokens[index].append(item)
        elif isinstance(item, ChatResult):
            results[index] = item
    return [(results[index], tokens[index]) for index in range(len(items))]


async def _write_events(
    items: list[AsyncIterator[ChatItem]], writers: list["_ChunkWriter"], *, has_usage: bool
) -> AsyncIterator[str]:
    for writer in writers:
        yield encode_event(writer.begin())
    results: dict[int, ChatResult] = {}
    async for index, item in merge(items):
        if isinstance(item, ChatResult):
            results[index] = item
        for chunk in writers[index].write(item):
            yield encode_event(chunk)
    if has_usage:
        yield encode_event(writers[0].answer.usage_chunk([results[n] for n in sorted(results)]))
    yield DONE


class _ChunkWriter:
    """Chunks of one choice; with log-probabilities, each text comes together with its tokens."""

    def __init__(self, answer: ChatAnswer, index: int, *, has_stops: bool) -> None:
        self.answer = answer
        self._index = index
        self._text = ""
        self._tokens = TokenQueue(answer.engine, has_stops=has_stops)

    def begin(self) -> dict[str, Any]:
        return self.answer.begin(self._index)

    def write(self, item: ChatItem) -> Iterator[dict[str, Any]]:
        if self.answer.has_logprobs and isinstance(item, ContentDelta):
            self._text += item.text
            self._tokens.add_text(item.text)
            return
        if isinstance(item, TokenProbability):
            if self.answer.has_logprobs:
                yield from self._let_out(self._tokens.add_token(item))
            return
        # what is left, such as text that was kept for a stop string that never came
        rest = self._tokens.end(item.stop_text) if isinstance(item, ChatResult) else []
        yield from self._let_out(rest)
        chunk = self.answer.chunk(self._index, item)
        if chunk is not None:
            yield chunk

    def _let_out(self, tokens: list[TokenProbability]) -> Iterator[dict[str, Any]]:
        text, self._text = self._text, ""
        if tokens:
            yield self.answer.content_chunk(self._index, text, tokens)
        elif text:
            chunk = self.answer.chunk(self._index, ContentDelta(text=text))
            assert chunk is not None
            yield chunk
