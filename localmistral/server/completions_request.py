"""The body of /v1/completions, and what it asks for.

Knows nothing of answers.
"""

from typing import Annotated, Any

from pydantic import Field

from localmistral.errors import BadRequestError
from localmistral.server.chat_request import StreamOptions
from localmistral.server.parameters import (
    MAX_CHOICES,
    NO_LIMIT,
    Count,
    Flag,
    OutputParameters,
    SamplingParameters,
    Text,
    check_count,
)

DEFAULT_MAX_TOKENS = 16
"""OpenAI's own for this route."""
MAX_PROMPTS = 64
MAX_LOGPROBS = 20

TokenIds = Annotated[list[Count], Field(min_length=1)]


class CompletionRequest(SamplingParameters, OutputParameters):
    """OpenAI's completion request with the fields that llama.cpp and vLLM add."""

    model: Text | None = None
    prompt: Text | TokenIds | list[Text] | list[TokenIds] | None = Field(
        None, description="A text, token ids, or a list of either; absent: a new text."
    )
    suffix: Text | None = Field(None, description="What follows the text to be written.")
    echo: Flag | None = Field(None, description="Begin the answer with the prompt.")
    max_tokens: Count | None = None
    best_of: Count | None = Field(
        None, description="Make so many texts, and tell the n whose tokens are the likeliest."
    )
    logprobs: Count | None = Field(None, description="Alternatives per token, 0 to 20.")
    stream: Flag | None = None
    stream_options: StreamOptions | None = None

    def list_prompts(self) -> list[str | list[int]]:
        """Each prompt by itself. Errors: BadRequestError for none, or too many."""
        raw: Any = "" if self.prompt is None else self.prompt
        is_one = isinstance(raw, str) or (bool(raw) and isinstance(raw[0], int))
        prompts: list[str | list[int]] = [raw] if is_one else list(raw)
        if not 1 <= len(prompts) <= MAX_PROMPTS:
            raise BadRequestError(
                f"There are {len(prompts)} prompts, 1 to {MAX_PROMPTS} are taken.", param="prompt"
            )
        return prompts

    def read_max_tokens(self) -> int | None:
        """None for as many as the context holds, which only llama.cpp's own field can say."""
        if self.max_tokens is None and self.n_predict == NO_LIMIT:
            return None
        return self.max_tokens or self.read_limit() or DEFAULT_MAX_TOKENS

    @property
    def per_prompt(self) -> int:
        """How many texts are made of each prompt."""
        return max(self.count_choices(), self.best_of or 1)

    @property
    def needed_logprobs(self) -> int | None:
        """How many alternatives are asked for; 0 where it has to be told which texts are best."""
        is_rated = self.per_prompt > self.count_choices()
        return 0 if self.logprobs is None and is_rated else self.logprobs

    def check(self) -> None:
        """Errors: BadRequestError for what is out of range, or can't be had together."""
        check_count("max_tokens", self.max_tokens)
        self._check_best_of()
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

    def _check_best_of(self) -> None:
        told, made = self.count_choices(), self.best_of
        if made is None:
            return
        if not told <= made <= MAX_CHOICES:
            raise BadRequestError(
                f"best_of is {str(made)[:40]}, it must be between n, which is {told}, and "
                f"{MAX_CHOICES}.",
                param="best_of",
            )
        if self.stream and made > told:
            raise BadRequestError(
                f"best_of is {made} and n {told}: which of them are best shows only at the end, "
                "so nothing can be streamed.",
                "Leave best_of or stream out.",
                param="best_of",
            )
