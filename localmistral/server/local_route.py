"""What `localmistral run` asks of a server on the same machine instead of loading a model again.

It is told exactly what a chat of its own would tell: the same items, the same result, the same
errors with their hints. Only who can read the server's runtime file has the key to it. Not part
of the public interface, and absent from /openapi.json.
"""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Header
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, Response

from localmistral.answer import ChatItem, ChatStream
from localmistral.engine import TokenProbability
from localmistral.errors import LocalMistralError
from localmistral.server.errors import describe
from localmistral.server.events import EventStream, encode_event
from localmistral.server.observing import Observer, observed
from localmistral.server.parameters import Count, Text
from localmistral.server.serving import Serving
from localmistral.server.wire import (
    CHALLENGE_HEADER,
    PROOF_PATH,
    STREAM_PATH,
    decode_spec,
    encode_error,
    encode_item,
    prove,
)
from localmistral.session import Chat


class LocalRequest(BaseModel):
    """Arguments of `Chat.stream`."""

    model_config = ConfigDict(extra="forbid")
    messages: Any
    tools: Any = None
    effort: Text | None = None
    max_tokens: Count | None = None
    sampling: dict[str, Any] | None = None
    output: dict[str, Any] | None = None
    thinking_budget: Count | None = None


def make_local_router(serving: Serving, observer: Observer, token: str) -> APIRouter:
    router = APIRouter(include_in_schema=False)

    @router.get(PROOF_PATH)
    def give_proof(challenge: str = Header(alias=CHALLENGE_HEADER)) -> dict[str, Any]:
        """That this is the server whose runtime file the client has read, and that it serves."""
        serving.require()
        return {"proof": prove(token, challenge)}

    @router.post(STREAM_PATH)
    async def stream_answer(body: LocalRequest) -> Response:
        """One answer, every item an event."""
        try:
            stream = await run_in_threadpool(_start, serving.require(), body)
        except LocalMistralError as error:
            return JSONResponse({"error": encode_error(error)}, describe(error).status)
        return EventStream(_write(observed(stream, observer)), stream.close, _encode_failure)

    return router


def _start(chat: Chat, body: LocalRequest) -> ChatStream:
    return chat.stream(
        body.messages,
        tools=body.tools,
        effort=body.effort,
        max_tokens=body.max_tokens,
        sampling=body.sampling,
        output=decode_spec(body.output),
        thinking_budget=body.thinking_budget,
    )


async def _write(items: AsyncIterator[ChatItem]) -> AsyncIterator[str]:
    async for item in items:
        if not isinstance(item, TokenProbability):
            yield encode_event(encode_item(item))


def _encode_failure(error: Exception) -> str:
    if isinstance(error, LocalMistralError):
        return encode_event({"error": encode_error(error)})
    return encode_event(describe(error).to_openai())
