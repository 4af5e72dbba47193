"""The small routes: /v1/models, /tokenize, /detokenize, /health, /metrics.

Knows nothing of generating.
"""

from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import JSONResponse, PlainTextResponse, Response

from localmistral.errors import BadRequestError
from localmistral.server.answer_schemas import (
    DETOKENIZED,
    HEALTH,
    MODEL,
    MODELS,
    TOKENS,
    UNHEALTHY,
)
from localmistral.server.chat_request import MESSAGE, TOOL, ChatRequest
from localmistral.server.documentation import health_responses, responses_of, text_responses
from localmistral.server.errors import RETRY_AFTER_S
from localmistral.server.observing import Observer
from localmistral.server.parameters import Count, Flag, Text
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat

MAX_DETOKENIZED = 1 << 20


class TokenizeRequest(BaseModel):
    """A text (`prompt`, or `content` as llama-server calls it), or a conversation."""

    model_config = ConfigDict(extra="ignore")
    model: Text | None = None
    prompt: Text | None = None
    content: Text | None = None
    messages: Any = Field(None, json_schema_extra={"type": "array", "items": MESSAGE})
    tools: Any = Field(None, json_schema_extra={"type": "array", "items": TOOL})
    reasoning_effort: Text | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Flag | None = None
    continue_final_message: Flag | None = None
    add_special_tokens: Flag | None = Field(None, description="Whether BOS is added; yes.")
    add_special: Flag | None = Field(None, description="llama-server's name of it.")
    parse_special: Flag | None = Field(
        None, description="Read control tokens written in the text as such; no."
    )
    with_pieces: Flag | None = Field(
        None, description="llama-server's: every token as an object with its text or bytes."
    )
    return_token_strs: Flag | None = Field(None, description="vLLM's: the texts in `token_strs`.")

    def read_effort(self) -> str | None:
        """As /v1/chat/completions reads it."""
        same = {"reasoning_effort", "chat_template_kwargs"}
        return ChatRequest(**self.model_dump(include=same)).read_effort()


class DetokenizeRequest(BaseModel):
    model_config = ConfigDict(extra="ignore")
    model: Text | None = None
    tokens: list[Count] = Field(max_length=MAX_DETOKENIZED)


def make_plain_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()

    @router.get("/v1/models", responses=responses_of(MODELS))
    def list_models() -> dict[str, Any]:
        """The loaded model, under its id and its aliases."""
        chat = serving.require()
        data = [_describe(serving, chat)]
        return {"object": "list", "data": data}

    @router.get("/v1/models/{name:path}", responses=responses_of(MODEL))
    def show_model(name: str) -> dict[str, Any]:
        """One model."""
        return _describe(serving, serving.require_model(name))

    @router.post("/tokenize", responses=responses_of(TOKENS))
    async def tokenize(body: TokenizeRequest) -> dict[str, Any]:
        """Token ids of a text or of a conversation's prompt."""
        chat = serving.require_model(body.model)
        tokens = await run_in_threadpool(_tokenize, chat, body)
        wants_pieces = body.with_pieces or body.return_token_strs
        pieces = list(map(chat.engine.tokenizer.piece, tokens)) if wants_pieces else []
        answer: dict[str, Any] = {
            "tokens": _pair(tokens, pieces) if body.with_pieces else list(tokens),
            "count": len(tokens),
            "max_model_len": chat.engine.settings.context,
        }
        if body.return_token_strs:
            answer["token_strs"] = [piece.decode("utf-8", "replace") for piece in pieces]
        return answer

    @router.post("/detokenize", responses=responses_of(DETOKENIZED))
    async def detokenize(body: DetokenizeRequest) -> dict[str, Any]:
        """The text of token ids, control tokens spelled out."""
        chat = serving.require_model(body.model)
        text = await run_in_threadpool(_detokenize, chat, body.tokens)
        return {"prompt": text, "content": text}

    @router.get("/health", responses=health_responses(HEALTH, UNHEALTHY))
    def check_health() -> Response:
        """Whether requests can be answered: 503 while loading and after the engine's end."""
        return _health(serving)

    @router.get("/metrics", response_class=PlainTextResponse, responses=text_responses())
    def show_metrics() -> Response:
        """Counts for Prometheus."""
        return Response(observer.render(), media_type=CONTENT_TYPE_LATEST)

    return router


def _describe(serving: Serving, chat: Chat) -> dict[str, Any]:
    names = name_model(chat)
    settings = chat.engine.settings
    return {
        "id": names[0],
        "object": "model",
        "created": serving.created,
        "owned_by": "localmistral",
        "type": "base",
        "capabilities": {
            "completion_chat": chat.can_chat,
            "completion_fim": False,
            "function_calling": chat.can_chat,
            "fine_tuning": False,
            "vision": False,
            "reasoning": chat.has_effort_switch,
            "embeddings": chat.engine.embedder is not None,
        },
        "name": chat.name,
        "aliases": list(names[1:]),
        "max_context_length": settings.context,
        "max_model_len": settings.context,
        "parallel": settings.parallel,
        "quant": chat.shape.file_type_name or None,
        "plan": serving.plan,
    }


def _tokenize(chat: Chat, body: TokenizeRequest) -> tuple[int, ...]:
    if body.messages is not None:
        segments = chat.render(
            body.messages,
            tools=body.tools,
            effort=body.read_effort(),
            add_generation_prompt=body.add_generation_prompt is not False,
            continue_final_message=bool(body.continue_final_message),
        )
        return chat.encode(segments)
    text = body.prompt if body.prompt is not None else body.content
    if text is None:
        raise BadRequestError("There is neither prompt nor messages.", param="prompt")
    tokens = chat.engine.tokenize(text, parse_special=bool(body.parse_special))
    wanted = body.add_special_tokens if body.add_special_tokens is not None else body.add_special
    if wanted is False:
        return tuple(tokens)
    tokenizer = chat.engine.tokenizer
    if not chat.can_chat:  # as /v1/embeddings reads it
        begin, end = tokenizer.frame
        return (*begin, *tokens, *end)
    return (tokenizer.bos, *tokens) if tokenizer.adds_bos else tuple(tokens)


def _pair(tokens: Sequence[int], pieces: Sequence[bytes]) -> list[dict[str, Any]]:
    """llama-server's form: a piece is a text, or a list of bytes where it is none by itself."""
    return [
        {"id": token, "piece": _show(piece)} for token, piece in zip(tokens, pieces, strict=True)
    ]


def _show(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return list(piece)


def _detokenize(chat: Chat, tokens: list[int]) -> str:
    chat.engine.tokenizer.check(tokens, param="tokens")
    return chat.engine.detokenize(tokens)


def _health(serving: Serving) -> Response:
    body: dict[str, Any]
    if serving.failure is not None:
        body = {"status": "error", "message": serving.failure.message}
    elif serving.chat is None:
        body = {"status": "loading", "progress": round(serving.progress, 3)}
    elif not serving.chat.engine.is_alive:
        body = {"status": "error", "message": "The engine has stopped."}
    elif serving.is_draining:
        body = {"status": "draining"}
    else:
        return JSONResponse({"status": "ok"})
    return JSONResponse(body, status_code=503, headers={"Retry-After": str(RETRY_AFTER_S)})
