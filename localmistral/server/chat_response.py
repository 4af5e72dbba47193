"""Answers in the form of /v1/chat/completions: whole, or chunk by chunk.

Knows nothing of HTTP or of how an answer is made.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from localmistral.answer import ChatItem, ChatResult
from localmistral.chatformat.parser import ContentDelta, ReasoningDelta, ToolCallDelta
from localmistral.engine import Engine, TokenProbability
from localmistral.server.chat_request import ReasoningFormat
from localmistral.server.token_logprobs import cut_stop, describe_token

FINISH_REASONS = {"cancelled": "stop"}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatAnswer:
    """What all chunks and choices of one response share."""

    model: str
    format: ReasoningFormat
    engine: Engine
    has_logprobs: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{secrets.token_hex(12)}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, results: Sequence[ChatResult], tokens: Sequence[Sequence[TokenProbability]]
    ) -> dict[str, Any]:
        """The response without streaming; `tokens` are the content's, of each answer."""
        choices = [
            {
                "index": index,
                "message": self._message(result),
                "logprobs": self._logprobs(cut_stop(self.engine, tokens[index], result.stop_text)),
                "finish_reason": finish_reason(result),
            }
            for index, result in enumerate(results)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": usage(results)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": None,
        }

    def _message(self, result: ChatResult) -> dict[str, Any]:
        message: dict[str, Any] = {
            "role": "assistant",
            "content": result.content if result.content or not result.tool_calls else None,
            "refusal": None,
        }
        if result.reasoning and self.format == "mistral":
            message["content"] = [_thinking(result.reasoning)]
            message["content"] += [_text(result.content)] if result.content else []
        elif result.reasoning and self.format != "none":
            message[self.format] = result.reasoning
        if result.tool_calls:
            message["tool_calls"] = result.to_message()["tool_calls"]
        return message

    def _logprobs(self, tokens: Sequence[TokenProbability]) -> dict[str, Any] | None:
        if not self.has_logprobs:
            return None
        described = [describe_token(self.engine, token) for token in tokens]
        return {"content": described, "refusal": None}

    def begin(self, index: int) -> dict[str, Any]:
        """The first chunk of an answer: the only one with the role."""
        return self._chunk(index, {"role": "assistant", "content": ""})

    def chunk(self, index: int, item: ChatItem) -> dict[str, Any] | None:
        """The chunk that `item` makes, None where it shows nowhere."""
        if isinstance(item, ContentDelta):
            return self._chunk(index, {"content": item.text})
        if isinstance(item, ReasoningDelta):
            if self.format == "mistral":
                return self._chunk(index, {"content": [_thinking(item.text)]})
            return self._chunk(index, {self.format: item.text}) if self.format != "none" else None
        if isinstance(item, ToolCallDelta):
            return self._chunk(index, {"tool_calls": [_call(item)]})
        if isinstance(item, ChatResult):
            return self._chunk(index, {}, finish=finish_reason(item))
        return None

    def content_chunk(
        self, index: int, text: str, tokens: Sequence[TokenProbability]
    ) -> dict[str, Any]:
        """Text of the content with the log-probabilities of the tokens that completed it."""
        return self._chunk(index, {"content": text}, logprobs=self._logprobs(tokens))

    def _chunk(
        self,
        index: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
    ) -> dict[str, Any]:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return {**self._head("chat.completion.chunk"), "choices": [choice]}

    def usage_chunk(self, results: Sequence[ChatResult]) -> dict[str, Any]:
        """The last chunk, where the client asked for it."""
        return {**self._head("chat.completion.chunk"), "choices": [], "usage": usage(results)}


def finish_reason(result: ChatResult) -> str:
    return FINISH_REASONS.get(result.finish_reason, result.finish_reason)


def usage(results: Sequence[ChatResult]) -> dict[str, Any]:
    """Counts of tokens, in OpenAI's form; the prompt counts once however many answers."""
    prompt = results[0].prompt_tokens
    completion = sum(result.completion_tokens for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": results[0].cached_tokens},
        "completion_tokens_details": {
            "reasoning_tokens": sum(result.reasoning_tokens for result in results)
        },
    }


def _thinking(text: str) -> dict[str, Any]:
    return {"type": "thinking", "thinking": [_text(text)]}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


def _call(delta: ToolCallDelta) -> dict[str, Any]:
    function = {"arguments": delta.arguments}
    if not delta.id:
        return {"index": delta.index, "function": function}
    named = {"name": delta.name, **function}
    return {"index": delta.index, "id": delta.id, "type": "function", "function": named}
