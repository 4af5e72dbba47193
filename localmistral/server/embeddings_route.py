"""POST /v1/embeddings: texts to vectors, where the model was made for that.

Knows nothing of how a vector is computed.
"""

import base64
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.engine import Embedder
from localmistral.engine.embedding import Vectors, normalise
from localmistral.errors import BadRequestError, ContextOverflowError
from localmistral.server.answer_schemas import EMBEDDINGS
from localmistral.server.documentation import responses_of
from localmistral.server.events import JsonAnswer, await_answer
from localmistral.server.parameters import Count, Text
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat

MAX_INPUTS = 2048
"""OpenAI's own."""
_AT_ONCE = 32
"""Texts between two looks at whether the client is still there."""

TokenIds = Annotated[list[Count], Field(min_length=1)]


class EmbeddingsRequest(BaseModel):
    """OpenAI's request, with Mistral's names for the same; unknown fields are ignored."""

    model_config = ConfigDict(extra="ignore")

    model: Text | None = None
    input: Text | TokenIds | list[Text] | list[TokenIds] = Field(
        description="A text, token ids, or a list of either."
    )
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Count | None = Field(None, description="Keep the first N values, scaled anew.")
    output_dimension: Count | None = Field(None, description="Mistral's name of dimensions.")
    output_dtype: Literal["float"] | None = None
    user: Text | None = None

    def list_inputs(self) -> list[str | list[int]]:
        """Each input by itself. Errors: BadRequestError for none, an empty one, or too many."""
        raw: Any = self.input
        is_one = isinstance(raw, str) or (bool(raw) and isinstance(raw[0], int))
        inputs: list[str | list[int]] = [raw] if is_one else list(raw)
        if not 1 <= len(inputs) <= MAX_INPUTS:
            raise BadRequestError(
                f"There are {len(inputs)} inputs, 1 to {MAX_INPUTS} are taken.", param="input"
            )
        for number, each in enumerate(inputs):
            if not each:
                where = "input" if is_one else f"input[{number}]"
                raise BadRequestError(f"{where} is empty.", param=where)
        return inputs

    def read_dimensions(self, size: int) -> int:
        """How many values of a vector are wanted. Errors: BadRequestError."""
        name = "dimensions" if self.dimensions is not None else "output_dimension"
        wanted: int | None = getattr(self, name)
        if wanted is None:
            return size
        if not 1 <= wanted <= size:
            raise BadRequestError(
                f"{name} is {wanted}, the model's vectors have {size} values.",
                f"Use 1 to {size}.",
                param=name,
            )
        return wanted


def make_embeddings_router(serving: Serving) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/embeddings", responses=responses_of(EMBEDDINGS))
    async def create_embeddings(body: EmbeddingsRequest, request: Request) -> Response:
        """A vector for every text, of length 1, in the order of the texts."""
        chat = serving.require_model(body.model)
        embedder = _require_embedder(chat)
        dimensions = body.read_dimensions(embedder.size)
        texts = await run_in_threadpool(_tokenize, chat, body.list_inputs(), embedder.limit)
        work = _embed(embedder, texts)
        vectors = await await_answer(work, request.receive, lambda: None)
        data = [
            {"object": "embedding", "index": index, "embedding": _encode(vector, body)}
            for index, vector in enumerate(_shorten(vectors, dimensions))
        ]
        count = sum(map(len, texts))
        usage = {"prompt_tokens": count, "total_tokens": count}
        model = name_model(chat)[0]
        return JsonAnswer({"object": "list", "data": data, "model": model, "usage": usage})

    return router


def _require_embedder(chat: Chat) -> Embedder:
    embedder = chat.engine.embedder
    if embedder is None:
        raise BadRequestError(
            f"{name_model(chat)[0]} makes no embeddings: its file names no pooling.",
            "Serve an embedding model.",
            param="model",
        )
    return embedder


def _tokenize(chat: Chat, inputs: Sequence[str | list[int]], limit: int) -> list[list[int]]:
    """Token ids, with what the vocabulary puts around a text (BOS and EOS, CLS and SEP). Errors:
    ContextOverflowError for one that is longer than the context."""
    tokenizer = chat.engine.tokenizer
    begin, end = tokenizer.frame
    found = []
    for number, each in enumerate(inputs):
        where = "input" if len(inputs) == 1 else f"input[{number}]"
        tokens = [*begin, *tokenizer.encode(each), *end] if isinstance(each, str) else each
        tokenizer.check(tokens, param=where)
        if len(tokens) > limit:
            raise ContextOverflowError(
                f"{where} has {len(tokens)} tokens, the context holds {limit}.",
                "Cut it into pieces.",
                param=where,
            )
        found.append(tokens)
    return found


async def _embed(embedder: Embedder, texts: list[list[int]]) -> Vectors:
    """In pieces, so that one that nobody waits for any more ends soon."""
    pieces = [texts[start : start + _AT_ONCE] for start in range(0, len(texts), _AT_ONCE)]
    found = [await run_in_threadpool(embedder.embed, piece) for piece in pieces]
    return np.concatenate(found)


def _shorten(vectors: Vectors, dimensions: int) -> Vectors:
    """The first values of each, of length 1 again."""
    if dimensions == vectors.shape[1]:
        return vectors
    return normalise(vectors[:, :dimensions])


def _encode(vector: Vectors, body: EmbeddingsRequest) -> list[float] | str:
    if body.encoding_format == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]
