"""One request inside the engine: what it still has to compute, and what it has said so far.

Turns chosen tokens into events and decides when the answer ends. Knows nothing of other requests.
"""

import time

import numpy as np

from localmistral.engine.prefixes import Tokens
from localmistral.engine.sampling import Sampler, TokenProbability
from localmistral.engine.sequences import Sequence
from localmistral.engine.settings import Request
from localmistral.engine.stream import (
    Channel,
    FinishReason,
    GenerationResult,
    TextAssembler,
    TokenEvent,
)
from localmistral.engine.tokenizer import Tokenizer
from localmistral.errors import EngineError, LocalMistralError


class Job:
    """A submitted request; everything but `cancelled` belongs to the engine's thread.

    `pending` are the tokens to compute next: the rest of the prompt, or the tokens chosen last.
    The last `guesses` of them are guessed followers that decoding has to confirm.
    """

    def __init__(self, request: Request, channel: Channel) -> None:
        self.request = request
        self.channel = channel
        self.cancelled = False
        self.ended = False
        self.prompt: Tokens = np.asarray(request.prompt, np.int32)
        self.pending: Tokens = self.prompt
        self.guesses = 0
        self.generated: list[int] = []
        self.sequence: Sequence | None = None
        self.sampler: Sampler | None = None
        self.cached_tokens = 0
        self._text = TextAssembler(request.stop)
        self._in_thinking = request.in_thinking
        self._submitted_s = time.monotonic()
        self._started_s: float | None = None
        self._first_token_s: float | None = None

    @property
    def is_prefilling(self) -> bool:
        return not self.generated or len(self.pending) > 1 + self.guesses

    @property
    def place(self) -> Sequence:
        """The sequence of a request that was started."""
        assert self.sequence is not None
        return self.sequence

    def start(self, sequence: Sequence, sampler: Sampler) -> None:
        """The request leaves the queue; `sequence` already holds the reused beginning."""
        self.sequence, self.sampler = sequence, sampler
        self.cached_tokens = sequence.length
        self.pending = self.prompt[sequence.length :]
        self._started_s = time.monotonic()
        sampler.accept_prompt(self.prompt.tolist())

    def restart(self) -> None:
        """The memory was lost from `sequence.length` on: compute the rest again."""
        known = np.concatenate([self.prompt, np.asarray(self.generated, np.int32)])
        self.pending, self.guesses = known[self.place.length :], 0

    def emit(
        self, tokenizer: Tokenizer, token: int, probability: TokenProbability | None, context: int
    ) -> FinishReason | None:
        """Tell the reader of `token`; the reason if the answer ends with it."""
        if self._first_token_s is None:
            self._first_token_s = time.monotonic()
        self.generated.append(token)
        was_in_thinking = self._in_thinking
        if self.request.thinking is not None and token in self.request.thinking:
            self._in_thinking = token == self.request.thinking[0]
        if self._ends_with(tokenizer, token):
            return "stop"
        if tokenizer.is_control(token):
            self._emit_held()
            text = tokenizer.piece(token).decode("utf-8", "replace")
            self._put(TokenEvent(token=token, text=text, control=True, probability=probability))
        else:
            seek = not (was_in_thinking or self._in_thinking or self._is_short)
            text = self._text.push(tokenizer.piece(token), seek=seek)
            self._put(TokenEvent(token=token, text=text, probability=probability))
        if self._text.stop_text is not None:
            return "stop"
        used = len(self.prompt) + len(self.generated)
        limit = self.request.max_tokens
        full = used >= context or (limit is not None and len(self.generated) >= limit)
        return "length" if full else None

    def list_held_back(self, tokenizer: Tokenizer) -> tuple[int, ...]:
        """The tokens that would end the answer before it is as long as it has to be."""
        if not self.request.min_tokens:
            return ()
        return (*tokenizer.list_ends(), *self.request.stop_tokens)

    @property
    def _is_short(self) -> bool:
        return len(self.generated) < self.request.min_tokens

    def _ends_with(self, tokenizer: Tokenizer, token: int) -> bool:
        is_own_end = tokenizer.is_end(token) and not self.request.ignore_eos
        return is_own_end or token in self.request.stop_tokens

    def flush(self) -> None:
        """Let out what is held back: something else comes in between."""
        self._emit_held()

    def _emit_held(self) -> None:
        held = self._text.flush()
        if held:
            self._put(TokenEvent(token=None, text=held))

    def _put(self, event: TokenEvent) -> None:
        self.channel.put(event)

    def finish(self, reason: FinishReason) -> None:
        """The answer is complete: the last held text, then the result."""
        if self._text.stop_text is None:
            self._emit_held()
        self.ended = True
        now = time.monotonic()
        started = now if self._started_s is None else self._started_s
        first = now if self._first_token_s is None else self._first_token_s
        self.channel.put(
            GenerationResult(
                finish_reason=reason,
                stop_text=self._text.stop_text,
                prompt_tokens=len(self.prompt),
                cached_tokens=self.cached_tokens,
                completion_tokens=len(self.generated),
                queue_s=started - self._submitted_s,
                prefill_s=first - started,
                decode_s=now - first,
                seed=0 if self.sampler is None else self.sampler.seed,
            )
        )

    def fail(self, error: Exception) -> None:
        """The reader gets `error`, in our own terms."""
        self.ended = True
        known = error if isinstance(error, LocalMistralError) else _convert(error)
        self.channel.put(known)


def _convert(error: Exception) -> EngineError:
    converted = EngineError(f"The engine met a {type(error).__name__}: {error}.")
    converted.__cause__ = error
    return converted
