"""POST /v1/completions: text that goes on from a prompt, without any chat format.

The prompt's control tokens count as such, as in llama-server: who writes a prompt by hand writes
those too. Knows nothing of conversations.
"""

import codecs
import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fastapi import APIRouter, Request
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.engine import GenerationResult, Stream, TokenEvent, TokenProbability
from localmistral.engine import Request as EngineRequest
from localmistral.errors import BadRequestError, ContextOverflowError
from localmistral.server.answer_schemas import COMPLETION
from localmistral.server.completions_request import CompletionRequest
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
from localmistral.server.observing import Observer
from localmistral.server.parameters import named_output
from localmistral.server.serving import Serving, name_model
from localmistral.server.token_logprobs import LOWEST_LOGPROB, TokenQueue, cut_stop
from localmistral.session import Chat


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One text under way."""

    index: int
    stream: Stream
    prefix: str  # the prompt where it is to be repeated


class _Offset:
    """The place of each token in a text, in characters, from `start` on."""

    def __init__(self, start: int) -> None:
        self._next = start
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def step(self, piece: bytes) -> int:
        """Where the token with these bytes begins."""
        place = self._next
        self._next += len(self._decoder.decode(piece))
        return place


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What all choices of one response share."""

    chat: Chat
    has_logprobs: bool
    has_stops: bool
    per_prompt: int  # texts made of one prompt
    told: int  # texts of one prompt that the client gets
    id: str = field(default_factory=lambda: f"cmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def build(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> dict[str, Any]:
        body: dict[str, Any] = {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": name_model(self.chat)[0],
            "choices": choices,
        }
        return body if usage is None else {**body, "usage": usage}

    def choice(
        self,
        index: int,
        text: str,
        tokens: Sequence[TokenProbability],
        finish: str | None,
        *,
        offset: "_Offset",
    ) -> dict[str, Any]:
        """`offset` goes on by `tokens`."""
        logprobs = self._logprobs(tokens, offset) if self.has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[TokenProbability], offset: "_Offset") -> dict[str, Any]:
        pieces = [self.chat.engine.tokenizer.piece(found.token) for found in tokens]
        return {
            "tokens": [self._spell(found.token) for found in tokens],
            "token_logprobs": [max(found.logprob, LOWEST_LOGPROB) for found in tokens],
            "top_logprobs": [
                {
                    self._spell(token): max(logprob, LOWEST_LOGPROB)
                    # the chosen token counts in any case, and where two are spelled the same
                    for token, logprob in (*found.alternatives, (found.token, found.logprob))
                }
                for found in tokens
            ],
            "text_offset": [offset.step(piece) for piece in pieces],
        }

    def _spell(self, token: int) -> str:
        return self.chat.engine.tokenizer.piece(token).decode("utf-8", "replace")


def make_completions_router(serving: Serving, observer: Observer) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=responses_of(COMPLETION, events=COMPLETION))
    async def create_completion(body: CompletionRequest, request: Request) -> Response:
        """Text that goes on from each prompt, whole or streamed."""
        chat = serving.require_model(body.model)
        body.check()
        choices = await run_in_threadpool(_start, chat, body)
        answer = _Answer(
            chat=chat,
            has_logprobs=body.logprobs is not None,
            has_stops=bool(body.stop),
            per_prompt=body.per_prompt,
            told=body.count_choices(),
        )

        def close() -> None:
            for choice in choices:
                choice.stream.close()

        if body.stream:
            has_usage = bool(body.stream_options and body.stream_options.include_usage)
            events = _write_events(choices, answer, observer, has_usage=has_usage)
            return EventStream(events, close, encode_openai_error)
        work = _collect(choices, answer, observer)
        return JsonAnswer(await await_answer(work, request.receive, close))

    return router


