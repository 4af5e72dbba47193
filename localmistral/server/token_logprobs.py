"""Log-probabilities of tokens in OpenAI's form.

Knows nothing of the responses they stand in.
"""

from collections.abc import Sequence
from typing import Any

from localmistral.engine import Engine, TokenProbability

LOWEST_LOGPROB = -9999.0
"""JSON has no infinity; this is what OpenAI writes for "as good as impossible"."""


def describe_token(engine: Engine, found: TokenProbability) -> dict[str, Any]:
    """A token of an answer, with the alternatives that were asked for."""
    others = [_describe(engine, token, logprob) for token, logprob in found.alternatives]
    return {**_describe(engine, found.token, found.logprob), "top_logprobs": others}


def _describe(engine: Engine, token: int, logprob: float) -> dict[str, Any]:
    data = engine.tokenizer.piece(token)
    text = data.decode("utf-8", "replace")
    return {"token": text, "logprob": max(logprob, LOWEST_LOGPROB), "bytes": list(data)}


class TokenQueue:
    """Tokens of one streamed answer on their way out: each waits until its text is final.

    Text that a stop string may begin in is held back, and so are its tokens: those of a stop
    string that came are never told.
    """

    def __init__(self, engine: Engine, *, has_stops: bool) -> None:
        self._engine = engine
        self._has_stops = has_stops
        self._waiting: list[TokenProbability] = []
        self._final_bytes = 0  # of text that came out beyond the tokens that did

    def add_text(self, text: str) -> None:
        """`text` has become final."""
        self._final_bytes += len(text.encode("utf-8", "replace"))

    def add_token(self, found: TokenProbability) -> list[TokenProbability]:
        """The tokens that may be told now that this one has come, after the text it made final."""
        self._waiting.append(found)
        if not self._has_stops:
            return self._take(len(self._waiting))
        count = 0
        for token in self._waiting:
            size = len(self._engine.tokenizer.piece(token.token))
            if size > self._final_bytes:
                break
            self._final_bytes -= size
            count += 1
        return self._take(count)

    def end(self, stop_text: str | None) -> list[TokenProbability]:
        """The rest, once the answer has ended, with that stop string if any."""
        return cut_stop(self._engine, self._take(len(self._waiting)), stop_text)

    def _take(self, count: int) -> list[TokenProbability]:
        taken, self._waiting = self._waiting[:count], self._waiting[count:]
        return taken


def cut_stop(
    engine: Engine, tokens: Sequence[TokenProbability], stop_text: str | None
) -> list[TokenProbability]:
    """`tokens` of an answer without those of the stop string that ended it, if one did; a token
    that the stop string begins inside of is a part of the answer."""
    if not stop_text:
        return list(tokens)
    stop, end = stop_text.encode("utf-8", "replace"), b""
    for number in range(len(tokens) - 1, -1, -1):
        piece = engine.tokenizer.piece(tokens[number].token)
        end = piece + end
        found = end.find(stop)
        if found >= 0:
            return list(tokens[: number + (found > 0)])
    return list(tokens)
