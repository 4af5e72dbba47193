"""POST /v1/completions: text that goes on from a prompt, without any chat format.

The prompt's control tokens count as such, as in llama-server: who writes a prompt by hand writes
those too. Knows nothing of conversations.
"""

import contextlib
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any

from fastapi import APIRouter, Request
from pydantic import Field
from starlette.concurrency import run_in_threadpool
from starlette.responses import Response

from localmistral.engine import GenerationResult, Stream, TokenEvent, TokenProbability
from localmistral.engine import Request as EngineRequest
from localmistral.errors import BadRequestError, ContextOverflowError
from localmistral.server.answer_schemas import COMPLETION
from localmistral.server.chat_request import StreamOptions
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
from localmistral.server.parameters import (
    Count,
    Flag,
    OutputParameters,
    SamplingParameters,
    Text,
    check_count,
)
from localmistral.server.serving import Serving, name_model
from localmistral.session import Chat

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own for this route."""
MAX_PROMPTS = 64
MAX_LOGPROBS = 20
LOWEST_LOGPROB = -9999.0
"""JSON has no infinity."""

TokenIds = Annotated[list[Count], Field(min_length=1)]


class CompletionRequest(SamplingParameters, OutputParameters):
    """OpenAI's completion request with the fields that llama.cpp and vLLM add."""

    model: Text | None = None
    prompt: Text | TokenIds | list[Text] | list[TokenIds] = Field(
        description="A text, token ids, or a list of either."
    )
    suffix: Text | None = Field(None, description="What follows the text to be written.")
    echo: Flag | None = Field(None, description="Begin the answer with the prompt.")
    max_tokens: Count | None = None
    logprobs: Count | None = Field(None, description="Alternatives per token, 0 to 20.")
    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    def list_prompts(self) -> list[str | list[int]]:
        """Each prompt by itself. Errors: BadRequestError for none, or too many."""
        raw: Any = self.prompt
        is_one = isinstance(raw, str) or (bool(raw) and isinstance(raw[0], int))
        prompts: list[str | list[int]] = [raw] if is_one else list(raw)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise BadRequestError(
                f"There are {len(prompts)} prompts, 1 to {MAX_PROMPTS} are taken.", param="prompt"
            )
        return prompts

    def check(self) -> None:
        """Errors: BadRequestError for what is out of range, or can't be had together."""
        check_count("max_tokens", self.max_tokens)
        if self.logprobs is not None and not 0 <= self.logprobs <= MAX_LOGPROBS:
            raise BadRequestError(
                f"logprobs is {self.logprobs}, it must be between 0 and {MAX_LOGPROBS}.",
                param="logprobs",
            )
        if self.echo and self.logprobs is not None:
            raise BadRequestError(
                "echo with logprobs asks for those of the prompt, which aren't computed.",
                "Leave one of them out.",
                param="echo",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Choice:
    """One text under way."""

    index: int
    stream: Stream
    prefix: str  # the prompt where it is to be repeated


@dataclass(frozen=True, slots=True, kw_only=True)
class _Answer:
    """What all choices of one response share."""

    chat: Chat
    has_logprobs: bool
    per_prompt: int  # texts of one prompt
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
        tokens: Sequence[tuple[TokenProbability, int]],
        finish: str | None,
    ) -> dict[str, Any]:
        """`tokens` with the place of each in the whole text."""
        logprobs = self._logprobs(tokens) if self.has_logprobs else None
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}

    def _logprobs(self, tokens: Sequence[tuple[TokenProbability, int]]) -> dict[str, Any]:
        return {
            "tokens": [self._spell(found.token) for found, _ in tokens],
            "token_logprobs": [max(found.logprob, LOWEST_LOGPROB) for found, _ in tokens],
            "top_logprobs": [
                {self._spell(t): max(p, LOWEST_LOGPROB) for t, p in found.alternatives}
                for found, _ in tokens
            ],
            "text_offset": [offset for _, offset in tokens],
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
            per_prompt=body.count_choices(),
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
    prompts = [_read_prompt(chat, prompt, body.suffix) for prompt in body.list_prompts()]
    count = body.count_choices()
    _check_room(chat, len(prompts) * count)
    choices: list[_Choice] = []
    with contextlib.ExitStack() as started:
        for tokens, text in prompts:
            for sampling in body.vary_sampling(count):
                request = EngineRequest(
                    prompt=tokens,
                    max_tokens=body.max_tokens or DEFAULT_MAX_TOKENS,
                    stop=(body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
                    sampling=chat.set_sampling(sampling),
                    cache_prompt=body.cache_prompt is not False,
                    top_logprobs=body.logprobs,
                    ignore_eos=bool(body.ignore_eos),
                    constraint=chat.constrain(body.read_output()),
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
    return (*begin, *tokens), text


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
    tokens: list[list[tuple[TokenProbability, int]]] = [[] for _ in choices]
    async for index, event in merge([aiter(choice.stream) for choice in choices]):
        if event.probability is not None:
            tokens[index].append((event.probability, len(texts[index])))
        texts[index] += event.text
    results = [_result(choice.stream, observer) for choice in choices]
    built = [
        answer.choice(n, texts[n], tokens[n], _finish_reason(result))
        for n, result in enumerate(results)
    ]
    return answer.build(built, _usage(results, answer.per_prompt))


async def _write_events(
    choices: list[_Choice], answer: _Answer, observer: Observer, *, has_usage: bool
) -> AsyncIterator[str]:
    lengths = [0] * len(choices)
    for choice in choices:
        if choice.prefix:
            lengths[choice.index] = len(choice.prefix)
            first = answer.choice(choice.index, choice.prefix, [], None)
            yield encode_event(answer.build([first], None))
    async for index, event in merge([_ended(choice) for choice in choices]):
        if isinstance(event, GenerationResult):
            last = answer.choice(index, "", [], _finish_reason(event))
            yield encode_event(answer.build([last], None))
            continue
        found = event.probability
        tokens = [] if found is None else [(found, lengths[index])]
        lengths[index] += len(event.text)
        if event.text or tokens:
            yield encode_event(answer.build([answer.choice(index, event.text, tokens, None)], None))
    results = [_result(choice.stream, observer) for choice in choices]
    if has_usage:
        yield encode_event(answer.build([], _usage(results, answer.per_prompt)))
    yield DONE


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
    completion = sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(r.cached_tokens for r in results)},
    }