def _start(chat: Chat, body: CompletionRequest) -> list[_Choice]:
    chat.require_writer()
    prompts = [_read_prompt(chat, prompt, body.suffix) for prompt in body.list_prompts()]
    _check_room(chat, len(prompts) * body.per_prompt)
    field, output = body.read_output()
    choices: list[_Choice] = []
    with contextlib.ExitStack() as started, named_output(field):
        for tokens, text in prompts:
            for sampling in body.vary_sampling(body.per_prompt):
                request = EngineRequest(
                    prompt=tokens,
                    max_tokens=body.read_max_tokens(),
                    stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
                    sampling=chat.set_sampling(sampling),
                    cache_prompt=body.cache_prompt is not False,
                    top_logprobs=body.needed_logprobs,
                    constraint=chat.constrain(output),
                    **body.read_endings(),
                )
                stream = started.enter_context(_submit(chat, request))
                prefix = text if body.echo else ""
                choices.append(_Choice(index=len(choices), stream=stream, prefix=prefix))
        started.pop_all()
    return choices


def _submit(chat: Chat, request: EngineRequest) -> Stream:
    try:
        return chat.engine.submit(request)
    except ContextOverflowError as error:
        raise ContextOverflowError(error.message, error.hint, param="prompt") from error


def _check_room(chat: Chat, texts: int) -> None:
    """Errors: BadRequestError for more texts than there is ever room for at once."""
    settings = chat.engine.settings
    room = settings.parallel + settings.queue
    if texts > room:
        raise BadRequestError(
            f"prompt and n make {texts} texts, at most {room} fit into the queue.",
            "Send them in several requests.",
            param="prompt",
        )


def _read_prompt(
    chat: Chat, prompt: str | list[int], suffix: str | None
) -> tuple[tuple[int, ...], str]:
    """Token ids and text of a prompt, with what fills in the middle where a suffix is given."""
    engine = chat.engine
    if isinstance(prompt, list):
        engine.tokenizer.check(prompt, param="prompt")
        tokens, text = prompt, engine.detokenize(prompt)
    else:
        tokens, text = engine.tokenize(prompt, parse_special=True), prompt
    if suffix:
        tokens = _fill_in(chat, tokens, engine.tokenize(suffix))
    is_begun = bool(tokens) and tokens[0] == engine.tokenizer.bos
    begin = [engine.tokenizer.bos] if engine.tokenizer.adds_bos and not is_begun else []
    if isinstance(prompt, list) and not suffix:
        begin = []  # ids are taken as they are
    elif not (begin or tokens):
        begin = [_find_beginning(chat)]
    return (*begin, *tokens), text


def _find_beginning(chat: Chat) -> int:
    """What a new text begins after: BOS, or the end of the one before it."""
    tokenizer = chat.engine.tokenizer
    found = next((token for token in (tokenizer.bos, tokenizer.eos) if token >= 0), None)
    if found is None:
        raise BadRequestError(
            "The prompt has 0 tokens, and this model has no token to begin with.", param="prompt"
        )
    return found


def _fill_in(chat: Chat, before: list[int], after: list[int]) -> list[int]:
    """Prefix, suffix, middle: the order that models with such tokens were trained on."""
    special = chat.shape.tokenizer.special
    marks = (special.fim_prefix, special.fim_suffix, special.fim_middle)
    if None in marks:
        raise BadRequestError(
            f"{name_model(chat)[0]} can't fill in text before a suffix: it has no tokens for that.",
            "Leave suffix out.",
            param="suffix",
        )
    prefix, suffix, middle = (mark for mark in marks if mark is not None)
    return [prefix, *before, suffix, *after, middle]


async def _collect(choices: list[_Choice], answer: _Answer, observer: Observer) -> dict[str, Any]:
    texts = [choice.prefix for choice in choices]
    tokens: list[list[TokenProbability]] = [[] for _ in choices]
    async for index, event in merge([aiter(choice.stream) for choice in choices]):
        if event.probability is not None:
            tokens[index].append(event.probability)
        texts[index] += event.text
    results = [_result(choice.stream, observer) for choice in choices]
    kept = [
        cut_stop(answer.chat.engine, of, result.stop_text)
        for of, result in zip(tokens, results, strict=True)
    ]
    built = [
        answer.choice(
            place, texts[n], kept[n], _finish_reason(results[n]),
            offset=_Offset(len(choices[n].prefix)),
        )
        for place, n in enumerate(_choose(answer, kept))
    ]  # fmt: skip
    return answer.build(built, _usage(results, answer.per_prompt))


def _choose(answer: _Answer, tokens: list[list[TokenProbability]]) -> list[int]:
    """The texts to tell: of every prompt those with the highest mean log-probability a token."""
    if answer.told == answer.per_prompt:
        return list(range(len(tokens)))

    def rate(number: int) -> float:
        found = [token.logprob for token in tokens[number]]
        return sum(found) / len(found) if found else 0.0

    groups = range(0, len(tokens), answer.per_prompt)
    return [
        number
        for first in groups
        for number in sorted(range(first, first + answer.per_prompt), key=rate, reverse=True)[
            : answer.told
        ]
    ]


async def _write_events(
    choices: list[_Choice], answer: _Answer, observer: Observer, *, has_usage: bool
) -> AsyncIterator[str]:
    writers = [_ChunkWriter(answer, choice) for choice in choices]
    for writer in writers:
        for first in writer.begin():
            yield encode_event(first)
    async for index, event in merge([_ended(choice) for choice in choices]):
        for chunk in writers[index].write(event):
            yield encode_event(chunk)
    results = [_result(choice.stream, observer) for choice in choices]
    if has_usage:
        yield encode_event(answer.build([], _usage(results, answer.per_prompt)))
    yield DONE


class _ChunkWriter:
    """Chunks of one text."""

    def __init__(self, answer: _Answer, choice: _Choice) -> None:
        self._answer = answer
        self._choice = choice
        self._tokens = TokenQueue(answer.chat.engine, has_stops=answer.has_stops)
        self._offset = _Offset(len(choice.prefix))

    def begin(self) -> Iterator[dict[str, Any]]:
        if self._choice.prefix:
            yield self._build(self._choice.prefix, [])

    def write(self, event: TokenEvent | GenerationResult) -> Iterator[dict[str, Any]]:
        if isinstance(event, GenerationResult):
            rest = self._tokens.end(event.stop_text)
            yield self._build("", rest, _finish_reason(event))
            return
        self._tokens.add_text(event.text)
        found = event.probability
        tokens = [] if found is None else self._tokens.add_token(found)
        if event.text or tokens:
            yield self._build(event.text, tokens)

    def _build(
        self, text: str, tokens: list[TokenProbability], finish: str | None = None
    ) -> dict[str, Any]:
        index = self._choice.index
        choice = self._answer.choice(index, text, tokens, finish, offset=self._offset)
        return self._answer.build([choice], None)


async def _ended(choice: _Choice) -> AsyncIterator[TokenEvent | GenerationResult]:
    """The events of a text, then how it ended."""
    async for event in choice.stream:
        yield event
    assert choice.stream.result is not None
    yield choice.stream.result


def _result(stream: Stream, observer: Observer) -> GenerationResult:
    result = stream.result
    assert result is not None
    observer.observe(result.queue_s + result.prefill_s, result.decode_s, result.completion_tokens)
    return result


def _finish_reason(result: GenerationResult) -> str:
    return "stop" if result.finish_reason == "cancelled" else result.finish_reason


def _usage(results: Sequence[GenerationResult], per_prompt: int) -> dict[str, Any]:
    """Counts of tokens; every prompt counts once, whatever the number of its texts."""
    prompt = sum(result.prompt_tokens for result in results[::per_prompt])
    cached = sum(result.cached_tokens for result in results[::per_prompt])
    completion = sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": cached},
    }
